"""From inside the compiled correction loop to what lives on the host, by one batched callback a step.

The way from hypothesis to embedding where the two don't share a vocabulary: back to text and to the embedder's own
tokens (`host_bridge`), or to an embedder that isn't JAX at all (`host_embedder`). What goes wrong there reaches the
caller as it was raised where the loop is run in `host_errors`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Answer = TypeVar("Answer")


def host_bridge(
    host_fn: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], embedder_length: int
) -> Callable[[Array], tuple[Array, Array]]:
    """The way to an embedder with another vocabulary, from inside the compiled loop: ids -> text -> its ids.

    Args:
        host_fn: model ids [rows, L] int32 -> (embedder ids [rows, M], mask [rows, M]), numpy in and out. It
            gets a whole batch at once, must depend on nothing but its argument, and must not call jax: on a
            CPU the device waits for it, and a computation started in it may wait for that device.
        embedder_length: M, the fixed length of what host_fn returns.

    Returns:
        A function of ids [rows, L] for use under jit, giving int32 ids and mask [rows, M].
    """

    def on_host(ids: Array) -> tuple[np.ndarray, np.ndarray]:
        embedder_ids, mask = _kept(host_fn, ids)
        return np.asarray(embedder_ids, np.int32), np.asarray(mask, np.int32)

    def bridge(ids: Array) -> tuple[Array, Array]:
        shape = jax.ShapeDtypeStruct((ids.shape[0], embedder_length), jnp.int32)
        return jax.pure_callback(on_host, (shape, shape), ids)

    return bridge


def host_embedder(host_fn: Callable[[np.ndarray], np.ndarray], width: int) -> Callable[[Array], Array]:
    """The way to a black-box embedder (an API, another framework) from inside the compiled loop.

    Args:
        host_fn: model ids [rows, L] int32 -> embeddings [rows, E]; the rules of `host_bridge` hold.
        width: E.

    Returns:
        A function of ids [rows, L] for use under jit, giving float32 [rows, E].
    """

    def on_host(ids: Array) -> np.ndarray:
        return np.asarray(_kept(host_fn, ids), np.float32)

    def embed(ids: Array) -> Array:
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((ids.shape[0], width), jnp.float32), ids)

    return embed


class _HostError(Exception):
    """Stands in for what was raised: of an exception, only the text comes through the compiled program."""

    def __init__(self, error: BaseException) -> None:
        self.mark = f"host error {next(_marks)}"
        super().__init__(f"{self.mark}: {type(error).__name__}: {error}")


_marks = itertools.count(1)
_raised: dict[str, BaseException] = {}  # by mark, in the order of raising
_MOST_KEPT = 8  # those that nobody asks for go


def _kept(host_fn: Callable[[np.ndarray], Answer], ids: Array) -> Answer:
    """Calls a host function; what it raises is kept for `host_errors`."""
    try:
        return host_fn(np.asarray(ids, np.int32))
    except BaseException as error:  # Ctrl-C too: JAX would make an ordinary error of it
        stand_in = _HostError(error)
        _raised[stand_in.mark] = error
        for mark in [*_raised][:-_MOST_KEPT]:
            _raised.pop(mark, None)
        raise stand_in from error


@contextmanager
def host_errors() -> Iterator[None]:
    """Around a run of a program over the host: what a host function raised is raised here, as itself.

    Without it, such an error (an `InputError` of an embedder, Ctrl-C) arrives as one of JAX's, with a traceback in its
    text and in the log. The program's results must be waited for inside.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], _HostError))

    logger = logging.getLogger("jax._src.callback")
    logger.addFilter(is_other)
    try:
        yield
    except Exception as error:  # which class it is depends on JAX's version and on the device
        text = str(error)
        found = next((mark for mark in _raised if f"{mark}:" in text), None)
        if found is None:
            raise
        raise _raised.pop(found) from None
    finally:
        logger.removeFilter(is_other)
