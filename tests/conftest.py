"""Every test runs on a real mesh of eight CPU devices, with implicit broadcasting refused."""

import os

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

import jax  # noqa: E402  (after its environment)

from v2t_jax.compile_cache import enable_compilation_cache, user_cache_dir  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
enable_compilation_cache(user_cache_dir() / "xla-tests")
