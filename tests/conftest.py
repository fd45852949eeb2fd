"""Every test runs on a real mesh of eight CPU devices, with implicit broadcasting refused."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Two pytest workers share two cores: one thread each for a matrix product beats two that wait for each other.
# And eight devices on a busy machine may take long to meet in a collective: that is no deadlock.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    ]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network

# A shell that starts the tests in the background has them ignore Ctrl-C, and with them the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402  (after its environment)
import pytest  # noqa: E402

from tests.helpers.fake_endpoint import KEY, Api, Endpoint, serve  # noqa: E402
from v2t_jax.parallel.compile_cache import enable_compilation_cache, user_cache_dir  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
enable_compilation_cache(user_cache_dir() / "xla-tests")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_freed() -> Iterator[None]:
    """Each compiled program takes some memory maps, of which Linux gives a process 65,530: after those XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A local server that stands in for a paid one."""
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve() as endpoint:
        yield endpoint


@pytest.fixture
def api(endpoint: Endpoint, tmp_path: Path) -> Api:
    """Embedders that ask it, sharing one cache."""

    from v2t_jax.config import ApiConfig
    from v2t_jax.embedders.black_box import HttpEmbedder  # not above: what is imported here isn't checked by jaxtyping

    def api(**settings: Any) -> HttpEmbedder:
        given = {"model": "tiny", "cache": str(tmp_path / "cache"), "backoff": 0.01, "timeout": 10.0} | settings
        return HttpEmbedder(endpoint.url, ApiConfig(**given))

    return api
