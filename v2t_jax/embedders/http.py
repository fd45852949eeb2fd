"""One OpenAI-compatible embeddings endpoint: requests, repetitions, and what they may cost.

The protocol is that of OpenAI's "Create embeddings": POST {model, input: [texts]} to BASE/embeddings, answered with
{data: [{index, embedding}], usage: {total_tokens}}. The key goes into one header, and nowhere else.
"""

from __future__ import annotations

import email.utils
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np

from v2t_jax.config import ApiConfig
from v2t_jax.errors import InputError

LONGEST_BACKOFF = 60.0  # seconds
LONGEST_REQUESTED_WAIT = 300.0  # a server that asks for more (a daily quota) ends the run
MOST_UNUSABLE = 3  # answers to a request that can't be used: they were paid for, so there are few more tries
MOST_SAID = 300  # characters of a server's message that are shown
ADVICE = {
    401: "set a valid key in the environment variable {variable}",
    403: "use a key (environment variable {variable}) that may use this model",
    404: "check the base URL (usually ending in /v1) and the model's name",
}


def approximate_tokens(text: str) -> int:
    """Four bytes a token, which is about right for prose."""
    return -(-len(text.encode()) // 4)


def most_tokens(text: str) -> int:
    """No usual tokenizer makes more than a token a byte, plus those around the text."""
    return len(text.encode()) + 2


def dollars(cost: float) -> str:
    """Small sums with all the digits that count."""
    return f"${cost:,.2f}" if cost >= 1 else f"${cost:.6f}"


class Budget:
    """Counts requests and tokens, and refuses a request that could exceed a limit. Threads may share it.

    Attributes:
        requests: made so far, repetitions included.
        tokens: paid for so far, as the endpoint counts; at most so many where it doesn't say.
    """

    def __init__(self, config: ApiConfig) -> None:
        self.requests, self.tokens = 0, 0
        self._config = config
        self._reserved, self._under_way = 0, 0
        self._changed = threading.Condition()

    def cost_of(self, tokens: int) -> float | None:
        """Dollars; None without a price."""
        return None if self._config.price is None else tokens * self._config.price / 1e6

    def limits(self) -> str:
        """For the end of a sentence; empty where there are none."""
        said = [] if self._config.max_requests is None else [f"{self._config.max_requests:,} requests"]
        said += [] if self._config.max_cost is None else [f"${self._config.max_cost:g}"]
        return f" (limit: {', '.join(said)})" if said else ""

    def check_plan(self, requests: int, tokens: int, name: str) -> None:
        """Refuses what would exceed a limit before anything is paid.

        Raises:
            InputError: it would.
        """
        limit = self._config.max_requests
        if limit is not None and self.requests + requests > limit:
            before = f" after {self.requests:,} before" if self.requests else ""
            raise InputError(
                f"{name} would need {requests:,} requests{before}, and api.max_requests is {limit:,}: "
                "raise it, send more texts a request, or give fewer texts."
            )
        if self._too_dear(tokens):
            before = f" after {dollars(self.cost_of(self.tokens) or 0)} before" if self.tokens else ""
            raise InputError(
                f"{name} would cost about {dollars(self.cost_of(tokens) or 0)}{before}, and api.max_cost is "
                f"{self._config.max_cost:g}: raise it, or give fewer texts."
            )

    @contextmanager
    def request(self, most_tokens: int) -> Iterator[Callable[[int], None]]:
        """Around one request of at most so many tokens; yields what to call with the tokens it did cost, if known.

        Raises:
            InputError: it could exceed a limit, even when those under way are through.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._too_dear(most_tokens) or not self._under_way)
            limit = self._config.max_requests
            reached = f"{limit:,} requests" if limit is not None and self.requests >= limit else None
            if self._too_dear(most_tokens):
                reached = f"${self._config.max_cost:g}"
            if reached:
                raise InputError(
                    f"The next request could exceed the limit of {reached}: what was answered is kept, "
                    "so raise the limit and run again to go on."
                )
            self.requests += 1
            self._under_way += 1
            self._reserved += most_tokens
        cost = most_tokens

        def settle(tokens: int) -> None:
            nonlocal cost
            cost = tokens

        try:
            yield settle
        finally:
            with self._changed:
                self._under_way -= 1
                self._reserved -= most_tokens
                self.tokens += cost
                self._changed.notify_all()

    def _too_dear(self, tokens: int) -> bool:
        cost = self.cost_of(self.tokens + self._reserved + tokens)
        return cost is not None and self._config.max_cost is not None and cost > self._config.max_cost


class _Trouble(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, what: str, wait: float = 0.0, unusable: bool = False) -> None:
        super().__init__(what)
        self.wait, self.unusable = wait, unusable


class Endpoint:
    """Where and how to ask. Threads may share it.

    Attributes:
        name: model, dimensions and URL: what makes two vectors comparable.
        budget: what was asked so far, and the limits.

    Raises:
        InputError: the URL, the key or the model's name can't be used.
    """

    def __init__(self, base_url: str, config: ApiConfig) -> None:
        self._config = config
        self._base = _checked_url(base_url)
        if not config.model.strip():
            raise InputError(f"No model is named for {self._base}: give api.model, the endpoint's name for it.")
        cut = f"[{config.dimensions}]" if config.dimensions else ""
        self.name = f"{config.model}{cut} at {self._base}"
        self.budget = Budget(config)
        self._key()
        # One for all calls: the correction loop calls once a step, and a new TLS connection costs as much as an answer.
        self._client = httpx2.Client(timeout=config.timeout, limits=httpx2.Limits(max_connections=config.concurrency))
        weakref.finalize(self, self._client.close)
        self._repeated, self._last_trouble = 0, ""

    def key_note(self) -> str:
        """Which key is sent, without the key."""
        if not self._key():
            return f"no key is sent ({self._config.key_variable} is not set)"
        parts = urlsplit(self._base)
        plain = parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")
        return f"the key is that of {self._config.key_variable}" + (", sent UNENCRYPTED over http" if plain else "")

    def troubles(self) -> dict[str, str | int]:
        """For a progress bar: what was paid so far, and what went wrong."""
        cost = self.budget.cost_of(self.budget.tokens)
        shown: dict[str, str | int] = {} if cost is None else {"paid": dollars(cost)}
        return shown | ({"repeated": self._repeated, "because of": self._last_trouble} if self._repeated else {})

    def ask(
        self,
        texts: Sequence[str],
        check: Callable[[Any], np.ndarray],
        stop: threading.Event,
        on_trouble: Callable[[], None],
    ) -> np.ndarray:
        """The vectors of a batch, [len(texts), E], in the texts' order.

        Args:
            check: rows as the endpoint gave them -> vectors; raises `InputError` where they can't be used.
            stop: once set, nothing more is asked.
            on_trouble: called before a request is repeated.

        Raises:
            InputError: the endpoint refuses, or goes on failing, or a limit is reached.
        """
        unusable = 0
        for attempt in range(self._config.retries + 1):
            try:
                return self._ask_once(texts, check, stop)
            except _Trouble as trouble:
                unusable += trouble.unusable
                if attempt == self._config.retries or unusable == MOST_UNUSABLE or stop.is_set():
                    times = "once" if attempt == 0 else f"{attempt + 1} times"
                    raise InputError(
                        f"{self.name} failed {times} ({trouble}): what was answered before is kept, "
                        "so run again later to go on."
                    ) from None
                if trouble.wait > LONGEST_REQUESTED_WAIT:
                    raise InputError(
                        f"{self.name} asks to wait for {trouble.wait:,.0f} s ({trouble}): what was answered before is "
                        "kept, so run again then."
                    ) from None
                self._repeated, self._last_trouble = self._repeated + 1, str(trouble)[:60]
                on_trouble()
                # Jitter, so that requests that failed together don't come back together.
                delay = min(self._config.backoff * 2**attempt, LONGEST_BACKOFF) * random.uniform(0.5, 1.5)
                stop.wait(max(delay, trouble.wait))
        raise AssertionError("unreachable")

    def _ask_once(self, texts: Sequence[str], check: Callable[[Any], np.ndarray], stop: threading.Event) -> np.ndarray:
        body: dict[str, Any] = {"model": self._config.model, "input": list(texts)}
        if self._config.dimensions:
            body["dimensions"] = self._config.dimensions
        headers = {"Authorization": f"Bearer {key}"} if (key := self._key()) else {}
        with self.budget.request(sum(map(most_tokens, texts))) as settle:
            if stop.is_set():  # here, since the budget may have let it wait
                settle(0)
                raise InputError(f"{self.name} was not asked for everything: the run was stopped.")
            try:
                response = self._client.post(f"{self._base}/embeddings", json=body, headers=headers)
            except httpx2.TimeoutException:  # it may be working on it, so it may cost
                raise _Trouble(f"no answer within {self._config.timeout:g} s") from None
            except httpx2.ConnectError as error:
                settle(0)
                raise _Trouble(self._said(f"no connection: {error}")) from None
            except httpx2.TransportError as error:
                raise _Trouble(self._said(f"the connection broke: {error}")) from None
            except httpx2.RequestError as error:
                raise _Trouble(self._said(f"an answer that can't be read: {error}"), unusable=True) from None
            if response.status_code != 200:
                settle(0)
                raise self._refusal(response)
            try:
                answer = response.json()
                _settle_usage(answer, settle)
                return check(_in_order(answer, len(texts)))
            except RecursionError:
                raise _Trouble("an answer nested too deeply", unusable=True) from None
            except InputError as error:
                raise _Trouble(str(error).removeprefix(f"{self.name} ").rstrip("."), unusable=True) from None
            except ValueError as error:  # no JSON, or cut off
                kind = "HTML" if response.text.lstrip().startswith("<") else f"no JSON: {error}"
                raise _Trouble(f"an answer that is {kind}", unusable=True) from None

    def _refusal(self, response: httpx2.Response) -> Exception:
        """What an answer of another status than 200 means."""
        status = response.status_code
        message, code = _message(response)
        said = self._said(f"status {status}" + (f": {message}" if message else ""))
        # Out of credit is a 429 too, but time doesn't mend it.
        if (status in (408, 429) and code != "insufficient_quota") or status >= 500:
            return _Trouble(said, wait=_requested_wait(response.headers.get("retry-after", "")))
        if response.is_redirect:
            advice = "give the base URL that it redirects to"
        else:
            advice = ADVICE.get(status, "change what the message names").format(variable=self._config.key_variable)
        if status in (401, 403) and not self._key():
            advice += ", which is not set"
        return InputError(f"{self.name} refused ({said}): {advice}.")

    def _said(self, text: str) -> str:
        """Somebody else's text as a part of our sentence, without the key, which servers like to quote."""
        if key := self._key():
            text = text.replace(key, "[key]")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split()).rstrip(".")
        return text if len(text) <= MOST_SAID else text[:MOST_SAID] + "..."

    def _key(self) -> str:
        """Read where it is used, and never kept."""
        key = os.environ.get(self._config.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError(
                f"The environment variable {self._config.key_variable} holds characters that no key has; set it anew."
            )
        return key


def _checked_url(url: str) -> str:
    """The base URL in the one form that caches and messages use."""
    advice = "give one such as https://api.openai.com/v1"
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # raises where it is no number
        (parts.hostname or "").encode("idna")  # so does this where the network's library would
        httpx2.URL(url.strip())
    except (ValueError, httpx2.InvalidURL) as error:
        raise InputError(f"The base URL can't be understood ({error}); {advice}.") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        # Not quoted: it may hold a secret.
        raise InputError(f"The base URL holds a user name, a password or something behind ? or #; {advice}.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"The base URL {url!r} isn't one of http or https; {advice}.")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/').removesuffix('/embeddings')}"


def _settle_usage(answer: Any, settle: Callable[[int], None]) -> None:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    tokens = usage.get("total_tokens", usage.get("prompt_tokens")) if isinstance(usage, dict) else None
    if type(tokens) is int and 0 <= tokens < 2**53:  # whatever else a server sends is as good as nothing
        settle(tokens)


def _in_order(answer: Any, count: int) -> list[Any]:
    """The embeddings by their `index` field: answers may come in any order.

    Raises:
        InputError: a field is missing, or there isn't one embedding for each text.
    """
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise InputError("an answer without the list `data`")
    for field in ("index", "embedding"):
        if any(field not in item for item in data):
            raise InputError(f"an answer whose `data` lacks the field `{field}`")
    rows = {item["index"]: item["embedding"] for item in data if type(item["index"]) is int}
    if len(data) != count or set(rows) != set(range(count)):
        raise InputError(f"an answer of {len(data)} embeddings to {count} texts, or with the wrong `index`")
    return [rows[i] for i in range(count)]


def _message(response: httpx2.Response) -> tuple[str, str]:
    """The server's own words, and its error code: {error: {message, code}} in OpenAI's form, others in theirs."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        text = response.text
        return ("an HTML page" if text.lstrip().startswith("<") else text), ""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or ""
        return str(message), str(error.get("code") or error.get("type") or "")
    return str(error or ""), ""


def _requested_wait(header: str) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 where it says nothing usable."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
