"""What the ranker learns: the edits that lead from a hypothesis to its text, by all their optimal alignments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from v2t_jax.decode.state import EOS
from v2t_jax.models.ranker import Ranking, is_place

LEARNED_SLOTS = 6  # of a hypothesis, drawn among those in which words are missing: each costs a row of logits
MISSING_WEIGHT = 0.5  # of the missing words as a bag, beside the same words place by place


class Alignments(NamedTuple):
    """What some longest common subsequence of hypothesis [B, n] and text [B, m] leaves over."""

    words: Bool[Array, "B 2n m"]  # that the text's j-th token belongs in a slot (models/ranker.py)
    kept: Bool[Array, "B n"]  # that a token of the hypothesis stays
    lost: Bool[Array, "B n"]  # that it goes; some alignments may keep it, and others not


def align(hypothesis: Int[Array, "B n"], text: Int[Array, "B m"]) -> Alignments:
    """All optimal alignments at once, from the lengths of common subsequences of all prefixes and all suffixes."""
    is_token = hypothesis > EOS
    equal = (hypothesis[:, :, None] == text[:, None]) & is_token[:, :, None]
    front = _common_lengths(equal)  # [B, n + 1, m + 1]
    back = _common_lengths(equal[:, ::-1, ::-1])[:, ::-1, ::-1]
    longest, in_text = front[:, -1:, -1:], (text > EOS)[:, None]
    kept = jnp.any(equal & (front[:, :-1, :-1] + 1 + back[:, 1:, 1:] == longest), axis=2)
    lost = jnp.any(front[:, :-1] + back[:, 1:] == longest, axis=2) & is_token
    inserted = (front[:, :-1, :-1] + back[:, :-1, 1:] == longest) & in_text & is_place(hypothesis)[..., None]
    substituted = (front[:, :-1, :-1] + back[:, 1:, 1:] == longest) & in_text & lost[..., None]
    words = jnp.stack([inserted, substituted], axis=2)
    return Alignments(words.reshape(len(text), -1, text.shape[1]), kept, lost)


def _common_lengths(equal: Bool[Array, "B n m"]) -> Int[Array, "B n1 m1"]:
    """Length of the longest common subsequence of each prefix of the one with each of the other."""

    def row(above: jax.Array, equal: jax.Array) -> tuple[jax.Array, jax.Array]:
        longer = jnp.maximum(above[:, 1:], above[:, :-1] + equal)
        below = jax.lax.cummax(jnp.pad(longer, ((0, 0), (1, 0))), axis=1)
        return below, below

    first = jnp.zeros((len(equal), 1 + equal.shape[2]), jnp.int32)
    rows = jax.lax.scan(row, first, jnp.moveaxis(equal.astype(jnp.int32), 1, 0))[1]
    return jnp.moveaxis(jnp.concatenate([first[None], rows]), 0, 1)


def learned_slots(found: Alignments, key: jax.Array | None) -> Int[Array, "B S"]:
    """Slots in which words are missing, drawn at random or, without a key, the first; others fill the shape."""
    is_open = jnp.any(found.words, axis=2)
    order = 0.0 if key is None else jax.random.uniform(key, is_open.shape)
    return jax.lax.top_k(jnp.where(is_open, 1.0 + order, 0.0), min(LEARNED_SLOTS, is_open.shape[1]))[1]


def ranking_losses(
    ranking: Ranking,
    slots: Int[Array, "B S"],
    found: Alignments,
    hypothesis: Int[Array, "B n"],
    text: Int[Array, "B m"],
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Summed loss of a ranking of `slots`; (their share whose likeliest word is right, summed, and hypotheses).

    A hypothesis's loss has four terms, each a mean: the cross entropy of the words that may go into each slot, that of
    all missing words at once, and whether each token is surplus and each gap open. A token that only some alignments
    keep is half surplus.
    """
    rows = jnp.arange(len(text))[:, None]

    def count(ids: jax.Array) -> jax.Array:
        return jnp.zeros(ranking.missing.shape).at[rows, ids].add(1.0).at[:, : EOS + 1].set(0.0)

    def mean(losses: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(losses * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)

    labels = jnp.take_along_axis(found.words, slots[..., None], axis=1)  # [B, S, m]
    is_open = jnp.any(labels, axis=2).astype(jnp.float32)
    at = jnp.take_along_axis(ranking.words, jnp.broadcast_to(text[:, None], labels.shape), axis=2)
    chosen = jnp.sum(jnp.where(labels, at, 0.0), axis=2) / jnp.maximum(jnp.sum(labels, axis=2), 1)
    words = jax.nn.logsumexp(ranking.words, axis=2) - chosen
    right = jnp.where(labels, at, -jnp.inf).max(axis=2) >= ranking.words.max(axis=2)
    lacking = jnp.maximum(count(text) - count(hypothesis), 0.0)
    is_token = (hypothesis > EOS).astype(jnp.float32)
    surplus = (found.lost.astype(jnp.float32) + ~found.kept) / 2
    gaps = jnp.any(found.words[:, ::2], axis=2)
    losses = (
        mean(words, is_open)
        + MISSING_WEIGHT * mean(-jax.nn.log_softmax(ranking.missing), lacking)
        + mean(optax.sigmoid_binary_cross_entropy(ranking.surplus, surplus), is_token)
        + mean(optax.sigmoid_binary_cross_entropy(ranking.gap, gaps), is_place(hypothesis))
    )
    return jnp.sum(losses), (jnp.sum(mean(right, is_open)), jnp.float32(len(text)))
