"""An endpoint that behaves, one that does its worst, and settings that can't be used."""

import email.utils
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_endpoint import EXPECTED, KEY, TEXTS, WIDTH, Api, Endpoint, changed, raw, status
from v2t_jax.config import ApiConfig
from v2t_jax.embedders.black_box import PROBE, HttpEmbedder
from v2t_jax.errors import InputError


def test_vectors_come_in_order_and_once(endpoint: Endpoint, api: Api) -> None:
    embedder = api()
    assert embedder.name == f"tiny at {endpoint.url}"
    texts = [*TEXTS, *TEXTS[::-1]]
    plan = embedder.plan(texts, batch_size=7)
    assert (plan.texts, plan.cached, plan.requests, plan.cost) == (40, 0, 6, None) and not endpoint.requests
    np.testing.assert_array_equal(embedder.embed(texts, batch_size=7), np.concatenate([EXPECTED, EXPECTED[::-1]]))
    assert len(endpoint.requests) == embedder.budget.requests == 6
    assert {*endpoint.paid.values()} == {1} and endpoint.authorizations == {f"Bearer {KEY}"}
    assert all(set(request) == {"model", "input"} and request["model"] == "tiny" for request in endpoint.requests)
    assert (embedder.width, embedder.normalized) == (WIDTH, True)
    again = api()  # another process would find the same
    np.testing.assert_array_equal(again.embed(TEXTS), EXPECTED)
    assert again.width == WIDTH and len(endpoint.requests) == 6
    assert api(model="other").plan(TEXTS).cached == api(dimensions=4).plan(TEXTS).cached == 0


def test_dimensions_and_width(endpoint: Endpoint, api: Api) -> None:
    embedder = api(dimensions=4)
    assert embedder.width == 4 and not endpoint.requests
    assert embedder.embed(["a"]).shape == (1, 4) and endpoint.requests[0]["dimensions"] == 4
    assert api().width == WIDTH and endpoint.requests[1]["input"] == [PROBE]
    assert api().normalized and len(endpoint.requests) == 2
    endpoint.always = changed(lambda good: None)  # an endpoint that ignores `dimensions`
    with pytest.raises(InputError, match="vectors of width 8 instead of 3"):
        api(dimensions=3).embed(["a"])


def test_no_more_requests_at_once_than_allowed(endpoint: Endpoint, api: Api) -> None:
    def slow(request: Any) -> None:
        time.sleep(0.02)

    endpoint.always = slow
    api(concurrency=3).embed(TEXTS, batch_size=2)
    assert endpoint.most_at_once == 3
    # Where the server sees them one after the other, the answers can't come in another order.
    api(model="b", concurrency=1).embed(TEXTS[:6], batch_size=2)
    assert [request["input"][0] for request in endpoint.requests[-3:]] == TEXTS[0:6:2]


def test_answers_may_overtake_each_other(endpoint: Endpoint, api: Api) -> None:
    def later_first(request: Any) -> None:
        time.sleep(0.15 if request["input"][0] == TEXTS[0] else 0)

    endpoint.always = later_first
    np.testing.assert_array_equal(api().embed(TEXTS, batch_size=10), EXPECTED)


def test_a_request_is_as_openai_defines_it(endpoint: Endpoint, api: Api) -> None:
    api().embed(["é 🙂"])
    assert json.dumps(endpoint.requests) == json.dumps([{"model": "tiny", "input": ["é 🙂"]}])


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
    "cut-off JSON": (raw(b'{"data": [{"index": 0, "embedding": [0.1, 0.2'), "not JSON"),
    "empty": (raw(b""), "not JSON"),
    "bytes": (raw(b"\xff\xfe\xfa"), "not JSON"),
    "deep JSON": (raw(b"[" * 200_000), "not JSON"),
    "HTML": (raw(b"\n<!doctype html><title>Sign in</title>"), "an answer that is HTML"),
    "NaN": (changed(set_first("embedding", [float("nan")] * WIDTH)), "not JSON"),
    "zeros": (changed(set_first("embedding", [0] * WIDTH)), "zeros"),
}
FORMS = {
    "no object": (raw(b"[1]"), r"isn't {data: \[{index, embedding}, ...\]} \(\[1\]\): give the base URL and"),
    "no data": (changed(lambda good: {"embeddings": []}), "missing required field `data`"),
    "error in a good status": (raw(b'{"error": {"message": "No provider."}}'), r"\(No provider\): give the base"),
    "data of numbers": (changed(lambda good: {"data": [1, 2]}), "Expected `object`, got `int` - at "),
    "no embedding": (changed(lambda good: good["data"][0].pop("embedding") and None), "missing required field `emb"),
    "index twice": (changed(set_first("index", 1)), "an `index` is wrong"),
    "index beyond": (changed(set_first("index", 99)), "an `index` is wrong"),
    "index true": (changed(set_first("index", True)), "isn't {data: .*got `bool`"),
    "index list": (changed(set_first("index", [0])), "isn't {data: .*got `array`"),
    "index left out twice": (
        changed(lambda good: [row.pop("index") for row in good["data"][::2]] and None),
        "`index` is wrong",
    ),
    "one too few": (changed(lambda good: good["data"].pop() and None), "2 embeddings for 3 texts"),
    "one too many": (changed(lambda good: good["data"].append({"embedding": [1.0], "index": 3})), "4 embeddings for 3"),
    "wrong width": (changed(set_first("embedding", [1.0])), "rows of numbers of one length"),
    "base64": (changed(set_first("embedding", "AACAPwAAgD8=")), "rows of numbers of one length"),
    "null": (changed(set_first("embedding", None)), "rows of numbers of one length"),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_what_may_pass_is_tried_again_a_few_times(endpoint: Endpoint, api: Api, trouble: str) -> None:
    behaviour, said = PASSING[trouble]
    texts, timeout = TEXTS[:2], 0.3 if trouble == "timeout" else 10.0
    endpoint.then(behaviour, behaviour)
    np.testing.assert_array_equal(api(timeout=timeout).embed(texts), EXPECTED[:2])
    assert len(endpoint.requests) == 3
    endpoint.then(behaviour, behaviour)
    with pytest.raises(InputError, match=said) as caught:
        api(model="other", timeout=timeout, retries=1).embed(texts)
    assert "failed 2 times" in str(caught.value) and str(caught.value).endswith("run again later to continue.")
    assert len(endpoint.requests) == 5 and api(model="other").plan(texts).cached == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_will_not_change_is_asked_for_once(endpoint: Endpoint, api: Api, form: str) -> None:
    behaviour, said = FORMS[form]
    endpoint.always = behaviour
    embedder = api()
    with pytest.raises(InputError, match=said) as caught:
        embedder.embed(TEXTS[:3])
    assert len(endpoint.requests) == 1 and str(caught.value).startswith(f"tiny at {endpoint.url} ")
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [({"embeddings": [], "usage": {"total_tokens": 7}}, 7), ({"data": [], "usage": {"prompt_tokens": 5}}, 5), ([], 45)],
)
def test_an_answer_of_another_form_costs_what_it_says(endpoint: Endpoint, api: Api, answer: Any, tokens: int) -> None:
    """Or what the request could cost at most, where it says nothing."""
    endpoint.always = raw(json.dumps(answer).encode())
    embedder = api()
    with pytest.raises(InputError, match="isn't {data"):
        embedder.embed(TEXTS[:3])
    assert embedder.budget.tokens == tokens


def without_zeros(good: dict[str, Any]) -> None:
    good["data"][0].pop("index")
    good["data"].reverse()


@pytest.mark.parametrize(
    "change",
    [
        without_zeros,  # Gemini's
        lambda good: [row.pop("index") for row in good["data"]],
        lambda good: [row.update(index=None) for row in good["data"]],
    ],
    ids=["zero left out", "none", "null"],
)
def test_an_index_that_is_left_out(endpoint: Endpoint, api: Api, change: Callable[[dict[str, Any]], Any]) -> None:
    endpoint.always = changed(lambda good: change(good) and None)
    np.testing.assert_array_equal(api().embed(TEXTS, batch_size=16), EXPECTED)
    np.testing.assert_array_equal(api(model="other").embed(TEXTS[:1]), EXPECTED[:1])


# What servers said of too large a request in public reports of 2023 to 2026, shortened.
BATCHES = {
    "TEI": (422, "batch size 40 > maximum allowed batch size 32"),
    "TEI's body": (413, "Failed to buffer the request body: length limit exceeded"),
    "SiliconFlow": (413, "input batch size 136 > maximum allowed batch size 64"),
    "DashScope": (400, "Value error, batch size is invalid, it should not be larger than 10.: input.contents"),
    "Cohere": (400, "invalid request: total number of texts must be at most 96 - received 131"),
    "Voyage": (400, "The max allowed tokens per submitted batch is 120000. Your batch has 121138 tokens."),
    "Mistral": (400, "Too many inputs in request, split into more batches."),
    "Mistral's tokens": (400, "Too many tokens in batch. Max is 16384 got 17555"),
    "OpenAI": (400, "Invalid 'input': array too long. Expected an array with maximum length 2048."),
    "OpenAI's tokens": (400, "Requested 375703 tokens, max 300000 tokens per request"),
    "Azure": (400, "Too many inputs. The max number of inputs is 16."),
    "Jina": (400, "input length is larger than the largest allowed size 2048"),
    "Gemini": (400, "BatchEmbedContentsRequest.requests: at most 100 requests can be in one batch"),
    "pydantic": (422, "List should have at most 2048 items after validation, not 3000"),
    "nginx": (413, "<html>Request Entity Too Large</html>"),
}
LONG = {
    "OpenAI": (400, "This model's maximum context length is 8192 tokens, however you requested 8610 tokens."),
    "OpenAI's newer": (400, "Invalid 'input[1]': maximum context length is 8192 tokens."),
    "vLLM": (400, "This model's maximum context length is 512 tokens. However, you requested 1451 tokens."),
    "LiteLLM": (400, "litellm.ContextWindowExceededError: maximum input is 2048"),
    "Ollama": (400, "the input length exceeds the context length"),
    "TEI": (413, "Input validation error: `inputs` must have less than 512 tokens. Given: 534"),
    "TEI's characters": (422, "Input validation error: `inputs` must have less than 32000 characters. Given: 67337"),
    "llama.cpp": (500, "input (992 tokens) is too large to process. increase the physical batch size (current: 512)"),
    "Voyage": (400, "The example at index 0 in your batch has too many tokens and exceeds the model's context window."),
    "Jina": (422, "Single text cannot exceed 8194 tokens. 10000 tokens given"),
    "DashScope": (400, "Range of input length should be [1, 2048]"),
}


@pytest.mark.parametrize("server", BATCHES)
def test_a_limit_on_batches(endpoint: Endpoint, api: Api, server: str) -> None:
    code, message = BATCHES[server]
    said = status(code, message) if server != "nginx" else raw(message.encode(), code)
    endpoint.always = lambda request: said(request) if len(request["input"]) > 8 else None
    with pytest.raises(InputError, match=r"fewer than 16 texts at a time, by a smaller batch_size"):
        api(concurrency=1).embed(TEXTS, batch_size=16)
    assert len(endpoint.requests) == 1
    np.testing.assert_array_equal(api().embed(TEXTS, batch_size=8), EXPECTED)
    embedder = api(model="other", batch_size=8)  # as for the correction loop, which has no batch size of its own
    assert embedder.plan(TEXTS).requests == 5
    np.testing.assert_array_equal(embedder.embed(TEXTS), EXPECTED)
    if code != 413:  # of one text it can't be the batch
        endpoint.always = said
        with pytest.raises(InputError) as caught:
            api(model="third").embed(["a"])
        assert "batch_size" not in str(caught.value)


@pytest.mark.parametrize("server", LONG)
def test_a_text_that_is_too_long_is_named(endpoint: Endpoint, api: Api, server: str) -> None:
    said = status(*LONG[server])
    long = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, " * 9
    endpoint.always = lambda request: said(request) if long in request["input"] else None
    texts = [*TEXTS, TEXTS[0], long, "another"]
    with pytest.raises(
        InputError, match=r"shorten text 42 of 43 \(of a file, that line\), the longest of .* 'Lorem ipsum"
    ):
        api(concurrency=1).embed(texts, batch_size=16)
    assert len(endpoint.requests) == 3, "it isn't asked again"


def test_other_refusals_are_left_as_they_are(endpoint: Endpoint, api: Api) -> None:
    for code, message in (
        (400, "'dimensions' must be less than or equal to 1536."),
        (400, "The model 'batch-embed' doesn't exist."),
        (422, "Unknown field 'context'."),
    ):
        endpoint.always = status(code, message)
        with pytest.raises(InputError, match=r"\): change what the message names\."):
            api().embed(TEXTS[:2])


def test_a_plan_looks_at_its_texts(api: Api) -> None:
    with pytest.raises(InputError, match="Text 1 of 1 is not valid Unicode"):
        api().plan(["\udce9"])
    with pytest.raises(InputError, match="batch_size is 0"):
        api().plan(["a"], batch_size=0)


def test_unusable_answers_are_paid_for_three_times_at_most(endpoint: Endpoint, api: Api) -> None:
    endpoint.always = raw(b"<html>")
    with pytest.raises(InputError, match="failed 3 times"):
        api(retries=50).embed(TEXTS[:2])
    assert len(endpoint.requests) == 3


def test_width_that_changes_between_runs(endpoint: Endpoint, api: Api) -> None:
    api().embed(TEXTS[:2])
    endpoint.always = changed(lambda good: [item["embedding"].pop() for item in good["data"]] and None)
    with pytest.raises(InputError, match="vectors of width 7 instead of 8"):
        api().embed(TEXTS[:4])
    assert api().plan(TEXTS[:4]).cached == 2


@pytest.mark.parametrize("tokens", [10**400, 2**53, -1, True, 7.0, "7", None, [7]])
def test_usage_that_is_no_count_is_as_good_as_none(endpoint: Endpoint, api: Api, tokens: Any) -> None:
    endpoint.always = changed(lambda good: good.pop("usage") and None)
    without = api()
    without.embed(["a bird"])
    endpoint.always = changed(lambda good: good["usage"].update(total_tokens=tokens))
    embedder = api(model="other")
    embedder.embed(["a bird"])
    assert embedder.budget.tokens == without.budget.tokens > 0


def test_indices_in_another_order(endpoint: Endpoint, api: Api) -> None:
    endpoint.always = changed(lambda good: good["data"].reverse())
    np.testing.assert_array_equal(api().embed(TEXTS, batch_size=16), EXPECTED)


PERMANENT = {
    400: (
        status(400, "The input must not be a list of tokens."),
        r"a list of tokens\): change what the message",
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
def test_a_refusal_ends_at_once_in_one_sentence(endpoint: Endpoint, api: Api, code: int) -> None:
    behaviour, said = PERMANENT[code]
    endpoint.always = behaviour
    with pytest.raises(InputError, match=said) as caught:
        api().embed(TEXTS[:2])
    assert len(endpoint.requests) == 1
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and KEY not in str(caught.value)


def test_a_wrong_path_and_no_server(endpoint: Endpoint, tmp_path: Path) -> None:
    config = ApiConfig(model="m", cache=str(tmp_path), retries=1, backoff=0)
    with pytest.raises(InputError, match="status 404: Not Found"):
        HttpEmbedder(f"{endpoint.url}/wrong", config).embed(["a"])
    with pytest.raises(InputError, match="failed 2 times .no connection: .*refused"):
        HttpEmbedder("http://127.0.0.1:9/v1", config).embed(["a"])


def test_retry_after_is_honoured(endpoint: Endpoint, api: Api) -> None:

    def in_two_seconds(request: dict[str, Any]) -> Any:  # whole seconds: at least 1 from now
        return status(429, headers={"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)})(request)

    for header, least in (("0.4", 0.4), ("a date", 0.5), ("nan", 0), ("soon", 0), ("-5", 0)):
        endpoint.then(in_two_seconds if header == "a date" else status(429, headers={"Retry-After": header}))
        api(model=header).embed(["a"])
        waited = endpoint.times[-1] - endpoint.times[-2]
        assert least <= waited < least + 2, header
    endpoint.then(status(429, "daily quota", headers={"Retry-After": "7200"}))
    with pytest.raises(InputError, match="asks to wait for 7,200 s .status 429: daily quota.*run again later"):
        api(model="later").embed(["a"])


def test_back_off_doubles(endpoint: Endpoint, api: Api) -> None:
    endpoint.then(*[status(500)] * 4)
    api(backoff=0.05).embed(["a"])
    waits = np.diff(endpoint.times)
    bounds = 0.05 * 2.0 ** np.arange(4)
    assert (waits >= bounds * 0.5).all() and (waits < bounds * 1.5 + 0.2).all()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/v1", r"must be http\(s\)://HOST/PATH without a user name, a password, \? or #"),
        ("https://", "must be http"),
        ("https://user:hunter2@host/v1", "without a user name"),
        ("https://host/v1?key=hunter2", "without a user name, a password, . or #"),
        ("https://host:port/v1", "is not valid"),
        ("https://[::1/v1", "is not valid"),
        ("https://host..name/v1", "is not valid"),
        ("https://host/\x00v1", "is not valid"),
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


def test_urls_of_one_endpoint_share_a_cache(api: Api) -> None:
    def file(url: str) -> Path:
        return HttpEmbedder(url, ApiConfig(model="org/model")).cache_file

    assert file("https://Host/v1") == file("https://host/v1/") == file("https://host/v1/embeddings")
    assert file("https://host/v1") != file("https://host/v2")


def test_keys(endpoint: Endpoint, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "  other-key\n")
    api(key_variable="MINE").embed(["a"])
    api(key_variable="UNSET").embed(["b"])
    assert endpoint.authorizations == {"Bearer other-key", None}
    endpoint.always = status(401, "Who are you?")
    with pytest.raises(InputError, match="environment variable UNSET, which is not set"):
        api(key_variable="UNSET").embed(["c"])
    for bad in ("two words", "köy", "a\nb"):
        monkeypatch.setenv("MINE", bad)
        with pytest.raises(InputError, match="MINE contains characters that no key has") as caught:
            api(key_variable="MINE")
        assert bad not in str(caught.value)
    with pytest.raises(InputError, match=r"set api\.model"):
        api(model=" ")
