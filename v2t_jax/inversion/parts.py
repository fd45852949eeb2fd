"""Batches that are worked on part by part, without the rows that are done."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class AtOnce(NamedTuple):
    """Texts that a device works on at a time. A CPU is as fast with few, which stay in its caches."""

    cpu: int
    elsewhere: int

    def rows(self, texts_each: int) -> int:
        """Rows with so many texts each: a power of two, as sizes of batches are."""
        texts = self.cpu if jax.default_backend() == "cpu" else self.elsewhere
        return 1 << max(texts // texts_each, 1).bit_length() - 1


CORRECTED, EDITED, EMBEDDED = AtOnce(64, 4096), AtOnce(1, 1024), AtOnce(16, 256)


def by_parts(expand: Callable[..., Any], rows: int | None, devices: int, done: Array, given: Any, state: Any) -> Any:
    """`expand(given, state)`, a new state, for `rows` rows of each of the devices they lie on at a time.

    The rows that are done [B] come last, so that most of them cost nothing: what has them alone stays as it is. All are
    expanded at once if `rows` is None or divides no device's share.

    Args:
        given, state: pytrees of arrays [B, ...].
    """
    each = len(done) // devices
    if rows is None or len(done) % devices or each <= rows or each % rows:
        return expand(given, state)
    order = jnp.argsort(done.reshape(devices, each), axis=1)  # stable

    def arranged(x: Array, order: Array) -> Array:
        return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)

    def split(x: Array) -> Array:
        x = arranged(x.reshape(devices, each, *x.shape[1:]), order)
        x = x.reshape(devices, each // rows, rows, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(each // rows, devices * rows, *x.shape[3:])

    def joined(x: Array) -> Array:
        x = x.reshape(each // rows, devices, rows, *x.shape[2:]).swapaxes(0, 1).reshape(devices, each, *x.shape[2:])
        return arranged(x, jnp.argsort(order, axis=1)).reshape(-1, *x.shape[2:])

    def part(parts: tuple[Array, Any, Any]) -> Any:
        done, given, state = parts
        return lax.cond(jnp.all(done), lambda given, state: state, expand, given, state)

    return jax.tree.map(joined, lax.map(part, jax.tree.map(split, (done, given, state))))
