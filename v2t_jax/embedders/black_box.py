"""Embedders that can only be asked: any Python callable, any OpenAI-compatible endpoint.

Both are `TextEmbedder`s (embedders/base.py). Nothing here calls jax, so both may be asked from inside the compiled
correction loop (inversion/host_callback.py). Every answer is checked before it is used.
"""

from __future__ import annotations

import hashlib
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from v2t_jax import progress
from v2t_jax.config import ApiConfig
from v2t_jax.embedders.base import EmbedderIdentity
from v2t_jax.embedders.http import Endpoint, approximate_tokens, dollars
from v2t_jax.embedders.vector_cache import VectorCache
from v2t_jax.errors import InputError, as_numpy, check_texts, check_whole
from v2t_jax.parallel.compile_cache import user_cache_dir

PROBE = "width"  # the text that is embedded where only the vectors' width or length is asked for
UNIT_TOLERANCE = 1e-2  # of a length of 1: vectors may come rounded to half precision


class BlackBox(ABC):
    """What all of them share: texts are checked, each distinct one is asked for once, answers are checked.

    Attributes:
        name: for people, and in a model's record.
        weights_sha256: empty: nobody sees the weights.
    """

    def __init__(self, name: str, width: int | None, normalized: bool | None) -> None:
        if width is not None:
            check_whole(f"The width of {name}", width, 1)
        self.name, self.weights_sha256 = name, ""
        self.identity = EmbedderIdentity(name, width=width)  # not what is learned later: records would change under way
        self._width, self._normalized = width, normalized
        self._learning = threading.Lock()

    @property
    def width(self) -> int:
        """E; where it isn't known yet, one short text is embedded to learn it."""
        if self._width is None:
            self.embed([PROBE])
            assert self._width is not None
        return self._width

    @property
    def normalized(self) -> bool:
        """Whether its vectors have length 1; learnt as the width is, unless it was given."""
        if self._normalized is None:
            self.embed([PROBE])
            assert self._normalized is not None
        return self._normalized

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Embeddings [len(texts), E] float32; equal texts are asked for once.

        Args:
            batch_size: texts in one call or request.

        Raises:
            InputError: a text is blank or no valid Unicode, or an answer is not one usable vector a text.
        """
        distinct = _distinct(texts, batch_size)
        if not distinct:
            return np.zeros((0, self.width), np.float32)
        index = {text: i for i, text in enumerate(distinct)}
        return self._embed(distinct, batch_size)[[index[text] for text in texts]]

    @abstractmethod
    def _embed(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Embeddings of distinct, checked texts."""

    def _checked(self, answer: Any, rows: int) -> np.ndarray:
        """An answer as float32 [rows, E], held against all earlier ones.

        Raises:
            InputError: see `embed`.
        """
        vectors = _as_array(answer, self.name)
        if vectors.ndim != 2 or len(vectors) != rows or vectors.shape[1] == 0:
            raise InputError(
                f"{self.name} answered {rows} texts with an array of shape {vectors.shape}; it must be [{rows}, width]."
            )
        if not np.isfinite(vectors).all():
            raise InputError(f"{self.name} answered with NaN or infinite values; mend it before it is used.")
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        if not lengths.all():
            raise InputError(f"{self.name} answered with a vector of zeros, which says nothing of its text.")
        with self._learning:
            if self._width not in (None, vectors.shape[1]):
                raise InputError(
                    f"{self.name} answered with vectors {vectors.shape[1]} wide, where {self._width} is expected; "
                    "make sure that it is the same embedder throughout."
                )
            unit = bool((np.abs(lengths - 1) <= UNIT_TOLERANCE).all())
            if self._normalized and not unit:
                raise InputError(
                    f"{self.name} is taken for normalized, but answered with a vector that isn't of length 1; "
                    "use one setting of it, or say that it is not normalized."
                )
            self._width = vectors.shape[1]
            self._normalized = unit if self._normalized is None else self._normalized
        return vectors


class CallableEmbedder(BlackBox):
    """Any Python callable that embeds: `CallableEmbedder(model.encode, name="our encoder")`.

    Args:
        fn: list of texts -> array [texts, E]: of numpy, JAX, torch, or nested lists. It must depend on nothing but the
            texts. To be used in the correction loop it must not run JAX: the device waits for it there.
        name: by default the function's own.
        width: E; by default learnt from the first answer.
        normalized: whether its vectors have length 1; by default learnt from the first answer.
    """

    def __init__(
        self,
        fn: Callable[[list[str]], Any],
        name: str | None = None,
        width: int | None = None,
        normalized: bool | None = None,
    ) -> None:
        if not callable(fn):
            raise InputError(f"An embedder must be a function of a list of texts, not {type(fn).__name__}.")
        super().__init__(name or str(getattr(fn, "__name__", type(fn).__name__)), width, normalized)
        self._fn = fn

    def _embed(self, texts: list[str], batch_size: int) -> np.ndarray:
        parts = []
        with progress.bar(len(texts), f"embedding with {self.name}", unit="texts") as update:
            for start in range(0, len(texts), batch_size):
                batch = texts[start : start + batch_size]
                parts.append(self._checked(self._fn(list(batch)), len(batch)))
                update(start + len(batch))
        return np.concatenate(parts)


class Plan(NamedTuple):
    """What a call would ask of an endpoint, before anything is asked."""

    texts: int  # distinct ones
    cached: int
    requests: int
    tokens: int  # about
    cost: float | None  # dollars, about; None without a price

    def __str__(self) -> str:
        if not self.requests:
            return f"all of {self.texts:,} distinct texts are cached, nothing is asked"
        parts = [f"{self.texts:,} distinct texts", f"{self.cached:,} cached", f"{self.requests:,} requests"]
        parts.append(f"about {self.tokens:,} tokens")
        if self.cost is not None:
            parts.append(f"about {dollars(self.cost)}")
        return ", ".join(parts)


class HttpEmbedder(BlackBox):
    """An OpenAI-compatible endpoint, `POST base_url/embeddings`.

    What was answered is kept on disk as it arrives, by endpoint, model, dimensions and the sha256 of the text (not the
    text), so that a run that was interrupted pays for nothing twice; one that was killed, at most for the requests that
    were under way. Limits hold for the life of the object.

    Args:
        base_url: such as https://api.openai.com/v1
        config: the model, limits and manners.
        width, normalized: as for `CallableEmbedder`.

    Raises:
        InputError: the URL, the key or the model's name can't be used.
    """

    def __init__(
        self, base_url: str, config: ApiConfig, width: int | None = None, normalized: bool | None = None
    ) -> None:
        self._endpoint = Endpoint(base_url, config)
        super().__init__(self._endpoint.name, width or config.dimensions, normalized)
        self.config = config
        self.budget = self._endpoint.budget
        folder = Path(config.cache) if config.cache else user_cache_dir() / "embeddings"
        # Readable where it can be, distinct in any case.
        readable = re.sub(r"[^\w.-]+", "_", config.model)[:60]
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:12]
        self.cache_file = folder / f"{readable}-{digest}.sqlite"
        self._announced = -1

    def plan(self, texts: Sequence[str], batch_size: int = 64) -> Plan:
        """What `embed` with the same arguments would ask and about cost; asks nothing."""
        distinct = _distinct(texts, batch_size)
        with closing(VectorCache(self.cache_file)) as cache:
            missing = [text for text, vector in zip(distinct, cache.read(distinct), strict=True) if vector is None]
        return self._plan(len(distinct), missing, batch_size)

    def _plan(self, distinct: int, missing: list[str], batch_size: int) -> Plan:
        tokens = sum(map(approximate_tokens, missing))
        return Plan(
            distinct, distinct - len(missing), -(-len(missing) // batch_size), tokens, self.budget.cost_of(tokens)
        )

    def _embed(self, texts: list[str], batch_size: int) -> np.ndarray:
        with closing(VectorCache(self.cache_file)) as cache:
            found = cache.read(texts)
            known = [vector for vector in found if vector is not None]
            if known:
                try:
                    self._checked(known, len(known))
                except InputError as error:
                    raise InputError(
                        f"The vectors in {self.cache_file} don't fit ({str(error).rstrip('.')}); delete that file, "
                        "and they are asked for again."
                    ) from None
            missing = [i for i, vector in enumerate(found) if vector is None]
            plan = self._plan(len(texts), [texts[i] for i in missing], batch_size)
            self.budget.check_plan(plan.requests, plan.tokens, self.name)
            # The correction loop calls once a step: then only what doubles the sum is worth another line.
            if self.budget.requests + plan.requests > 2 * self._announced:
                self._announced = self.budget.requests + plan.requests
                how = f"{self.budget.limits()}; {self._endpoint.key_note()}" if missing else ""
                progress.note(f"{self.name}: {plan}{how}")
            if missing:
                self._ask(texts, missing, found, batch_size, cache)
        return np.stack([vector for vector in found if vector is not None])

    def _ask(
        self, texts: list[str], missing: list[int], found: list[np.ndarray | None], batch_size: int, cache: VectorCache
    ) -> None:
        """Fills in what is missing of `found`."""
        stop = threading.Event()
        failures: list[BaseException] = []

        def ask(rows: list[int]) -> list[int]:
            batch = [texts[i] for i in rows]
            try:
                vectors = self._endpoint.ask(batch, lambda answer: self._checked(answer, len(batch)), stop, show)
                cache.write(batch, vectors)  # at once: it has been paid for
            except BaseException as error:
                failures.append(error)  # before the others are stopped, so that the cause comes first
                stop.set()
                raise
            for i, vector in zip(rows, vectors, strict=True):
                found[i] = vector
            return rows

        batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
        done = len(texts) - len(missing)
        with progress.bar(len(texts), f"embedding with {self.name}", unit="texts", start=done) as update:

            def show() -> None:
                update(done, **self._endpoint.troubles())

            pool = ThreadPoolExecutor(min(self.config.concurrency, len(batches)), "embed")
            try:
                for future in as_completed([pool.submit(ask, rows) for rows in batches]):
                    if failures:
                        raise failures[0]
                    done += len(future.result())
                    show()
            except KeyboardInterrupt:
                progress.note(f"stopping after the requests under way; what was answered is kept in {self.cache_file}")
                raise
            finally:
                # No new requests; those under way are paid for, so their answers are waited for and kept.
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)


def _distinct(texts: Sequence[str], batch_size: int) -> list[str]:
    """Each text once, after a look at what was given."""
    check_whole("batch_size", batch_size, 1)
    check_texts(texts)
    return list(dict.fromkeys(texts))


def _as_array(answer: Any, name: str) -> np.ndarray:
    """Whatever holds numbers, as float32."""
    try:
        array = as_numpy(answer)
        if array.dtype.kind not in "fiuV":  # V: bfloat16 and its like, which numpy knows from ml_dtypes
            raise TypeError(f"they are of type {array.dtype}")
        with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is refused as such
            return array.astype(np.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # RuntimeError: torch's
        raise InputError(f"{name} answered with something else than rows of numbers of one length ({error}).") from None
