"""One sequence a row: greedy decoding, and sampling with temperature, top-k and top-p."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v2t_jax.decode.state import EOS, PAD, START, Cache, Decoded, TokensToLogits, check_arguments
from v2t_jax.errors import InputError

Choose = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [B, V], index []) -> ids [B] int32


class _Loop(NamedTuple):
    position: jax.Array  # [] tokens generated so far
    tokens: jax.Array  # [B, 1 + L] start id, generated tokens, pads
    log_probs: jax.Array  # [B]
    finished: jax.Array  # [B] an end of sequence was generated
    cache: Cache


def greedy(tokens_to_logits: TokensToLogits, cache: Cache, *, batch_size: int, max_length: int) -> Decoded:
    """Takes the most likely token at every step; of equals, the one with the lowest id.

    Args:
        cache: the state of `tokens_to_logits` before the first step, leading axis B on every leaf.
        batch_size: B.
        max_length: L, generated tokens at most, end of sequence included, start id not.

    Returns:
        `Decoded` with ids [B, L] and log_probs [B]. A row that has not ended at L is returned as it is.
    """
    return _decode(lambda logits, index: first_argmax(logits), tokens_to_logits, cache, batch_size, max_length)


def sample(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    *,
    batch_size: int,
    max_length: int,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Decoded:
    """Draws every token from the model's distribution, sharpened and truncated; else like `greedy`.

    Logits are divided by `temperature`, cut to the `top_k` best (0: all), then to the smallest set with mass `top_p`
    (1: all). What a row draws depends on `key`, its row number and the position only, so rows appended to a batch don't
    change the others. `log_probs` is the untempered, untruncated model's.
    """
    if not temperature > 0:
        raise InputError(f"temperature is {temperature}; it must be above 0 (0 would be greedy decoding).")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; give a number of tokens, or 0 for all of them.")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; it must be above 0 and at most 1.")
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))

    def choose(logits: jax.Array, index: jax.Array) -> jax.Array:
        logits = logits / temperature
        logits = keep_top_k(logits, top_k) if top_k > 0 else logits
        logits = keep_top_p(logits, top_p) if top_p < 1.0 else logits
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, index)
        return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)

    return _decode(choose, tokens_to_logits, cache, batch_size, max_length)


def _decode(
    choose: Choose, tokens_to_logits: TokensToLogits, cache: Cache, batch_size: int, max_length: int
) -> Decoded:
    """The loop of both: ask for logits, choose, write down; until all rows have ended or are full."""
    check_arguments(cache, rows=batch_size, max_length=max_length)
    tokens = jnp.full((batch_size, 1 + max_length), PAD, jnp.int32).at[:, 0].set(START)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.position < max_length) & ~jnp.all(loop.finished)

    def step(loop: _Loop) -> _Loop:
        last = jax.lax.dynamic_index_in_dim(loop.tokens, loop.position, axis=1, keepdims=False)
        logits, new_cache = tokens_to_logits(last, loop.cache, loop.position)
        logits = logits.astype(jnp.float32)
        chosen = choose(logits, loop.position)
        log_p = log_softmax_at(logits, chosen[:, None])[:, 0]
        chosen = jnp.where(loop.finished, PAD, chosen)
        return _Loop(
            position=loop.position + 1,
            tokens=jax.lax.dynamic_update_index_in_dim(loop.tokens, chosen, loop.position + 1, axis=1),
            log_probs=loop.log_probs + jnp.where(loop.finished, 0.0, log_p),
            finished=loop.finished | (chosen == EOS),
            cache=new_cache,
        )

    start = _Loop(jnp.int32(0), tokens, jnp.zeros(batch_size), jnp.zeros(batch_size, bool), cache)
    end = jax.lax.while_loop(unfinished, step, start)
    return Decoded(ids=end.tokens[:, 1:], log_probs=end.log_probs)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Sets all but the `k` best tokens of each row of [rows, V] to -inf; tokens level with the k-th stay."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Nucleus sampling (Holtzman et al. 2020, section 3.1): keeps the smallest set of best tokens with mass >= p.

    The best token always stays, and so do tokens level with the last one kept.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (mass_before < p) | (jnp.arange(logits.shape[-1])[None, :] == 0)
    cutoff = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < cutoff, -jnp.inf, logits)


def log_softmax_at(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """log p [rows, N] of the tokens `ids` [rows, N] under `logits` [rows, V], without another array of V columns."""
    # The maximum is taken off first: `logit - logsumexp` would lose the digits of a log p near 0 when logits are large.
    best = jnp.max(logits, axis=-1, keepdims=True)
    shifted = jnp.take_along_axis(logits, ids, axis=-1) - best
    return shifted - jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))


def first_argmax(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` of each row, 3 to 4 times as fast on CPUs: XLA doesn't vectorize its two-operand reduction there."""
    size = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    positions = jnp.where(logits == best, jnp.arange(size, dtype=jnp.int32)[None, :], size)
    return jnp.minimum(jnp.min(positions, axis=-1), size - 1)  # all NaN: still a valid id
