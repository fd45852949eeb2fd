"""One sequence a row: greedy decoding, and sampling with temperature, top-k and top-p."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v2t_jax.decode.logits import ban_tokens, first_argmax, keep_top_k, keep_top_p, log_softmax_at
from v2t_jax.decode.state import Cache, Decoded, Special, TokensToLogits, check_arguments
from v2t_jax.errors import InputError

Choose = Callable[[jax.Array, jax.Array], jax.Array]  # (allowed logits [B, V], index []) -> ids [B] int32


class _Loop(NamedTuple):
    position: jax.Array  # [] tokens generated so far
    tokens: jax.Array  # [B, 1 + L] start id, generated tokens, pads
    log_probs: jax.Array  # [B]
    finished: jax.Array  # [B] an end of sequence was generated
    cache: Cache


def greedy(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    *,
    batch_size: int,
    max_length: int,
    special: Special,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
) -> Decoded:
    """Take the most likely token at every step; of equals, the one with the lowest id.

    Args:
        tokens_to_logits: the step function, see `TokensToLogits`.
        cache: its state before the first step, leading axis B on every leaf.
        batch_size: B.
        max_length: L, generated tokens at most, end of sequence included, start id not.
        special: start, end-of-sequence and padding ids.
        min_length: tokens before an end of sequence is allowed.
        no_repeat_ngram: size of n-grams that must not repeat, or 0.

    Returns:
        `Decoded` with ids [B, L] and log_probs [B]. A row that has not ended at L is returned as it is.

    Raises:
        InputError: a limit is out of range.
    """
    return _decode(
        lambda allowed, index: first_argmax(allowed),
        tokens_to_logits,
        cache,
        batch_size=batch_size,
        max_length=max_length,
        special=special,
        min_length=min_length,
        no_repeat_ngram=no_repeat_ngram,
    )


def sample(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    *,
    batch_size: int,
    max_length: int,
    special: Special,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
) -> Decoded:
    """Draw every token from the model's distribution, sharpened and truncated in this order.

    Logits are divided by `temperature`, cut to the `top_k` best (0: all), then to the smallest set with mass
    `top_p` (1: all). What a row draws depends on `key`, its row number and the position only, so rows
    appended to a batch don't change the others. The other arguments and the result are those of `greedy`;
    `log_probs` is the untempered, untruncated model's.

    Raises:
        InputError: a limit, `temperature`, `top_k` or `top_p` is out of range.
    """
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; it must be above 0 (0 would be greedy decoding).")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; give a number of tokens, or 0 for all of them.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))

    def choose(allowed: jax.Array, index: jax.Array) -> jax.Array:
        logits = allowed / temperature
        if top_k > 0:
            logits = keep_top_k(logits, top_k)
        if top_p < 1.0:
            logits = keep_top_p(logits, top_p)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, index)
        return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)

    return _decode(
        choose,
        tokens_to_logits,
        cache,
        batch_size=batch_size,
        max_length=max_length,
        special=special,
        min_length=min_length,
        no_repeat_ngram=no_repeat_ngram,
    )


def _decode(
    choose: Choose,
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    *,
    batch_size: int,
    max_length: int,
    special: Special,
    min_length: int,
    no_repeat_ngram: int,
) -> Decoded:
    """The loop of both: ask for logits, ban, choose, write down; until all rows have ended or are full."""
    check_arguments(
        cache, rows=batch_size, max_length=max_length, min_length=min_length, no_repeat_ngram=no_repeat_ngram
    )
    tokens = jnp.full((batch_size, 1 + max_length), special.pad, jnp.int32).at[:, 0].set(special.start)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.position < max_length) & ~jnp.all(loop.finished)

    def step(loop: _Loop) -> _Loop:
        last = jax.lax.dynamic_index_in_dim(loop.tokens, loop.position, axis=1, keepdims=False)
        logits, new_cache = tokens_to_logits(last, loop.cache, loop.position)
        logits = logits.astype(jnp.float32)
        allowed = ban_tokens(
            logits,
            loop.tokens,
            loop.position,
            eos=special.eos,
            min_length=min_length,
            no_repeat_ngram=no_repeat_ngram,
        )
        chosen = choose(allowed, loop.position)
        log_p = log_softmax_at(logits, chosen[:, None])[:, 0]
        chosen = jnp.where(loop.finished, special.pad, chosen)
        return _Loop(
            position=loop.position + 1,
            tokens=jax.lax.dynamic_update_index_in_dim(loop.tokens, chosen, loop.position + 1, axis=1),
            log_probs=loop.log_probs + jnp.where(loop.finished, 0.0, log_p),
            finished=loop.finished | (chosen == special.eos),
            cache=new_cache,
        )

    end = jax.lax.while_loop(
        unfinished,
        step,
        _Loop(
            position=jnp.int32(0),
            tokens=tokens,
            log_probs=jnp.zeros(batch_size, jnp.float32),
            finished=jnp.zeros(batch_size, bool),
            cache=cache,
        ),
    )
    return Decoded(ids=end.tokens[:, 1:], log_probs=end.log_probs)
