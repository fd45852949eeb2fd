"""Beam search with the semantics of Hugging Face's `generate`, K beams an item, in one while loop.

Each step grows the K running hypotheses of an item by every token and looks at the 2K best results, of which at most K
end (one per parent), so that K can always go on. Those that end *among the best K*, or at `max_length`, compete for the
item's K finished slots by the mean log p of their tokens, the end of sequence included. An item is done when its slots
are full and the best running hypothesis would not win one if it ended now. These are `generate`'s defaults,
length_penalty=1 and early_stopping=False. Unlike theirs, an item that is done doesn't hold up the others, and what
follows an end of sequence is always `pad`.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from v2t_jax.decode.sample import greedy, log_softmax_at
from v2t_jax.decode.state import (
    EOS,
    PAD,
    START,
    Cache,
    Decoded,
    TokensToLogits,
    WrittenCache,
    check_arguments,
    count_tokens,
)
from v2t_jax.errors import InputError

DEAD = -1e9  # the score of an empty slot and of a beam that must not go on: finite, as theirs is
CHUNK = 128  # of a vocabulary


class _Loop(NamedTuple):
    position: jax.Array  # [] tokens generated so far
    tokens: jax.Array  # [B, K, 1 + L] running hypotheses: start id, generated tokens, pads
    log_probs: jax.Array  # [B, K] theirs, best first
    done_tokens: jax.Array  # [B, K, 1 + L] finished slots
    done_log_probs: jax.Array  # [B, K]
    done_scores: jax.Array  # [B, K] log p / length, best first
    done: jax.Array  # [B, K] the slot is filled
    improvable: jax.Array  # [B] a running hypothesis may still beat a finished one; once False, always False
    cache: Cache  # leaves [B * K, ...], or WrittenCache


def beam_search(
    tokens_to_logits: TokensToLogits,
    cache: Cache,
    *,
    batch_size: int,
    num_beams: int,
    num_return: int,
    max_length: int,
    stop_rule: Literal["running", "any"] = "running",
) -> tuple[Decoded, jax.Array]:
    """The `num_return` best hypotheses of each item. With one beam this is `greedy`, as it is in `generate`.

    Args:
        cache: the state of `tokens_to_logits` before the first step, of rows B * K, item-major (all beams of an item
            alike).
        batch_size: B.
        num_beams: K.
        max_length: L, generated tokens at most, end of sequence included, start id not: `generate`'s less 1.
        stop_rule: whose best log p decides whether an item is done: "running", of the hypotheses that run on; "any", of
            all that the step made, those that just ended too (transformers before 4.50, on which the original runs).

    Returns:
        `Decoded` with ids [B, num_return, L] and log_probs [B, num_return], and scores [B, num_return]: log_probs /
        length, best first. A log p of about -1e9 marks a slot for which a tiny vocabulary left no hypothesis.
    """
    if not 1 <= num_return <= num_beams:
        raise InputError(f"{num_return} results were asked of {num_beams} beams; ask for 1 to {num_beams} of them.")
    rows = batch_size * num_beams
    check_arguments(cache, rows=rows, max_length=max_length)
    if num_beams == 1:
        decoded = greedy(tokens_to_logits, cache, batch_size=batch_size, max_length=max_length)
        scores = decoded.log_probs / count_tokens(decoded.ids)
        return Decoded(decoded.ids[:, None], decoded.log_probs[:, None]), scores[:, None]

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.position < max_length) & jnp.any(loop.improvable)

    def step(loop: _Loop) -> _Loop:
        last = jax.lax.dynamic_index_in_dim(loop.tokens, loop.position, axis=2, keepdims=False)
        logits, new_cache = tokens_to_logits(last.reshape(rows), loop.cache, loop.position)
        grown_log_probs, parents, chosen = _grow(logits.astype(jnp.float32), loop.log_probs)
        length = loop.position + 1
        grown_tokens = jax.lax.dynamic_update_index_in_dim(_take(loop.tokens, parents), chosen, length, axis=2)
        ends = (chosen == EOS) | (length == max_length)
        running_log_probs, running = jax.lax.top_k(jnp.where(ends, grown_log_probs + DEAD, grown_log_probs), num_beams)

        enters = ends & (jnp.arange(2 * num_beams)[None, :] < num_beams) & loop.improvable[:, None]
        grown_scores = jnp.where(enters, grown_log_probs / length, -jnp.inf)
        done_scores, kept = jax.lax.top_k(jnp.concatenate([loop.done_scores, grown_scores], axis=1), num_beams)
        done = _take(jnp.concatenate([loop.done, enters], axis=1), kept)
        worst = jnp.where(jnp.all(done, axis=1), done_scores[:, -1], DEAD)
        best = running_log_probs[:, 0] if stop_rule == "running" else grown_log_probs[:, 0]
        return _Loop(
            position=length,
            tokens=_take(grown_tokens, running),
            log_probs=running_log_probs,
            done_tokens=_take(jnp.concatenate([loop.done_tokens, grown_tokens], axis=1), kept),
            done_log_probs=_take(jnp.concatenate([loop.done_log_probs, grown_log_probs], axis=1), kept),
            done_scores=done_scores,
            done=done,
            improvable=loop.improvable & (best / length > worst),
            cache=_reorder(new_cache, _take(parents, running)),
        )

    tokens = jnp.full((batch_size, num_beams, 1 + max_length), PAD, jnp.int32).at[:, :, 0].set(START)
    empty = jnp.full((batch_size, num_beams), DEAD, jnp.float32)
    first = empty.at[:, 0].set(0.0)  # all beams start alike: only the first may grow, or all would stay so
    done, improvable = jnp.zeros((batch_size, num_beams), bool), jnp.ones(batch_size, bool)
    start = _Loop(jnp.int32(0), tokens, first, tokens, empty, empty, done, improvable, cache)
    end = jax.lax.while_loop(unfinished, step, start)
    decoded = Decoded(end.done_tokens[:, :num_return, 1:], end.done_log_probs[:, :num_return])
    return decoded, end.done_scores[:, :num_return]


def _grow(logits: jax.Array, log_probs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The 2K best continuations of an item: their log p, the beams that they grow from, and their tokens [B, 2K].

    They are among the 2K best of each beam; so neither the log p nor the sums of all K * V continuations need exist.
    Order among equals is that of one flat top-k: lowest beam, then lowest id.
    """
    batch_size, num_beams = log_probs.shape
    width = min(2 * num_beams, logits.shape[-1])
    best_logits, best_ids = top_k(logits, width)
    log_p = jnp.where(jnp.isneginf(best_logits), -jnp.inf, log_softmax_at(logits, best_ids))
    totals = log_p.reshape(batch_size, num_beams, width) + log_probs[:, :, None]
    grown, flat = jax.lax.top_k(totals.reshape(batch_size, -1), 2 * num_beams)
    return grown, flat // width, _take(best_ids.reshape(batch_size, -1), flat)


def top_k(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of logits [R, V], in its order; looks into the k chunks of the vocabulary with the best maxima only.

    A logit in any other chunk has k before it, one in each of these.
    """
    rows, size = logits.shape
    chunks = -(-size // CHUNK)
    if chunks <= k:
        return jax.lax.top_k(logits, k)
    padded = jnp.pad(logits, ((0, 0), (0, chunks * CHUNK - size)), constant_values=-jnp.inf)
    maxima = jnp.max(padded.reshape(rows, chunks, CHUNK), axis=2)
    chosen = jnp.sort(jax.lax.top_k(maxima, k)[1], axis=1)  # lowest ids first, for ties
    ids = (chosen[:, :, None] * CHUNK + jnp.arange(CHUNK)[None, None]).reshape(rows, -1)
    best, index = jax.lax.top_k(jnp.take_along_axis(logits, ids, axis=1, mode="fill", fill_value=-jnp.inf), k)
    return best, jnp.take_along_axis(ids, index, axis=1)


def _take(values: jax.Array, indices: jax.Array) -> jax.Array:
    """values [B, N, ...] at indices [B, M] of its second axis: [B, M, ...].

    A gather batched over B, so that with B sharded over devices every device keeps to its own items.
    """
    return jax.vmap(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))(values, indices)


def _reorder(cache: Cache, parents: jax.Array) -> Cache:
    """Give every running hypothesis, parents [B, K], the cache of the one that it grew from, or a view of it."""
    if isinstance(cache, WrittenCache):
        return cache._replace(ancestors=_reorder(cache.ancestors, parents))

    def reorder(leaf: jax.Array) -> jax.Array:
        return _take(leaf.reshape(*parents.shape, *leaf.shape[1:]), parents).reshape(leaf.shape)

    return jax.tree.map(reorder, cache)
