"""What every decoder takes and gives: the step function, the special ids, the result.

Lengths. `max_length` and `min_length` count *generated* tokens: the decoder start id is not one of them, the
end of sequence is. Hugging Face's `max_length` counts the start id too, so theirs is one more than ours; our
`min_length = n` (n tokens before an end of sequence is allowed) is their `min_new_tokens = n`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from v2t_jax.errors import InputError

Cache = Any
"""A pytree of arrays, each with `rows` as its leading axis; its structure, shapes and dtypes never change."""

TokensToLogits = Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]
"""`(ids [rows] int32, cache, index [] int32) -> (logits [rows, V], cache)`.

`ids` are the tokens before position `index` (the start id at index 0) and the logits are for position
`index`.
"""


class Special(NamedTuple):
    """The ids with a meaning of their own."""

    start: int
    eos: int
    pad: int


class Decoded(NamedTuple):
    """Generated token ids and how likely the model found them.

    `log_probs` is the plain sum of the model's own log p of the generated tokens, end of sequence included:
    before temperature, truncation, bans or length penalty, so that every decoder's figures compare.
    """

    ids: jax.Array  # [B, L] or [B, K, L] int32, without the start id, pad after the end of sequence
    log_probs: jax.Array  # [B] or [B, K] float32


def count_tokens(ids: jax.Array, eos: int) -> jax.Array:
    """Number of generated tokens, int32 [...], in `ids` [..., L]: to the first `eos`, counted too, or L."""
    ended_before = jnp.cumsum(ids == eos, axis=-1) - (ids == eos) > 0
    return jnp.sum(~ended_before, axis=-1, dtype=jnp.int32)


def check_arguments(cache: Cache, *, rows: int, max_length: int, min_length: int, no_repeat_ngram: int) -> None:
    """Refuse what no decoder can work with.

    Raises:
        InputError: a limit is out of range.
        ValueError: a cache leaf does not have `rows` as its leading axis (a fault of the calling code).
    """
    if max_length < 1:
        raise InputError(f"max_length is {max_length}; it counts generated tokens and must be at least 1.")
    if not 0 <= min_length <= max_length:
        raise InputError(f"min_length is {min_length}; choose one from 0 to max_length, {max_length}.")
    if no_repeat_ngram < 0:
        raise InputError(f"no_repeat_ngram is {no_repeat_ngram}; give an n-gram size, or 0 for none.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        if leaf.ndim == 0 or leaf.shape[0] != rows:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"cache leaf {name} has shape {leaf.shape}; its leading axis must be {rows} rows")
