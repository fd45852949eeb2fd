"""Embedders that can only be asked: a callable's answers are checked; an endpoint may do its worst."""

import email.utils
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toy_loop
from fake_endpoint import WIDTH, Endpoint, changed, raw, serve, status, vector

from v2t_jax import cli, progress
from v2t_jax.blackbox import PROBE, CallableEmbedder, HttpEmbedder
from v2t_jax.bridge import host_embedder, host_errors
from v2t_jax.config import ApiConfig
from v2t_jax.correct import CorrectionLoop, CorrectionSettings
from v2t_jax.errors import InputError

KEY = "sk-secret-0123456789"
TEXTS = [f"text number {i}" for i in range(40)]
EXPECTED = np.array([vector(text) for text in TEXTS], np.float32)
Make = Callable[..., HttpEmbedder]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve() as endpoint:
        yield endpoint


@pytest.fixture
def make(endpoint: Endpoint, tmp_path: Path) -> Make:
    def make(**settings: Any) -> HttpEmbedder:
        given = {"model": "tiny", "cache": str(tmp_path / "cache"), "backoff": 0.01, "timeout": 10.0} | settings
        return HttpEmbedder(endpoint.url, ApiConfig(**given))

    return make


# --- a callable


def constant(answer: Any) -> CallableEmbedder:
    return CallableEmbedder(lambda texts: answer, "constant")


ROWS = [[1.0, 2.0], [3.0, 4.0]]


class Tensor:
    """What torch's tensors ask for: a gradient must be cut off, then a device left, before numpy may look."""

    def __init__(self, state: str = "gradient") -> None:
        self.state = state

    def detach(self) -> "Tensor":
        assert self.state == "gradient"
        return Tensor("gpu")

    def cpu(self) -> "Tensor":
        assert self.state == "gpu"
        return Tensor("bfloat16")

    def float(self) -> "Tensor":
        assert self.state == "bfloat16"
        return Tensor("ready")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        assert self.state == "ready"
        return np.array(ROWS, dtype)


@pytest.mark.parametrize(
    "answer",
    [
        *(ROWS, np.array(ROWS), np.array(ROWS, np.int8), jnp.array(ROWS, jnp.bfloat16), [jnp.array(r) for r in ROWS]),
        *(np.array(ROWS, ml_dtypes.bfloat16), Tensor()),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_a_callable_may_answer_in_any_array(answer: Any) -> None:
    embedder = constant(answer)
    made = embedder.embed(["a", "b"])
    assert made.dtype == np.float32 and (embedder.width, embedder.normalised) == (2, False)
    np.testing.assert_array_equal(made, ROWS)


@pytest.mark.oracle
def test_a_callable_may_answer_in_torch() -> None:
    torch: Any = __import__("torch")
    for answer in (
        torch.tensor(ROWS, requires_grad=True),
        torch.tensor(ROWS, dtype=torch.bfloat16),
        [torch.tensor(row, requires_grad=True) for row in ROWS],
    ):
        np.testing.assert_array_equal(constant(answer).embed(["a", "b"]), ROWS)
    with pytest.raises(InputError, match="something else than rows of numbers"):
        constant(torch.ones(2, 2, device="meta")).embed(["a", "b"])


def test_a_callable_sees_each_text_once_in_batches() -> None:
    seen: list[list[str]] = []

    def fn(texts: list[str]) -> np.ndarray:
        seen.append(texts)
        return np.array([vector(text) for text in texts])

    embedder = CallableEmbedder(fn)
    assert (embedder.name, embedder.weights_sha256) == ("fn", "")
    np.testing.assert_array_equal(embedder.embed(["b", "a", "b", "c", "a"], batch_size=2), _vectors("babca"))
    assert seen == [["b", "a"], ["c"]] and (embedder.width, embedder.normalised) == (WIDTH, True)
    assert CallableEmbedder(fn).width == WIDTH and seen[-1] == [PROBE]
    assert CallableEmbedder(fn, width=5, normalised=False).width == 5 and len(seen) == 3
    assert CallableEmbedder(fn).embed([]).shape == (0, WIDTH)


def _vectors(texts: str) -> np.ndarray:
    return np.array([vector(text) for text in texts], np.float32)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ROWS[:1], r"answered 2 texts with an array of shape \(1, 2\)"),
        ([1.0, 2.0], r"shape \(2,\)"),
        (np.ones((2, 0)), "width"),
        (None, "of type object"),
        ([["a"], ["b"]], "of type <U1"),
        (np.ones((2, 2), bool), "of type bool"),
        (np.ones((2, 2), complex), "of type complex"),
        ([[1.0], [1.0, 2.0]], "one length"),
        ([[1.0, None], [1.0, 2.0]], "of type object"),
        ([[1.0, np.nan], [1.0, 2.0]], "NaN or infinite"),
        ([[1.0, 1e99], [1.0, 2.0]], "NaN or infinite"),
        ([[1.0, 1.0], [0.0, 0.0]], "zeros"),
    ],
)
def test_a_wrong_answer_is_one_sentence(answer: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        constant(answer).embed(["a", "b"])
    assert str(caught.value).startswith("constant ") and str(caught.value).endswith(".")


def test_a_callable_must_stay_the_same() -> None:
    answers = iter([[[3.0, 4.0]], [[1.0, 0.0, 0.0]]])
    embedder = CallableEmbedder(lambda texts: next(answers), "other")
    with pytest.raises(InputError, match="vectors 3 wide, where 2 is expected"):
        embedder.embed(["a", "b"], batch_size=1)
    with pytest.raises(InputError, match="where 5 is expected"):
        CallableEmbedder(lambda texts: ROWS, width=5).embed(["a", "b"])
    answers = iter([[[0.6, 0.8]], [[6.0, 8.0]]])
    with pytest.raises(InputError, match="isn't of length 1"):
        CallableEmbedder(lambda texts: next(answers)).embed(["a", "b"], batch_size=1)


def test_texts_and_settings_are_checked() -> None:
    embedder = constant(ROWS)
    with pytest.raises(InputError, match="Text 2 of 2 is empty"):
        embedder.embed(["a", " \n"])
    with pytest.raises(InputError, match="Text 1 of 1 is not valid Unicode"):
        embedder.embed(["\udce9"])
    with pytest.raises(InputError, match="batch_size is 0"):
        embedder.embed(["a"], batch_size=0)
    with pytest.raises(InputError, match="must be a function"):
        CallableEmbedder("model")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width of x is 0"):
        CallableEmbedder(constant, "x", width=0)


# --- an endpoint that behaves


def test_vectors_come_in_order_and_once(endpoint: Endpoint, make: Make) -> None:
    embedder = make()
    assert embedder.name == f"tiny at {endpoint.url}"
    texts = [*TEXTS, *TEXTS[::-1]]
    plan = embedder.plan(texts, batch_size=7)
    assert (plan.texts, plan.cached, plan.requests, plan.cost) == (40, 0, 6, None) and not endpoint.requests
    np.testing.assert_array_equal(embedder.embed(texts, batch_size=7), np.concatenate([EXPECTED, EXPECTED[::-1]]))
    assert len(endpoint.requests) == embedder.budget.requests == 6
    assert {*endpoint.paid.values()} == {1} and endpoint.authorizations == {f"Bearer {KEY}"}
    assert all(set(request) == {"model", "input"} and request["model"] == "tiny" for request in endpoint.requests)
    assert (embedder.width, embedder.normalised) == (WIDTH, True)
    again = make()  # another process would find the same
    np.testing.assert_array_equal(again.embed(TEXTS), EXPECTED)
    assert again.width == WIDTH and len(endpoint.requests) == 6
    assert make(model="other").plan(TEXTS).cached == make(dimensions=4).plan(TEXTS).cached == 0


def test_dimensions_and_width(endpoint: Endpoint, make: Make) -> None:
    embedder = make(dimensions=4)
    assert embedder.width == 4 and not endpoint.requests
    assert embedder.embed(["a"]).shape == (1, 4) and endpoint.requests[0]["dimensions"] == 4
    assert make().width == WIDTH and endpoint.requests[1]["input"] == [PROBE]
    assert make().normalised and len(endpoint.requests) == 2
    endpoint.always = changed(lambda good: None)  # an endpoint that ignores `dimensions`
    with pytest.raises(InputError, match="8 wide, where 3 is expected"):
        make(dimensions=3).embed(["a"])


def test_no_more_requests_at_once_than_allowed(endpoint: Endpoint, make: Make) -> None:
    def slow(request: Any) -> None:
        time.sleep(0.02)

    endpoint.always = slow
    make(concurrency=3).embed(TEXTS, batch_size=2)
    assert endpoint.most_at_once == 3
    # Where the server sees them one after the other, the answers can't come in another order.
    make(model="b", concurrency=1).embed(TEXTS[:6], batch_size=2)
    assert [request["input"][0] for request in endpoint.requests[-3:]] == TEXTS[0:6:2]


def test_answers_may_overtake_each_other(endpoint: Endpoint, make: Make) -> None:
    def later_first(request: Any) -> None:
        time.sleep(0.15 if request["input"][0] == TEXTS[0] else 0)

    endpoint.always = later_first
    np.testing.assert_array_equal(make().embed(TEXTS, batch_size=10), EXPECTED)


# --- an endpoint that misbehaves


def broken_halfway(request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": "100000"}, b'{"data": [{"index": 0, "embed'


def slow(request: dict[str, Any]) -> None:
    time.sleep(0.5)


def set_first(field: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda good: good["data"][0].__setitem__(field, value)


PASSING = {
    "429": (status(429, "slow down"), "status 429: slow down"),
    "408": (status(408), "status 408"),
    "500": (status(500, "oops"), "status 500: oops"),
    "503 page": (raw(b"<html><body>busy</body></html>", 503), "status 503: an HTML page"),
    "timeout": (slow, "no answer within 0.3 s"),
    "broken connection": (broken_halfway, "the connection broke"),
    "cut-off JSON": (raw(b'{"data": [{"index": 0, "embedding": [0.1, 0.2'), "no JSON"),
    "empty": (raw(b""), "no JSON"),
    "bytes": (raw(b"\xff\xfe\xfa"), "no JSON"),
    "deep JSON": (raw(b"[" * 200_000), "JSON|nested too deeply"),
    "HTML": (raw(b"\n<!doctype html><title>Sign in</title>"), "an answer that is HTML"),
    "no object": (raw(b"[1]"), "without the list `data`"),
    "no data": (changed(lambda good: {"embeddings": []}), "without the list `data`"),
    "data of numbers": (changed(lambda good: {"data": [1, 2]}), "without the list `data`"),
    "no embedding": (changed(lambda good: good["data"][0].pop("embedding") and None), "lacks the field `embedding`"),
    "no index": (changed(lambda good: good["data"][0].pop("index") and None), "lacks the field `index`"),
    "index twice": (changed(set_first("index", 1)), "wrong `index`"),
    "index beyond": (changed(set_first("index", 99)), "wrong `index`"),
    "index true": (changed(set_first("index", True)), "wrong `index`"),
    "index list": (changed(set_first("index", [0])), "wrong `index`"),
    "one too few": (changed(lambda good: good["data"].pop() and None), "of 1 embeddings to 2 texts"),
    "one too many": (changed(lambda good: good["data"].append(good["data"][0])), "of 3 embeddings to 2 texts"),
    "wrong width": (changed(set_first("embedding", [1.0])), "rows of numbers of one length"),
    "base64": (changed(set_first("embedding", "AACAPwAAgD8=")), "rows of numbers of one length"),
    "null": (changed(set_first("embedding", None)), "rows of numbers of one length"),
    "NaN": (changed(set_first("embedding", [float("nan")] * WIDTH)), "NaN or infinite"),
    "zeros": (changed(set_first("embedding", [0] * WIDTH)), "zeros"),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_what_may_pass_is_tried_again_a_few_times(endpoint: Endpoint, make: Make, trouble: str) -> None:
    behaviour, said = PASSING[trouble]
    texts, timeout = TEXTS[:2], 0.3 if trouble == "timeout" else 10.0
    endpoint.then(behaviour, behaviour)
    np.testing.assert_array_equal(make(timeout=timeout).embed(texts), EXPECTED[:2])
    assert len(endpoint.requests) == 3
    endpoint.then(behaviour, behaviour)
    with pytest.raises(InputError, match=said) as caught:
        make(model="other", timeout=timeout, retries=1).embed(texts)
    assert "failed 2 times" in str(caught.value) and str(caught.value).endswith("run again later to go on.")
    assert len(endpoint.requests) == 5 and make(model="other").plan(texts).cached == 0


def test_unusable_answers_are_paid_for_three_times_at_most(endpoint: Endpoint, make: Make) -> None:
    endpoint.always = raw(b"<html>")
    with pytest.raises(InputError, match="failed 3 times"):
        make(retries=50).embed(TEXTS[:2])
    assert len(endpoint.requests) == 3


def test_width_that_changes_between_runs(endpoint: Endpoint, make: Make) -> None:
    make().embed(TEXTS[:2])
    endpoint.always = changed(lambda good: [item["embedding"].pop() for item in good["data"]] and None)
    with pytest.raises(InputError, match="vectors 7 wide, where 8 is expected"):
        make().embed(TEXTS[:4])
    assert make().plan(TEXTS[:4]).cached == 2


def test_indices_in_another_order(endpoint: Endpoint, make: Make) -> None:
    endpoint.always = changed(lambda good: good["data"].reverse())
    np.testing.assert_array_equal(make().embed(TEXTS, batch_size=16), EXPECTED)


PERMANENT = {
    400: (
        status(400, "This text is too long. It has 9,000 tokens."),
        r"It has 9,000 tokens\): change what the message",
    ),
    401: (
        status(401, f"Incorrect API key provided: {KEY}."),
        r"provided: \[key\]\): set a valid key .* OPENAI_API_KEY",
    ),
    403: (raw(b'{"message": "not yours"}', 403), "status 403: not yours"),
    404: (raw(b'{"error": "no such model"}', 404), "status 404: no such model.*check the base URL"),
    422: (raw(b'{"detail": [{"loc": "input"}]}', 422), "status 422: .*loc"),
    405: (raw(b"<html>nginx</html>", 405), "status 405: an HTML page"),
    302: (lambda request: (302, {"Location": "/login"}, b""), "status 302.*redirects to"),
    429: (status(429, "No credit", error_code="insufficient_quota"), "status 429: No credit"),
}


@pytest.mark.parametrize("code", PERMANENT)
def test_a_refusal_ends_at_once_in_one_sentence(endpoint: Endpoint, make: Make, code: int) -> None:
    behaviour, said = PERMANENT[code]
    endpoint.always = behaviour
    with pytest.raises(InputError, match=said) as caught:
        make().embed(TEXTS[:2])
    assert len(endpoint.requests) == 1
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and KEY not in str(caught.value)


def test_a_wrong_path_and_no_server(endpoint: Endpoint, tmp_path: Path) -> None:
    config = ApiConfig(model="m", cache=str(tmp_path), retries=1, backoff=0)
    with pytest.raises(InputError, match="status 404: Not Found"):
        HttpEmbedder(f"{endpoint.url}/wrong", config).embed(["a"])
    with pytest.raises(InputError, match="failed 2 times .no connection: .*refused"):
        HttpEmbedder("http://127.0.0.1:9/v1", config).embed(["a"])


def test_retry_after_is_honoured(endpoint: Endpoint, make: Make) -> None:
    soon = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: at least 1 from now
    for header, least in (("0.4", 0.4), (soon, 0.5), ("nan", 0), ("soon", 0), ("-5", 0)):
        endpoint.then(status(429, headers={"Retry-After": header}))
        make(model=header).embed(["a"])
        waited = endpoint.times[-1] - endpoint.times[-2]
        assert least <= waited < least + 2, header
    endpoint.then(status(429, "daily quota", headers={"Retry-After": "7200"}))
    with pytest.raises(InputError, match="asks to wait for 7,200 s .status 429: daily quota"):
        make(model="later").embed(["a"])


def test_back_off_doubles(endpoint: Endpoint, make: Make) -> None:
    endpoint.then(*[status(500)] * 4)
    make(backoff=0.05).embed(["a"])
    waits = np.diff(endpoint.times)
    bounds = 0.05 * 2.0 ** np.arange(4)
    assert (waits >= bounds * 0.5).all() and (waits < bounds * 1.5 + 0.2).all()


# --- what it costs


def test_a_plan_beyond_the_limit_is_refused_before_it_starts(endpoint: Endpoint, make: Make) -> None:
    with pytest.raises(InputError, match="would need 6 requests, and api.max_requests is 5"):
        make(max_requests=5).embed(TEXTS, batch_size=7)
    with pytest.raises(InputError, match=r"would cost about \$0.016000, and api.max_cost is 0.01"):
        make(price=100, max_cost=0.01).embed(TEXTS)
    assert not endpoint.requests
    embedder = make(max_requests=6)
    embedder.embed(TEXTS, batch_size=7)
    np.testing.assert_array_equal(embedder.embed(TEXTS), EXPECTED)  # costs nothing
    with pytest.raises(InputError, match="would need 1 requests after 6 before"):
        embedder.embed(["new"])


def test_repetitions_count_against_the_limit(endpoint: Endpoint, make: Make) -> None:
    endpoint.always = status(500)
    with pytest.raises(InputError, match="limit of 10 requests: what was answered is kept"):
        make(max_requests=10, concurrency=4, backoff=0.0).embed(TEXTS, batch_size=10)
    assert len(endpoint.requests) == 10


@pytest.mark.parametrize("usage", [True, False])
def test_the_cost_stays_under_its_limit(endpoint: Endpoint, make: Make, usage: bool) -> None:
    """40 texts of about 14 bytes: 4 tokens each by estimate, 3 as the server counts, 16 at worst."""
    if not usage:
        endpoint.always = changed(lambda good: good.pop("usage") and None)
    embedder = make(price=1e6, max_cost=200.0, concurrency=4)  # a dollar a token
    plan = embedder.plan(TEXTS)
    assert plan.tokens == plan.cost == 160
    if usage:
        embedder.embed(TEXTS, batch_size=5)  # four at once could cost more than the limit: they wait for each other
        assert embedder.budget.tokens == sum(len(text.split()) for text in endpoint.paid) == 120
    else:
        with pytest.raises(InputError, match=r"limit of \$200"):
            embedder.embed(TEXTS, batch_size=5)
        assert 120 < embedder.budget.tokens <= 200 and 120 < sum(len(text) + 2 for text in endpoint.paid) <= 200


def test_what_it_costs_is_said_before_it_starts(
    endpoint: Endpoint, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.enable()
    try:
        make().embed(TEXTS[:4])
        embedder = make(price=2.0, max_cost=1.0, max_requests=9)
        said_first: list[str] = []
        endpoint.always = lambda request: said_first.append(capsys.readouterr().err)
        embedder.embed(TEXTS, batch_size=20)
        assert (
            f"tiny at {endpoint.url}: 40 distinct texts, 4 cached, 2 requests, about 144 tokens, about $0.000288 "
            in (said_first[0])
        )
        assert "(limit: 9 requests, $1); the key is that of OPENAI_API_KEY\n" in said_first[0]
        embedder.embed(["one more"])  # as each step of the correction loop would: not worth a line
        assert "tiny" not in capsys.readouterr().err
        make().embed(TEXTS)
        assert "all of 40 distinct texts are cached, nothing is asked\n" in capsys.readouterr().err
    finally:
        progress.disable()


# --- interruptions


CHILD = """
import sys
from v2t_jax.blackbox import HttpEmbedder
from v2t_jax.config import ApiConfig
url, cache = sys.argv[1:]
embedder = HttpEmbedder(url, ApiConfig(model="tiny", cache=cache, concurrency=4, timeout=60.0))
embedder.embed([f"text number {i}" for i in range(40)], batch_size=2)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_paid_for_twice(endpoint: Endpoint, make: Make, tmp_path: Path, how: signal.Signals) -> None:
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
    assert make().plan(TEXTS).cached == kept
    endpoint.always = None
    np.testing.assert_array_equal(make().embed(TEXTS), EXPECTED)
    assert set(endpoint.paid) == set(TEXTS) and {*endpoint.paid.values()} == {1}


def test_a_failure_keeps_what_was_answered(endpoint: Endpoint, make: Make) -> None:
    endpoint.always = lambda request: status(400, "bad")(request) if TEXTS[21] in request["input"] else None
    with pytest.raises(InputError, match="status 400: bad"):
        make(concurrency=1).embed(TEXTS, batch_size=2)
    assert make().plan(TEXTS).cached == 20


def test_a_cache_that_cannot_be_used(endpoint: Endpoint, make: Make, tmp_path: Path) -> None:
    make().embed(TEXTS[:2])
    file = make().cache_file
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE vectors SET float32 = ? WHERE rowid = 1", (b"\0\0\0\0",))
    connection.close()
    with pytest.raises(InputError, match="The vectors in .* don't fit .*delete that file"):
        make().embed(TEXTS[:2])
    file.write_bytes(b"no database, but long enough to be looked at" * 99)
    with pytest.raises(InputError, match="is damaged .*not a database.*; delete it"):
        make().embed(TEXTS[:2])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be made .*name another folder"):
        make(cache=str(tmp_path / "file" / "cache")).embed(["a"])
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match="can't be used .*unable to open"):
        make().embed(TEXTS[:2])
    assert len(endpoint.requests) == 1


# --- in the correction loop


def test_the_correction_loop_over_black_boxes(endpoint: Endpoint, make: Make) -> None:
    params = toy_loop.toy_params()
    targets = np.asarray(toy_loop.embed(params, toy_loop.toy_texts(1, toy_loop.BATCH)))
    table = np.asarray(params["table"])  # here: nothing beside the running loop may call jax

    def embed_texts(texts: list[str]) -> list[list[float]]:
        ids = [np.array(text.split(), int) for text in texts]
        return [table[np.arange(len(row)), row].sum(axis=0).tolist() for row in ids]

    def behave(request: dict[str, Any]) -> Any:
        rows = embed_texts(request["input"])
        data = [{"index": i, "embedding": row} for i, row in enumerate(rows)][::-1]
        return 200, {}, json.dumps({"data": data}).encode()

    def embed(ids: np.ndarray) -> np.ndarray:
        return embedder.embed([" ".join(str(i) for i in row if i != 0) for row in ids])

    endpoint.always = behave
    boxed = host_embedder(embed, toy_loop.WIDTH)
    loop = CorrectionLoop(
        toy_loop.hypothesize, toy_loop.propose_greedy, lambda p, ids: boxed(ids), CorrectionSettings()
    )
    expected = toy_loop.make_loop()(params, targets, 6)
    for black_box in (CallableEmbedder(embed_texts), make()):
        embedder = black_box
        toy_loop.assert_same(loop(params, targets, 6), expected)
    assert {*endpoint.paid.values()} == {1}
    endpoint.always = status(401, "The key has expired.")
    with pytest.raises(InputError, match="status 401: The key has expired"), host_errors():
        loop(params, -targets, 6)


# --- settings and secrets


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/v1", "isn't one of http or https"),
        ("https://", "isn't one of http"),
        ("https://user:hunter2@host/v1", "holds a user name"),
        ("https://host/v1?key=hunter2", "behind . or #"),
        ("https://host:port/v1", "can't be understood"),
        ("https://[::1/v1", "can't be understood"),
    ],
)
def test_base_urls_that_cannot_be_used(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        HttpEmbedder(url, ApiConfig(model="m"))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        *({"dimensions": 0}, {"concurrency": 0}, {"timeout": 0.0}, {"timeout": float("nan")}, {"retries": -1}),
        *({"backoff": -1.0}, {"price": -1.0}, {"price": 1.0, "max_cost": -1.0}, {"max_requests": -1}),
        {"max_cost": 1.0},
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"api.{[*settings][-1]}"):
        ApiConfig(model="m", **settings)


def test_urls_of_one_endpoint_share_a_cache(make: Make) -> None:
    def file(url: str) -> Path:
        return HttpEmbedder(url, ApiConfig(model="org/model")).cache_file

    assert file("https://Host/v1") == file("https://host/v1/") == file("https://host/v1/embeddings")
    assert file("https://host/v1") != file("https://host/v2")


def test_keys(endpoint: Endpoint, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "  other-key\n")
    make(key_variable="MINE").embed(["a"])
    make(key_variable="UNSET").embed(["b"])
    assert endpoint.authorizations == {"Bearer other-key", None}
    endpoint.always = status(401, "Who are you?")
    with pytest.raises(InputError, match="environment variable UNSET, which is not set"):
        make(key_variable="UNSET").embed(["c"])
    for bad in ("two words", "köy", "a\nb"):
        monkeypatch.setenv("MINE", bad)
        with pytest.raises(InputError, match="MINE holds characters that no key has") as caught:
            make(key_variable="MINE")
        assert bad not in str(caught.value)
    with pytest.raises(InputError, match=r"give api\.model"):
        make(model=" ")


# --- the command line


def v2t(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from v2t_jax.cli import main; main()", *arguments]


def test_embed_from_the_command_line(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n")
    output = tmp_path / "made.npy"

    def run(*more: str, embedder: str = endpoint.url) -> tuple[int, str, str]:
        arguments = ["embed", "--input", str(tmp_path / "lines.txt"), "--output", str(output), "--embedder", embedder]
        monkeypatch.setattr(sys, "argv", ["v2t", *arguments, "--api.cache", str(tmp_path / "cache"), *more])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    api = ("--api.model", "tiny", "--api.backoff", "0.01", "--batch-size", "10")
    assert run()[0] == 2
    code, out, err = run(*api, "--api.max-requests", "3")
    assert (code, out) == (2, "") and "would need 4 requests, and api.max_requests is 3" in err
    code, out, err = run(*api, embedder="all-MiniLM-L6-v2")
    assert (code, out) == (2, "") and "--api options need an endpoint" in err
    assert run(*api, "--api.max-cost", "3")[2].startswith("v2t: api.max_cost needs api.price: give both; ")
    assert not endpoint.requests and not output.exists()
    endpoint.then(status(500, f"with {KEY}"), raw(b"<html>"))
    code, out, err = run(*api, "--api.price", "0.02", "--api.max-cost", "1")
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
    api = ("--api.model", "tiny", "--api.cache", str(tmp_path / "cache"), "--api.concurrency", "1")
    command = v2t("embed", "--input", "lines.txt", "--output", "o.npy", "--embedder", endpoint.url, *api)
    with subprocess.Popen(
        [*command, "--batch-size", "4"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert arrived.wait(60)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)  # it doesn't wait out the 200 seconds
    assert (process.returncode, out) == (130, "") and err.splitlines()[-1] == "v2t: interrupted"
    assert "what was answered is kept in" in err and "Traceback" not in err and KEY not in err
    assert not list(tmp_path.glob("o.npy*"))
    assert HttpEmbedder(endpoint.url, ApiConfig(model="tiny", cache=str(tmp_path / "cache"))).plan(TEXTS).cached == 12


def test_a_request_is_as_openai_defines_it(endpoint: Endpoint, make: Make) -> None:
    make().embed(["é 🙂"])
    assert json.dumps(endpoint.requests) == json.dumps([{"model": "tiny", "input": ["é 🙂"]}])
