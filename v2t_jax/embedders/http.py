"""Client of one OpenAI-compatible embeddings endpoint: requests, retries, and limits on what they may cost.

The protocol is OpenAI's "Create embeddings": POST {model, input: [texts]} to BASE/embeddings returns
{data: [{index, embedding}], usage: {total_tokens}}, where some servers leave out `index`. The key is sent in one header
and kept nowhere.
"""

import email.utils
import math
import os
import random
import re
import time
import weakref
from collections.abc import Callable
from threading import Condition, Event
from typing import Any
from urllib.parse import urlsplit

import httpx2
import msgspec
import numpy as np

from v2t_jax.config import ApiConfig
from v2t_jax.errors import InputError

MAX_BACKOFF = 60.0  # seconds
MAX_RETRY_AFTER = 300.0  # seconds; a server that asks for more (a daily quota) ends the run
MAX_UNUSABLE = 3  # unusable answers per batch: they were paid for, so they are retried less often
MAX_QUOTED = 300  # characters of a server's message that are shown
FORM = "{data: [{index, embedding}, ...]}"
# What of a request a server finds too large, by its status and a few words of its message: the first that fit, if the
# message is of a limit at all. Of llama.cpp's server a long text draws a 500 that speaks of batches.
_LIMIT = re.compile(r"max|most|limit|exceed|larger|less than|greater|range|too (many|long|large)", re.I)
_TOO_LARGE = (
    ("text", (400, 413, 422, 500), re.compile(r"context|too large to process", re.I)),
    ("batch", (400, 413, 422), re.compile(r"batch|array|size|items|per request|entity|body", re.I)),
    ("batch", (400, 413, 422), re.compile(r"(many|number of) (texts|inputs|documents)", re.I)),
    ("text", (400, 413, 422), re.compile(r"token|character|length|long", re.I)),
)
ADVICE = {
    401: "set a valid key in the environment variable {variable}",
    403: "use a key (environment variable {variable}) that may use this model",
    404: "check the base URL (usually ending in /v1) and the model's name",
}

Check = Callable[[Any], np.ndarray]  # raises an `UnusableError`


class UnusableError(InputError):
    """An embedder's answer is no vectors, or none that fit its earlier ones."""


class BrokenVectorError(UnusableError):
    """A vector is zero or not finite, as overloaded servers have it; another answer may be better."""


class TooLongError(InputError):
    """A server refuses a batch for a text that is longer than it reads: probably `text`, the longest."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(what)
        self.text = text


def dollars(cost: float) -> str:
    return f"${cost:,.2f}" if cost >= 1 else f"${cost:.6f}"


class Budget:
    """Counts requests, retries included, and tokens, and refuses what could exceed a limit. Thread-safe."""

    def __init__(self, config: ApiConfig) -> None:
        self.requests = self.tokens = self._reserved = 0  # tokens as the endpoint counts them, else an upper bound
        self._config, self._changed = config, Condition()

    def cost_of(self, tokens: int) -> float | None:
        """Dollars; None without a price."""
        return None if self._config.price is None else tokens * self._config.price / 1e6

    def exceeded(self, requests: int, tokens: int) -> str:
        """The limit that so many further requests and tokens would exceed; empty if none."""
        limits, cost = self._config, self.cost_of(self.tokens + self._reserved + tokens)
        if limits.max_requests is not None and self.requests + requests > limits.max_requests:
            return f"api.max_requests {limits.max_requests:,} ({self.requests:,} made so far)"
        if limits.max_cost is not None and cost is not None and cost > limits.max_cost:
            return f"api.max_cost ${limits.max_cost:g} ({dollars(self.cost_of(self.tokens) or 0)} paid so far)"
        return ""

    def reserve(self, tokens: int, stop: Event) -> None:
        """Counts a request of at most `tokens` tokens, waiting while those in flight may leave enough for it."""
        with self._changed:
            self._changed.wait_for(lambda: not self.exceeded(0, tokens) or not self._reserved)
            if stop.is_set():
                raise InputError("The run was stopped before all texts were sent.")
            if limit := self.exceeded(1, tokens):
                kept = "all answers so far are kept, so raise the limit and run again to continue"
                raise InputError(f"The next request could exceed {limit}: {kept}.")
            self.requests += 1
            self._reserved += tokens

    def settle(self, reserved: int, tokens: int) -> None:
        """Replaces a reservation by what the request really cost."""
        with self._changed:
            self._reserved -= reserved
            self.tokens += tokens
            self._changed.notify_all()


class _Retryable(Exception):
    """A request failed in a way that may pass; `unusable`: it was answered, and so paid for."""

    def __init__(self, what: str, retry_after: float = 0.0, unusable: bool = False) -> None:
        super().__init__(what)
        self.retry_after, self.unusable = retry_after, unusable


class Endpoint:
    """Client of one model at one base URL; its `name` has all that makes vectors comparable. Thread-safe."""

    def __init__(self, base_url: str, config: ApiConfig) -> None:
        self._config, self._base = config, _parse_url(base_url.strip())
        if not config.model.strip():
            raise InputError(f"No model is named for {self._base}: set api.model to the endpoint's name for it.")
        cut = f"[{config.dimensions}]" if config.dimensions else ""
        self.name, self.budget = f"{config.model}{cut} at {self._base}", Budget(config)
        self._key()
        # One client for all calls: the correction loop calls once per step, and a TLS handshake costs as much as that.
        self._client = httpx2.Client(timeout=config.timeout, limits=httpx2.Limits(max_connections=config.concurrency))
        weakref.finalize(self, self._client.close)
        self._retries, self._last_failure = 0, ""

    def terms(self) -> str:
        """The limits, and which key is sent (never the key itself)."""
        config, parts = self._config, urlsplit(self._base)
        limits = [] if config.max_requests is None else [f"{config.max_requests:,} requests"]
        limits += [] if config.max_cost is None else [f"${config.max_cost:g}"]
        plain = parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")
        key = f"the key is read from {config.key_variable}" + (", sent UNENCRYPTED" if plain else "")
        key = key if self._key() else f"no key is sent ({config.key_variable} is not set)"
        return (f" (limit: {', '.join(limits)})" if limits else "") + f"; {key}"

    def status(self) -> dict[str, str | int]:
        """For a progress bar: what was paid so far, and what went wrong."""
        cost = self.budget.cost_of(self.budget.tokens)
        paid: dict[str, str | int] = {} if cost is None else {"paid": dollars(cost)}
        return paid | ({"retries": self._retries, "because of": self._last_failure} if self._retries else {})

    def request(self, texts: list[str], check: Check, stop: Event, on_retry: Callable[[], None]) -> np.ndarray:
        """Embeds one batch, [len(texts), E]: `check` makes vectors of the endpoint's rows; `stop` ends all requests."""
        attempts = unusable = 0
        while True:
            try:
                return self._embed_once(texts, check, stop)
            except _Retryable as failure:
                attempts, unusable = attempts + 1, unusable + failure.unusable
                too_long = failure.retry_after > MAX_RETRY_AFTER
                if too_long or stop.is_set() or attempts > self._config.retries or unusable == MAX_UNUSABLE:
                    what = f"failed {attempts} times" if attempts > 1 else "failed"
                    what = f"asks to wait for {failure.retry_after:,.0f} s" if too_long else what
                    kept = "all answers so far are kept, so run again later to continue"
                    raise InputError(f"{self.name} {what} ({failure}): {kept}.") from None
                self._retries, self._last_failure = self._retries + 1, str(failure)[:60]
                on_retry()
                backoff = min(self._config.backoff * 2.0 ** min(attempts - 1, 99), MAX_BACKOFF)
                # Jittered, so that requests that failed together don't return together.
                stop.wait(max(backoff * random.uniform(0.5, 1.5), failure.retry_after))

    def _embed_once(self, texts: list[str], check: Check, stop: Event) -> np.ndarray:
        shortened = {"dimensions": self._config.dimensions} if self._config.dimensions else {}
        body: dict[str, Any] = {"model": self._config.model, "input": texts, **shortened}
        headers = {"Authorization": f"Bearer {key}"} if (key := self._key()) else {}
        # An upper bound: no usual tokenizer makes more than a token per byte, plus two around the text.
        cost = most = sum(len(text.encode()) + 2 for text in texts)
        self.budget.reserve(most, stop)
        try:
            response = self._client.post(f"{self._base}/embeddings", json=body, headers=headers)
            if response.status_code != 200:
                cost = 0
                raise self._failure(response, texts)
            answer = msgspec.json.decode(response.content)
            cost = _tokens(answer, most)
            return check(_rows(answer, len(texts)))
        except httpx2.TimeoutException:  # the server may still do the work and charge for it
            raise _Retryable(f"no answer within {self._config.timeout:g} s") from None
        except httpx2.ConnectError as error:
            cost = 0
            raise _Retryable(self._quoted(f"no connection: {error}")) from None
        except httpx2.RequestError as error:
            raise _Retryable(self._quoted(f"the connection broke: {error}")) from None
        except msgspec.ValidationError as error:  # another protocol, or an error with status 200: it will stay so
            detail = self._quoted(_server_message(response)[0] or str(error))
            advice = "give the base URL and the model of an OpenAI-compatible embeddings endpoint"
            raise InputError(f"{self.name} gave an answer that isn't {FORM} ({detail}): {advice}.") from None
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # truncated, or no JSON at all
            kind = "HTML" if _is_page(response) else f"not JSON: {error}"
            raise _Retryable(f"an answer that is {kind}", unusable=True) from None
        except BrokenVectorError as error:
            raise _Retryable(str(error).removeprefix(f"{self.name} ").rstrip("."), unusable=True) from None
        finally:
            self.budget.settle(most, cost)

    def _failure(self, response: httpx2.Response, texts: list[str]) -> Exception:
        """The exception for a status other than 200."""
        status, (message, code) = response.status_code, _server_message(response)
        quoted = self._quoted(f"status {status}" + (f": {message}" if message else ""))
        if too_large := _too_large(status, message, len(texts)):
            refused = f"{self.name} refused ({quoted})"
            if too_large == "text":
                return TooLongError(refused, max(texts, key=lambda text: len(text.encode())))
            fewer = f"send fewer than {len(texts)} texts at a time, by a smaller batch_size"
            return InputError(f"{refused}: {fewer}, or for all requests by api.batch_size.")
        # Running out of credit is a 429 too, but waiting doesn't help.
        if (status in (408, 429) and code != "insufficient_quota") or status >= 500:
            return _Retryable(quoted, retry_after=_retry_after(response.headers.get("retry-after", "")))
        advice = ADVICE.get(status, "change what the message names").format(variable=self._config.key_variable)
        if response.is_redirect:
            advice = "set the base URL to the one it redirects to"
        if status in (401, 403) and not self._key():
            advice += ", which is not set"
        return InputError(f"{self.name} refused ({quoted}): {advice}.")

    def _quoted(self, text: str) -> str:
        """Server text as part of one sentence, without the key, which servers like to quote."""
        if key := self._key():
            text = text.replace(key, "[key]")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split()).rstrip(".")
        return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "..."

    def _key(self) -> str:
        """Reads the key where it is used, so that no object holds it."""
        variable = self._config.key_variable
        key = os.environ.get(variable, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError(f"The environment variable {variable} contains characters that no key has; set it again.")
        return key


def _parse_url(url: str) -> str:
    """The base URL in the one form that caches and messages use. Errors don't quote it: it may hold a secret."""
    advice = "give one such as https://api.openai.com/v1"
    try:
        httpx2.URL(url)
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # as the socket library will
    except (ValueError, httpx2.InvalidURL) as error:
        raise InputError(f"The base URL is not valid ({error}); {advice}.") from None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(f"The base URL must be http(s)://HOST/PATH without a user name, a password, ? or #; {advice}.")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/').removesuffix('/embeddings')}"


class _Item(msgspec.Struct):
    embedding: Any
    index: int | None = None


class _Answer(msgspec.Struct):
    data: list[_Item]


def _rows(answer: Any, count: int) -> list[Any]:
    """The embeddings by their `index`, as an endpoint may return them in any order; without any, in that of the texts.

    Where some have an index, one that hasn't is 0: servers whose messages leave out zeros leave out that.
    """
    items = msgspec.convert(answer, _Answer).data
    if any(item.index is not None for item in items):
        items = sorted(items, key=lambda item: item.index or 0)
        if [item.index or 0 for item in items] != [*range(len(items))]:
            raise msgspec.ValidationError("an `index` is wrong")
    if len(items) != count:
        raise msgspec.ValidationError(f"{len(items)} embeddings for {count} texts")
    return [item.embedding for item in items]


def _tokens(answer: Any, otherwise: int) -> int:
    """The tokens that an answer says it is paid for with."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    usage = usage if isinstance(usage, dict) else {}
    tokens = usage.get("total_tokens", usage.get("prompt_tokens"))
    return tokens if type(tokens) is int and 0 <= tokens < 2**53 else otherwise


def _too_large(status: int, message: str, texts: int) -> str:
    """ "text" or "batch" where a server finds that too large, else an empty string."""
    kinds = [kind for kind, statuses, words in _TOO_LARGE if status in statuses and words.search(message)]
    kinds = (kinds if _LIMIT.search(message) else []) + ["batch", "text"] * (status == 413)
    return next((kind for kind in kinds if kind == "text" or texts > 1), "")


def _is_page(response: httpx2.Response) -> bool:
    return response.text.lstrip().startswith("<")


def _server_message(response: httpx2.Response) -> tuple[str, str]:
    """The server's message and error code: {error: {message, code}} in OpenAI's form, variants in others'."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return ("an HTML page" if _is_page(response) else response.text), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error or ""), ""
    message, code = (error.get(a) or error.get(b) or "" for a, b in (("message", "detail"), ("code", "type")))
    return str(message), str(code)


def _retry_after(header: str) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 if it is unusable."""
    try:
        date = email.utils.parsedate_to_datetime(header) if header[:1].isalpha() else None
        seconds = date.timestamp() - time.time() if date else float(header)
    except (ValueError, OverflowError):
        return 0.0
    return seconds if 0 < seconds < math.inf else 0.0
