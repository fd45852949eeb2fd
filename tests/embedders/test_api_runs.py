"""Runs over a paid endpoint: what they cost, limits that hold, interruptions that cost nothing, the command line."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.command_line import status_of
from tests.helpers.fake_endpoint import EXPECTED, KEY, TEXTS, Api, Endpoint, changed, raw, status
from v2t_jax import progress
from v2t_jax.config import ApiConfig
from v2t_jax.embedders.black_box import HttpEmbedder
from v2t_jax.errors import InputError


def test_a_plan_beyond_the_limit_is_refused_before_it_starts(endpoint: Endpoint, api: Api) -> None:
    with pytest.raises(InputError, match="needs 40 distinct texts, .* 6 requests, .*beyond api.max_requests 5 "):
        api(max_requests=5).embed(TEXTS, batch_size=7)
    with pytest.raises(InputError, match=r"about \$0.016000, beyond api.max_cost \$0.01 "):
        api(price=100, max_cost=0.01).embed(TEXTS)
    assert not endpoint.requests
    embedder = api(max_requests=6)
    embedder.embed(TEXTS, batch_size=7)
    np.testing.assert_array_equal(embedder.embed(TEXTS), EXPECTED)  # costs nothing
    with pytest.raises(InputError, match=r"1 requests, .*beyond api.max_requests 6 \(6 made so far\)"):
        embedder.embed(["new"])


def test_repetitions_count_against_the_limit(endpoint: Endpoint, api: Api) -> None:
    endpoint.always = status(500)
    with pytest.raises(InputError, match="could exceed api.max_requests 10 .*: all answers so far are kept"):
        api(max_requests=10, concurrency=4, backoff=0.0).embed(TEXTS, batch_size=10)
    assert len(endpoint.requests) == 10


@pytest.mark.parametrize("usage", [True, False])
def test_the_cost_stays_under_its_limit(endpoint: Endpoint, api: Api, usage: bool) -> None:
    """40 texts of about 14 bytes: 4 tokens each by estimate, 3 as the server counts, 16 at worst."""
    if not usage:
        endpoint.always = changed(lambda good: good.pop("usage") and None)
    embedder = api(price=1e6, max_cost=200.0, concurrency=4)  # a dollar a token
    plan = embedder.plan(TEXTS)
    assert plan.tokens == plan.cost == 160
    if usage:
        embedder.embed(TEXTS, batch_size=5)  # four at once could cost more than the limit: they wait for each other
        assert embedder.budget.tokens == sum(len(text.split()) for text in endpoint.paid) == 120
    else:
        with pytest.raises(InputError, match=r"could exceed api.max_cost \$200"):
            embedder.embed(TEXTS, batch_size=5)
        assert 120 < embedder.budget.tokens <= 200 and 120 < sum(len(text) + 2 for text in endpoint.paid) <= 200


def test_what_it_costs_is_said_before_it_starts(
    endpoint: Endpoint, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.enable()
    try:
        api().embed(TEXTS[:4])
        embedder = api(price=2.0, max_cost=1.0, max_requests=9)
        said_first: list[str] = []
        endpoint.always = lambda request: said_first.append(capsys.readouterr().err)
        embedder.embed(TEXTS, batch_size=20)
        assert (
            f"tiny at {endpoint.url}: 40 distinct texts, 4 cached, 2 requests, about 144 tokens, about $0.000288 "
            in (said_first[0])
        )
        assert "(limit: 9 requests, $1); the key is read from OPENAI_API_KEY\n" in said_first[0]
        embedder.embed(["one more"])  # as each step of the correction loop would: not worth a line
        assert "tiny" not in capsys.readouterr().err
        api().embed(TEXTS)
        assert "all 40 distinct texts are cached, no request is needed\n" in capsys.readouterr().err
    finally:
        progress.disable()


CHILD = """
import sys
from v2t_jax.embedders.black_box import HttpEmbedder
from v2t_jax.config import ApiConfig
url, cache = sys.argv[1:]
embedder = HttpEmbedder(url, ApiConfig(model="tiny", cache=cache, concurrency=4, timeout=60.0))
embedder.embed([f"text number {i}" for i in range(40)], batch_size=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_paid_for_twice(endpoint: Endpoint, api: Api, tmp_path: Path, how: signal.Signals) -> None:
    """Eight requests are answered, four wait. What waits is unpaid when the process is killed; Ctrl-C waits for it."""
    numbers, held, go_on = iter(range(99)), threading.Semaphore(0), threading.Event()

    def hold_after_eight(request: Any) -> Any:
        if next(numbers) >= 8:
            held.release()
            go_on.wait(30)
            if how is signal.SIGKILL:
                return 500, {}, b"{}"
        return None

    endpoint.always = hold_after_eight
    command = [sys.executable, "-c", CHILD, endpoint.url, str(tmp_path / "cache")]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        for _ in range(4):  # a thread asks again when its answer is on disk
            assert held.acquire(timeout=30)
        process.send_signal(how)
        if how is signal.SIGINT:
            time.sleep(0.2)
        else:
            process.wait(30)
        go_on.set()
        process.communicate(timeout=30)
    assert process.returncode == -how
    kept = 16 if how is signal.SIGKILL else 24
    assert api().plan(TEXTS).cached == kept
    endpoint.always = None
    np.testing.assert_array_equal(api().embed(TEXTS), EXPECTED)
    assert set(endpoint.paid) == set(TEXTS) and {*endpoint.paid.values()} == {1}


def test_a_failure_keeps_what_was_answered(endpoint: Endpoint, api: Api) -> None:
    endpoint.always = lambda request: status(400, "bad")(request) if TEXTS[21] in request["input"] else None
    with pytest.raises(InputError, match="status 400: bad"):
        api(concurrency=1).embed(TEXTS, batch_size=2)
    assert api().plan(TEXTS).cached == 20


def test_a_cache_that_cannot_be_used(endpoint: Endpoint, api: Api, tmp_path: Path) -> None:
    api().embed(TEXTS[:2])
    file = api().cache_file
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE vectors SET float32 = ? WHERE rowid = 1", (b"\0\0\0\0",))
    connection.close()
    with pytest.raises(InputError, match="The vectors in .* don't fit .*delete that file"):
        api().embed(TEXTS[:2])
    file.write_bytes(b"no database, but long enough to be looked at" * 99)
    with pytest.raises(InputError, match="can't be used .*not a database.*delete it"):
        api().embed(TEXTS[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be used .*set api.cache"):
        api(cache=str(tmp_path / "file" / "cache")).embed(["a"])
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match="can't be used .*unable to open"):
        api().embed(TEXTS[:2])
    assert len(endpoint.requests) == 1


def v2t(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from v2t_jax.cli.main import main; main()", *arguments]


def test_embed_from_the_command_line(endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n")
    output = tmp_path / "made.npy"

    def run(*more: str, embedder: str = endpoint.url) -> tuple[int, str, str]:
        arguments = ["embed", "--input", str(tmp_path / "lines.txt"), "--output", str(output), "--embedder", embedder]
        return status_of(*arguments, "--api.cache", str(tmp_path / "cache"), *more), *capsys.readouterr()

    options = ("--api.model", "tiny", "--api.backoff", "0.01", "--batch-size", "10")
    assert run()[0] == 2
    code, out, err = run(*options, "--api.max-requests", "3")
    assert (code, out) == (2, "") and "4 requests, about 160 tokens, beyond --api.max-requests 3 " in err
    code, out, err = run(*options, embedder="all-MiniLM-L6-v2")
    assert (code, out) == (2, "") and "The --api options are for endpoints" in err
    assert run(*options, "--api.max-cost", "3") == (2, "", "v2t: --api.max-cost needs --api.price: give both.\n")
    assert not endpoint.requests and not output.exists()
    endpoint.then(status(500, f"with {KEY}"), raw(b"<html>"))
    code, out, err = run(*options, "--api.price", "0.02", "--api.max-cost", "1")
    assert (code, out) == (0, f"40 vectors of width 8 -> {output}\n")
    assert "4 requests, about 160 tokens, about $0.000003 (limit: $1)" in err and KEY not in out + err
    np.testing.assert_array_equal(np.load(output), EXPECTED)
    assert not list(tmp_path.glob("*.part"))
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()


def test_control_c_on_the_command_line_keeps_what_was_answered(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n")
    arrived = threading.Event()

    def hold_the_fourth(request: Any) -> Any:
        if len(endpoint.requests) < 4:
            return None
        arrived.set()
        return status(503, "busy", {"Retry-After": "200"})(request)

    endpoint.always = hold_the_fourth
    options = ("--api.model", "tiny", "--api.cache", str(tmp_path / "cache"), "--api.concurrency", "1")
    command = v2t("embed", "--input", "lines.txt", "--output", "o.npy", "--embedder", endpoint.url, *options)
    with subprocess.Popen(
        [*command, "--batch-size", "4"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert arrived.wait(60)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=30)  # it doesn't wait out the 200 seconds
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "") and err.splitlines()[-1] == "v2t: interrupted"
    assert "all answers are kept in" in err and "Traceback" not in err and KEY not in err
    assert not list(tmp_path.glob("o.npy*"))
    assert HttpEmbedder(endpoint.url, ApiConfig(model="tiny", cache=str(tmp_path / "cache"))).plan(TEXTS).cached == 12


TWO = """
import os, sys
from types import SimpleNamespace
import numpy as np
from tests.helpers.fake_endpoint import EXPECTED, TEXTS
from v2t_jax.config import ApiConfig, DistributedConfig
from v2t_jax.embedders.black_box import HttpEmbedder, embed_once
from v2t_jax.errors import InputError
from v2t_jax.inversion.api import InversionResult, invert_on_all_hosts
from v2t_jax.parallel import processes
processes.start(DistributedConfig())
url, cache = sys.argv[1:]
def embedder(**limits):
    return HttpEmbedder(url, ApiConfig(model="tiny", cache=cache + os.environ["V2T_PROCESS_ID"], **limits))
def invert(pipeline, texts):
    vectors = pipeline.embedder.embed(texts)
    return [InversionResult(text, float(v[0]), 0, ()) for text, v in zip(texts, vectors, strict=True)]
np.testing.assert_array_equal(embed_once(embedder(), TEXTS[:20]), EXPECTED[:20])
found = invert_on_all_hosts(invert, SimpleNamespace(mesh=None, embedder=embedder(max_requests=1)), TEXTS)
assert [one.text for one in found] == TEXTS and found[7].cosine == float(EXPECTED[7, 0])
try:
    embed_once(embedder(max_requests=0), ["one more"])
except InputError as error:
    print("refused:", error)
"""


@pytest.mark.multihost
def test_two_processes_ask_for_each_text_once(endpoint: Endpoint, tmp_path: Path) -> None:
    """Each has a cache of its own, as hosts have; what process 0 is refused, all are."""
    launcher = [sys.executable, "launch/local.py", "--processes", "2", "--devices", "1", "--"]
    command = [*launcher, sys.executable, "-c", TWO, endpoint.url, str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("refused: tiny at ") == 2 and done.stdout.count("beyond api.max_requests 0 ") == 2
    assert endpoint.paid == dict.fromkeys(TEXTS, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["cache0"]
