"""Embedders that are only called, never seen: any Python callable, any OpenAI-compatible endpoint.

Both are `TextEmbedder`s (embedders/base.py). Embedding runs no JAX, so both may be called from inside the compiled
correction loop. Every answer is checked before it is used.
"""

import hashlib
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from v2t_jax import progress
from v2t_jax.config import ApiConfig
from v2t_jax.embedders.base import EmbedderIdentity, TextEmbedder
from v2t_jax.embedders.http import BrokenVectorError, Endpoint, TooLongError, UnusableError, dollars
from v2t_jax.embedders.vector_cache import VectorCache
from v2t_jax.errors import InputError, as_numpy, check_texts, check_whole
from v2t_jax.parallel import processes
from v2t_jax.parallel.compile_cache import user_cache_dir

PROBE = "width"  # the text that is embedded to learn the vectors' width and length
BYTES_PER_TOKEN = 4  # about right for prose
UNIT_TOLERANCE = 1e-2  # vectors of length 1 may be rounded to half precision


class BlackBox(ABC):
    """Checks texts, embeds each distinct one once, checks the answers."""

    metered = False  # calls are paid for and limited, so process 0 of a run makes them for all processes
    weights_sha256 = ""  # unknown

    def __init__(self, name: str, width: int | None, normalized: bool | None) -> None:
        if width is not None:
            check_whole(f"The width of {name}", width, 1)
        self.identity = EmbedderIdentity(name, width=width)  # without what is learned later: records would change
        self.name, self._width, self._normalized, self._lock = name, width, normalized, threading.Lock()

    @property
    def width(self) -> int:
        """E; learned by embedding one short text unless it is known."""
        return self._width or self.embed([PROBE]).shape[1]

    @property
    def normalized(self) -> bool:
        """Whether vectors have length 1; learned like the width."""
        if self._normalized is None:
            self.embed([PROBE])
        return bool(self._normalized)

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Embeds texts, [len(texts), E] float32, in batches of `batch_size` distinct texts."""
        distinct = _distinct(texts, batch_size)
        if not distinct:
            return np.zeros((0, self.width), np.float32)
        vectors = self._embed(distinct, batch_size)
        return np.stack([vectors[text] for text in texts])

    @abstractmethod
    def _embed(self, texts: list[str], batch_size: int) -> dict[str, np.ndarray]: ...

    def _checked(self, answer: Any, rows: int) -> np.ndarray:
        """The answer as float32 [rows, E], consistent with all earlier ones."""
        try:
            array = as_numpy(answer)
            if array.dtype.kind not in "fiuV":  # V: bfloat16 and other types of ml_dtypes
                raise TypeError(f"they are of type {array.dtype}")
            with np.errstate(over="ignore"):  # what float32 can't represent becomes infinite, and is refused below
                vectors = array.astype(np.float32)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: torch's
            raise UnusableError(f"{self.name} did not return rows of numbers of one length ({error}).") from None
        if vectors.ndim != 2 or len(vectors) != rows or not vectors.size:
            shape = f"an array of shape {vectors.shape} for {rows} texts; expected [{rows}, width]"
            raise UnusableError(f"{self.name} returned {shape}.")
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise BrokenVectorError(f"{self.name} returned a vector of zeros, or with NaN or infinite values; fix it.")
        width, unit = vectors.shape[1], bool((np.abs(lengths - 1) <= UNIT_TOLERANCE).all())
        with self._lock:
            if self._width not in (None, width):
                widths = f"vectors of width {width} instead of {self._width}"
                raise UnusableError(f"{self.name} returned {widths}; use one embedder throughout.")
            if self._normalized and not unit:
                raise UnusableError(f"{self.name} returned a vector whose length isn't 1; pass normalized=False.")
            self._width, self._normalized = width, unit if self._normalized is None else self._normalized
        return vectors


class CallableEmbedder(BlackBox):
    """Any Python callable that embeds: `CallableEmbedder(model.encode, name="our encoder")`.

    Args:
        fn: list of texts -> array [texts, E] of numpy, JAX or torch, or nested lists. It must depend on the texts
            alone, and must not run JAX if it is used in the correction loop, where the device waits for it.
        width, normalized: E, and whether vectors have length 1; by default learned from the first answer.
    """

    def __init__(
        self, fn: Callable[[list[str]], Any], name: str = "", width: int | None = None, normalized: bool | None = None
    ) -> None:
        if not callable(fn):
            raise InputError(f"An embedder must be a function of a list of texts, not {type(fn).__name__}.")
        super().__init__(name or str(getattr(fn, "__name__", type(fn).__name__)), width, normalized)
        self._fn = fn

    def _embed(self, texts: list[str], batch_size: int) -> dict[str, np.ndarray]:
        vectors: dict[str, np.ndarray] = {}
        with progress.bar(len(texts), f"embedding with {self.name}", unit="texts") as update:
            for batch in _batches(texts, batch_size):
                vectors |= zip(batch, self._checked(self._fn([*batch]), len(batch)), strict=True)
                update(len(vectors))
        return vectors


class Plan(NamedTuple):
    """What a call would request from an endpoint; tokens and cost (dollars, None without a price) are estimates."""

    texts: int
    cached: int
    requests: int
    tokens: int
    cost: float | None

    def __str__(self) -> str:
        if not self.requests:
            return f"all {self.texts:,} distinct texts are cached, no request is needed"
        counts = f"{self.texts:,} distinct texts, {self.cached:,} cached, {self.requests:,} requests"
        cost = "" if self.cost is None else f", about {dollars(self.cost)}"
        return f"{counts}, about {self.tokens:,} tokens{cost}"


class HttpEmbedder(BlackBox):
    """An OpenAI-compatible endpoint, `POST base_url/embeddings`.

    Answers are cached on disk as they arrive, by endpoint, model, dimensions and the sha256 of the text, so that an
    interrupted run pays for nothing twice; a killed one, at most for the requests in flight. Limits hold for the life
    of the object. `width` and `normalized` as for `CallableEmbedder`.
    """

    metered = True

    def __init__(
        self, base_url: str, config: ApiConfig, width: int | None = None, normalized: bool | None = None
    ) -> None:
        self._endpoint = Endpoint(base_url, config)
        super().__init__(self._endpoint.name, width or config.dimensions, normalized)
        self.config, self.budget = config, self._endpoint.budget
        folder = Path(config.cache) if config.cache else user_cache_dir() / "embeddings"
        readable = re.sub(r"[^\w.-]+", "_", config.model)[:60]
        self.cache_file = folder / f"{readable}-{hashlib.sha256(self.name.encode()).hexdigest()[:12]}.sqlite"
        self._announced = -1

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        try:
            return super().embed(texts, batch_size)
        except TooLongError as error:
            number = f"{[*texts].index(error.text) + 1:,} of {len(texts):,} (of a file, that line)"
            which = f"the longest of its request, which begins {error.text[:40]!r}"
            raise InputError(f"{error}: shorten text {number}, {which}.") from None

    def plan(self, texts: Sequence[str], batch_size: int = 64) -> Plan:
        """What `embed` with the same arguments would request and cost; requests nothing."""
        distinct = _distinct(texts, batch_size)
        with closing(VectorCache(self.cache_file)) as cache:
            cached = cache.read(distinct)
        return self._plan(len(cached), [text for text in distinct if text not in cached], batch_size)

    def _plan(self, cached: int, missing: list[str], batch_size: int) -> Plan:
        tokens = sum(-(-len(text.encode()) // BYTES_PER_TOKEN) for text in missing)
        requests = len(self._batches(missing, batch_size))
        return Plan(cached + len(missing), cached, requests, tokens, self.budget.cost_of(tokens))

    def _batches(self, texts: list[str], batch_size: int) -> list[list[str]]:
        return _batches(texts, min(batch_size, self.config.batch_size or batch_size))

    def _embed(self, texts: list[str], batch_size: int) -> dict[str, np.ndarray]:
        with closing(VectorCache(self.cache_file)) as cache:
            vectors = cache.read(texts)
            try:
                if vectors:
                    self._checked([*vectors.values()], len(vectors))
            except UnusableError as error:
                wrong = f"The vectors in {self.cache_file} don't fit ({str(error).rstrip('.')})"
                raise InputError(f"{wrong}; delete that file to request them again.") from None
            missing = [text for text in texts if text not in vectors]
            plan = self._plan(len(vectors), missing, batch_size)
            if limit := self.budget.exceeded(plan.requests, plan.tokens):
                raise InputError(f"{self.name} needs {plan}, beyond {limit}: raise the limit, or give fewer texts.")
            # The correction loop calls once per step: announce only what doubles the number of requests.
            if self.budget.requests + plan.requests > 2 * self._announced:
                self._announced = self.budget.requests + plan.requests
                progress.note(f"{self.name}: {plan}{self._endpoint.terms() if plan.requests else ''}")
            if missing:
                self._request(self._batches(missing, batch_size), vectors, cache)
        return vectors

    def _request(self, batches: list[list[str]], vectors: dict[str, np.ndarray], cache: VectorCache) -> None:
        """Requests the missing vectors concurrently and adds them to `vectors`."""
        failures: list[BaseException] = []
        total = len(vectors) + sum(map(len, batches))
        stop = threading.Event()

        def request(batch: list[str]) -> np.ndarray:
            try:
                rows = self._endpoint.request(batch, lambda answer: self._checked(answer, len(batch)), stop, show)
                cache.write(batch, rows)  # immediately: it has been paid for
                return rows
            except BaseException as error:
                failures.append(error)
                stop.set()
                raise failures[0] from None  # the cause, not what stopping did to the others

        with progress.bar(total, f"embedding with {self.name}", unit="texts", start=len(vectors)) as update:

            def show() -> None:
                update(len(vectors), **self._endpoint.status())

            pool = ThreadPoolExecutor(min(self.config.concurrency, len(batches)), "embed")
            try:
                for batch, rows in zip(batches, pool.map(request, batches), strict=True):
                    vectors.update(zip(batch, rows, strict=True))
                    show()
            except KeyboardInterrupt:
                progress.note(f"stopping after the requests in flight; all answers are kept in {self.cache_file}")
                raise
            finally:
                # Requests in flight are paid for, so their answers are waited for and kept.
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)


def embed_once(embedder: TextEmbedder, texts: Sequence[str]) -> np.ndarray:
    """Embeds the same texts for all processes, [len(texts), E]; only process 0 asks a metered embedder."""
    if not getattr(embedder, "metered", False) or jax.process_count() == 1:
        return embedder.embed(texts)
    found, failure = np.zeros((0, 0), np.float32), ""
    try:
        found = embedder.embed(texts) if processes.is_main() else found
    except InputError as error:
        failure = str(error)
    failure, width = processes.gather([failure, found.shape[1]])[0]
    if failure:
        raise InputError(failure)
    return np.asarray(processes.broadcast(found if processes.is_main() else np.zeros((len(texts), width), np.float32)))


def _batches(texts: list[str], size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _distinct(texts: Sequence[str], batch_size: int) -> list[str]:
    check_whole("batch_size", batch_size, 1)
    check_texts(texts)
    return list(dict.fromkeys(texts))
