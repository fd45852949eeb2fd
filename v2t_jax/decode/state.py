"""What every decoder takes and gives: the step function, the special ids, the result.

`max_length` counts *generated* tokens: the decoder's start id is not one of them, the end of sequence is. Hugging
Face's `max_length` counts the start id too: theirs is one more than ours.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from v2t_jax.errors import InputError

# Token ids with a meaning, as in T5: every model's vocabulary has them.
PAD, EOS, START = 0, 1, 0

Cache = Any
"""A pytree of arrays, each with `rows` as its leading axis, or `WrittenCache`; shapes and dtypes never change."""


class WrittenCache(NamedTuple):
    """A cache that stays where it was written while hypotheses move: what each beam of an item wrote, and who wrote.

    To copy keys and values to the hypotheses that go on would be 40% of the time of beam search.
    """

    written: Any  # pytree of arrays with B as their leading axis
    ancestors: jax.Array  # [B * K, L] int32: of each row's hypothesis, the beam that wrote each position so far


TokensToLogits = Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]
"""`(ids [rows] int32, cache, index [] int32) -> (logits [rows, V], cache)`.

`ids` are the tokens before position `index` (the start id at index 0) and the logits are for position `index`.
"""


class Decoded(NamedTuple):
    ids: jax.Array  # [B, L] or [B, K, L] int32, without the start id, pad after the end of sequence
    log_probs: jax.Array  # [B] or [B, K], sums of the model's own log p, before temperature, truncation or penalty


def count_tokens(ids: jax.Array) -> jax.Array:
    """Number of generated tokens, int32 [...], in `ids` [..., L]: to the first end of sequence, counted too, or L."""
    return jnp.sum(~_after_eos(ids), axis=-1, dtype=jnp.int32)


def truncate_after_eos(ids: jax.Array) -> jax.Array:
    """`ids` [..., L] with pads behind the first end of sequence."""
    return jnp.where(_after_eos(ids), PAD, ids)


def arranged(tokens: jax.Array, place: jax.Array, length: int) -> jax.Array:
    """The text of `tokens` [..., S] in the order of `place` [..., S], without pads: [..., length], its end included."""
    order = jnp.argsort(jnp.where(tokens > EOS, place, jnp.inf), axis=-1)[..., : length - 1]
    texts = jnp.take_along_axis(jnp.where(tokens > EOS, tokens, PAD), order, axis=-1)
    texts = jnp.pad(texts, [(0, 0)] * (texts.ndim - 1) + [(0, length - texts.shape[-1])])
    end = jnp.sum(texts > EOS, axis=-1, keepdims=True)
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, texts.shape, texts.ndim - 1) == end, EOS, texts)


def _after_eos(ids: jax.Array) -> jax.Array:
    return jnp.cumsum(ids == EOS, axis=-1) - (ids == EOS) > 0


def check_arguments(cache: Cache, *, rows: int, max_length: int) -> None:
    """Refuses a `max_length` below 1, and a cache without `rows` as its leading axis (a fault of the calling code)."""
    if max_length < 1:
        raise InputError(f"max_length is {max_length}; it counts generated tokens and must be at least 1.")
    moved = cache.ancestors if isinstance(cache, WrittenCache) else cache
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        if leaf.ndim == 0 or leaf.shape[0] != rows:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"cache leaf {name} has shape {leaf.shape}; its leading axis must be {rows} rows")
