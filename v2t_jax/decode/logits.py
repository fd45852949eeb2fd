"""Rules that change the scores of one step's tokens: bans shared by all decoders, and truncation for
sampling.

`tokens` [rows, 1 + L] is the history: the start id, the `index` tokens generated so far, then padding. The
step chooses the token that goes to column `index + 1`. A banned token's score is -inf; nothing is
renormalized, so bans never change the log p of the tokens that remain (as in Hugging Face's beam search).
"""

import jax
import jax.numpy as jnp


def ban_tokens(
    logits: jax.Array, tokens: jax.Array, index: jax.Array, *, eos: int, min_length: int, no_repeat_ngram: int
) -> jax.Array:
    """Apply the bans that are switched on: an early end of sequence, and repeated n-grams.

    Args:
        logits: [rows, V] float32.
        tokens: [rows, 1 + L] int32, the history.
        index: [] int32, how many tokens have been generated.
        eos: the end-of-sequence id.
        min_length: that many tokens come before an end of sequence; 0 switches the rule off.
        no_repeat_ngram: no n-gram of this size occurs twice; 0 switches the rule off.

    Returns:
        [rows, V] float32, -inf where banned.
    """
    if no_repeat_ngram > 0:
        logits = ban_repeated_ngrams(logits, tokens, index, no_repeat_ngram)
    if min_length > 0:
        is_eos = jnp.arange(logits.shape[-1])[None, :] == eos
        logits = jnp.where(is_eos & (index < min_length), -jnp.inf, logits)
    return logits


def ban_repeated_ngrams(logits: jax.Array, tokens: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Ban every token that would complete an n-gram of `size` tokens already in the history.

    The start id is part of the history, as in Hugging Face's rule: with `size` 1 it is itself banned.
    """
    rows, width = tokens.shape
    num_windows = width - size + 1
    if num_windows < 1:
        return logits
    length = index + 1  # tokens in the history, start id included
    suffix = jax.lax.dynamic_slice_in_dim(tokens, length - (size - 1), size - 1, axis=1)
    # A window counts only if it lies wholly in the history. When the history is shorter than the suffix, the
    # slice above is clamped and meaningless, but then no window counts either.
    starts = jnp.arange(num_windows)[None, :]
    repeats = jnp.broadcast_to(starts + size <= length, (rows, num_windows))
    for offset in range(size - 1):
        repeats &= tokens[:, offset : offset + num_windows] == suffix[:, offset : offset + 1]
    last = tokens[:, size - 1 :]
    # Windows that don't match are sent to an index past the vocabulary, which the scatter drops.
    banned = jnp.where(repeats, last, logits.shape[-1])
    return logits.at[jnp.arange(rows)[:, None], banned].set(-jnp.inf, mode="drop")


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Ban all but the `k` best tokens of each row of [rows, V]; tokens level with the k-th stay."""
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Nucleus sampling (Holtzman et al. 2020, section 3.1): keep the smallest set of best tokens with mass >=
    p.

    The best token always stays, and so do tokens level with the last one kept.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    is_best = jnp.arange(logits.shape[-1])[None, :] == 0
    kept = (mass_before < p) | is_best
    cutoff = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < cutoff, -jnp.inf, logits)


def log_softmax_at(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """log p [rows, N] of the tokens `ids` [rows, N] under `logits` [rows, V].

    A whole log-softmax would be another array of V columns. The maximum is taken off first: `logit - logsumexp`
    would lose the digits of a log p near 0 when logits are large.
    """
    best = jnp.max(logits, axis=-1, keepdims=True)
    shifted = jnp.take_along_axis(logits, ids, axis=-1) - best
    return shifted - jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))


def first_argmax(logits: jax.Array) -> jax.Array:
    """Index [rows] int32 of each row's largest logit, the first of several.

    The same as `jnp.argmax`, whose two-operand reduction XLA does not vectorise on a CPU: three to four times
    slower there at a T5 vocabulary's width.
    """
    size = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    positions = jnp.where(logits == best, jnp.arange(size, dtype=jnp.int32)[None, :], size)
    return jnp.minimum(jnp.min(positions, axis=-1), size - 1)  # all NaN: still a valid id
