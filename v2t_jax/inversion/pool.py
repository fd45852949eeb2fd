"""Pools of hypotheses, from which the correction loop takes the nearest that differ."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Pool(NamedTuple):
    """P hypotheses of each target; one of similarity -inf only fills the shape and is never expanded."""

    ids: Array  # [B, P, L] int32, pad after end
    embedding: Array  # [B, P, E] float32
    similarity: Array  # [B, P] float32
    expanded: Array  # [B, P] bool, its candidates have been made


def nothing_ranked(pool: Pool) -> Array:
    """[B]: no candidate of a row has an embedding."""
    return jnp.all(pool.similarity == -jnp.inf, axis=1)


def keep_distinct(pool: Pool, width: int) -> Pool:
    """The `width` best distinct hypotheses of each pool, the first among equals; then fillers: the best, with -inf."""
    present = pool.similarity > -jnp.inf
    duplicate = repeats(pool.ids, present)
    size = min(width, pool.ids.shape[1])
    top, index = lax.top_k(jnp.where(present & ~duplicate, pool.similarity, -jnp.inf), size)
    missing = ((0, 0), (0, width - size))
    top, index = jnp.pad(top, missing, constant_values=-jnp.inf), jnp.pad(index, missing)
    filler = (top == -jnp.inf) & (jnp.arange(width) > 0)[None]
    kept = take(pool, jnp.where(filler, index[:, :1], index))
    return kept._replace(similarity=jnp.where(filler, -jnp.inf, kept.similarity))


def first_equals(ids: Array, present: Array) -> Array:
    """[B, P]: where the first that is `present` and equal stands, of ids [B, P, L]; without one, any that is equal."""
    weights = jnp.asarray(np.random.default_rng(0).integers(1, 1 << 32, ids.shape[-1], np.uint32) | np.uint32(1))
    hashes = jnp.sum(ids.astype(jnp.uint32) * weights[None, None], axis=-1)
    order = jnp.lexsort((~present, hashes))  # stable, and equals adjoin
    in_order = jnp.take_along_axis(ids, order[..., None], axis=1)
    differs = jnp.pad(jnp.any(in_order[:, 1:] != in_order[:, :-1], axis=-1), ((0, 0), (1, 0)), constant_values=True)
    begins = lax.cummax(jnp.where(differs, jnp.arange(ids.shape[1])[None], 0), axis=1)
    return jnp.take_along_axis(jnp.take_along_axis(order, begins, axis=1), jnp.argsort(order), axis=1)


def repeats(ids: Array, present: Array) -> Array:
    """[B, P]: which of ids [B, P, L] equal one before them that is `present`."""
    return first_equals(ids, present) != jnp.arange(ids.shape[1])[None]


def take(pool: Pool, index: Array) -> Pool:
    return Pool(*(jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1) for x in pool))
