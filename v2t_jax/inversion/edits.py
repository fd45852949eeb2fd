"""Guided edits: hypotheses improved by a word at a time, or by a span of words that finds its place.

An edit substitutes, inserts or deletes a token, or moves a span of tokens. What goes where is read off rankings of
every token at every place, each from one pass over the hypothesis: log p of inverter and corrector; the ranker, which
was trained to find what is missing or surplus where; and the embedder's gradient, which finds words of a similar
meaning (after HotFlip, Ebrahimi et al. 2018). The edits that rank first are embedded, and those whose changes add up
best are tried together: all are candidates of the correction loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from v2t_jax.config import ModelConfig
from v2t_jax.decode.state import EOS, PAD, arranged
from v2t_jax.inversion.correction import Edit, Hypotheses, Look, Params, cosine_similarity
from v2t_jax.inversion.pool import Pool, repeats
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.embedder import EmbedderConfig, TokenMap, token_gradient
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.ranker import Ranker

GRADIENT_CALLS = 3  # what a gradient costs, in calls of the embedder: forward, and backward twice that
TOKENS_A_PLACE = 64  # that a ranking offers at most
NETWORKS_WEIGHT = 0.35  # of log p of inverter and corrector, beside the ranker's
LONGEST_SPAN = 8  # tokens that are moved at once
PLACES = 1024  # between slots, for what is moved there
KEEP = -1  # of a slot that an edit leaves as it is

# To first order, of each token at each place [R, L, V]; and the embedder's hidden states [R, L, H].
Gain = Callable[[Params, Hypotheses], tuple[Array, Array]]


class EditCounts(NamedTuple):
    """Candidates of one hypothesis."""

    substitutions: int = 24
    insertions: int = 24
    moves: int = 24
    deletions: int = 6
    by_gradient: int = 16  # substitutions
    pairs: int = 16  # of two edits
    unions: int = 8  # of three edits, four, ...


# Where the embedder can't be differentiated, as many.
BLACK_BOX = EditCounts(substitutions=32, insertions=32, by_gradient=0)


def embedder_gain(config: EmbedderConfig, token_map: TokenMap) -> Gain:
    """The gain in cosine, by the gradient of an embedder that shares the model's vocabulary."""

    def gain(params: Params, given: Hypotheses) -> tuple[Array, Array]:
        def cosine(embedding: Array) -> Array:
            return cosine_similarity(embedding, given.e)

        return token_gradient(config, token_map, params["embedder"], params["pieces"], given.ids, cosine)

    return gain


def guided_edits(config: ModelConfig, writable: Array, counts: EditCounts, gain: Gain | None = None) -> Edit:
    """A correction loop's round of edits: sum(counts) candidates; where a text has fewer, it fills the shape itself.

    Args:
        writable: bool [V], the ids that may be put into a text.
        gain: ranks the substitutions `by_gradient`.
    """

    def edit(params: Params, given: Hypotheses, look: Look) -> Pool:
        edits = single_edits(config, writable, counts, gain, params, given)
        singles = look(apply_edits(given.ids, edits))
        # Two rankings often name the same edit.
        distinct = jnp.where(repeats(singles.ids, singles.similarity > -jnp.inf), -jnp.inf, singles.similarity)
        merged = look(apply_edits(given.ids, merge_edits(edits, given, singles._replace(similarity=distinct), counts)))
        return Pool(*(jnp.concatenate(pair, axis=1) for pair in zip(singles, merged, strict=True)))

    return edit


def single_edits(
    config: ModelConfig, writable: Array, counts: EditCounts, gain: Gain | None, params: Params, given: Hypotheses
) -> Array:
    """Edits of each hypothesis, [R, n, 2, 2 L + 1]: see `apply_edits`."""
    ids, size = given.ids, len(writable)
    known = jnp.minimum(ids, size - 1)  # T5's table may have rows that are no token's
    rows, none = jnp.arange(len(ids))[:, None], ids.shape[1]
    place, slot = jnp.arange(none)[None], jnp.arange(2 * none + 1)[None, None]
    length = jnp.sum(ids > EOS, axis=1, keepdims=True)
    is_text, has_room = place < length, (place <= length) & (length < none - 1)

    def best(scores: Array, count: int) -> tuple[Array, Array]:
        """Scores and ids [R, L, K] of the best other tokens at each place."""
        others = jnp.where(writable[None, None], scores, -jnp.inf).at[rows, place, known].set(-jnp.inf)
        return jax.lax.top_k(others, min(count, TOKENS_A_PLACE, others.shape[2]))

    edits = []

    def best_of(count: int, scores: Array, *parts: Any) -> tuple[Array, ...]:
        """Whether there are so many, and the `count` best by score of what describes an edit, each [R, count, 1]."""
        flat = scores.reshape(len(ids), -1)
        top, index = jax.lax.top_k(flat, min(count, flat.shape[1]))
        shaped = (jnp.broadcast_to(x, scores.shape).reshape(len(ids), -1) for x in parts)
        return (top > -jnp.inf)[..., None], *(jnp.take_along_axis(x, index, axis=1)[..., None] for x in shaped)

    def write(count: int, scores: Array, where: Array, token: Any) -> None:
        """Adds the edits, best by score, that write a token into a slot."""
        exists, chosen, written = best_of(count, scores, where, token)
        tokens = jnp.where(exists & (slot == chosen), written, KEEP)
        edits.append(jnp.stack([tokens, jnp.full_like(tokens, KEEP)], axis=2))

    gains, states = (None, jnp.zeros((*ids.shape, config.state_width))) if gain is None else gain(params, given)
    log_p = token_log_probabilities(config, params, given)[..., :size]
    inserted, substituted, surplus = word_ranks(config, params, given, states, log_p)
    at = place[..., None]
    scores, token = best(substituted, counts.substitutions)
    write(counts.substitutions, jnp.where(is_text[..., None], scores, -jnp.inf), 2 * at + 1, token)
    scores, token = best(inserted, counts.insertions)
    write(counts.insertions, jnp.where(has_room[..., None], scores, -jnp.inf), 2 * at, token)
    if gains is not None:
        scores, token = best(gains, counts.by_gradient)
        write(counts.by_gradient, jnp.where(is_text[..., None], scores, -jnp.inf), 2 * at + 1, token)
    own = jnp.take_along_axis(log_p, known[..., None], axis=2)
    write(counts.deletions, jnp.where(is_text & (length > 1), surplus, -jnp.inf), 2 * place + 1, PAD)
    # The span from i to j moves in front of token g: then i, g and the token behind j follow other tokens than before.
    elsewhere = jnp.take_along_axis(log_p, jnp.broadcast_to(known[:, None], (*ids.shape, none)), axis=2)
    gains = elsewhere - own[..., 0][:, None]  # [R, place, token]
    i, j, g = jnp.meshgrid(*3 * [jnp.arange(none)], indexing="ij")
    span, behind = j - i + 1, jnp.minimum(j + 1, none - 1)
    gained = gains[:, g, i] + gains[:, behind, g] + gains[:, i, behind]
    # To move a span over the next one is to move that one back: the shorter of the two is moved.
    possible = ((g - j - 1 >= span) | (i - g > span)) & (span >= 1) & (span <= LONGEST_SPAN)
    possible = possible[None] & (j[None] < length[..., None, None]) & (g[None] <= length[..., None, None])
    exists, start, end, gap = best_of(counts.moves, jnp.where(possible, gained, -jnp.inf), i[None], j[None], g[None])
    in_span = exists & (slot >= 2 * start + 1) & (slot <= 2 * end + 1)
    places = jnp.where(in_span, PLACES * 2 * gap + 1 + slot - 2 * start, KEEP)
    edits.append(jnp.stack([jnp.full_like(places, KEEP), places], axis=2))
    return jnp.concatenate(edits, axis=1)


def merge_edits(edits: Array, given: Hypotheses, singles: Pool, counts: EditCounts) -> Array:
    """Edits [R, counts.pairs + counts.unions, 2, S] that join some of edits [R, n, 2, S], whose results are `singles`.

    What edits change in an embedding adds up, nearly, so that of joint edits is foretold. The pairs are those that
    should come nearest; a union grows, from the best edit, by the one that should help most, while one does. Edits that
    change the same slot don't join.
    """
    v, e, one, rows = given.embedding[:, None], given.e[:, None], singles.embedding, jnp.arange(len(edits))

    def dot(a: Array, b: Array) -> Array:
        return jnp.einsum("rie,rje->rij", a, b, precision=jax.lax.Precision.HIGHEST)

    touched = jnp.any(edits != KEEP, axis=2).astype(jnp.float32)
    clash = dot(touched, touched) > 0
    absent = singles.similarity == -jnp.inf
    # The cosine, but for |e|, of one_i + one_j - v: by inner products, as all these sums would fill the memory.
    products, along, back = dot(one, one), dot(one, e)[..., 0], dot(one, v)[..., 0]
    square = jnp.diagonal(products, axis1=1, axis2=2) - 2 * back + dot(v, v)[..., 0] / 2
    norm = jnp.sqrt(jnp.maximum(square[:, :, None] + square[:, None] + 2 * products, jnp.finfo(jnp.float32).tiny))
    cosine = (along[:, :, None] + along[:, None] - dot(v, e)) / norm
    once = jnp.asarray(np.triu(np.ones(products.shape[1:], bool), 1))[None]
    joins = once & ~clash & ~absent[:, :, None] & ~absent[:, None]
    index = jax.lax.top_k(jnp.where(joins, cosine, -jnp.inf).reshape(len(edits), -1), counts.pairs)[1]

    def join(a: Array, b: Array) -> Array:
        return jnp.where(a == KEEP, b, a)

    first, second = (jnp.take_along_axis(edits, i[..., None, None], axis=1) for i in divmod(index, one.shape[1]))
    best = jnp.argmax(singles.similarity, axis=1)
    union, vector, barred, unions = edits[rows, best], one[rows, best], clash[rows, best] | absent, []
    for _ in range(1 + counts.unions):
        grown = cosine_similarity(vector[:, None] + one - v, e)
        k = jnp.argmax(jnp.where(barred, -jnp.inf, grown), axis=1)
        helps = ~barred[rows, k] & (grown[rows, k] > cosine_similarity(vector, given.e))
        union = jnp.where(helps[:, None, None], join(union, edits[rows, k]), union)
        vector = jnp.where(helps[:, None], vector + one[rows, k] - v[:, 0], vector)
        barred |= helps[:, None] & clash[rows, k]
        unions.append(union)
    return jnp.concatenate([join(first, second), jnp.stack(unions[1:], axis=1)], axis=1)  # the first is a pair


def word_ranks(
    config: ModelConfig, params: Params, given: Hypotheses, states: Array, log_p: Array
) -> tuple[Array, Array, Array]:
    """Scores of each word put in front of a token [R, L, V] or in its place, and of each token's going [R, L].

    Args:
        states: the embedder's hidden states, or zeros [R, L, H].
        log_p: of inverter and corrector [R, L, V]; all that there is for a model without a ranker.
    """
    own = jnp.take_along_axis(log_p, jnp.minimum(given.ids, log_p.shape[2] - 1)[..., None], axis=2)[..., 0]
    if "ranker" not in params:
        return log_p, log_p, -own
    inputs = params["inverter"]["t5"]["token_embedding"], given.e, given.ids, given.embedding, states
    ranking = Ranker(config).apply({"params": params["ranker"]}, *inputs)
    words = jax.nn.log_softmax(ranking.words)[..., : log_p.shape[2]]
    inserted = words[:, ::2] + jax.nn.log_sigmoid(ranking.gap)[..., None]
    substituted = words[:, 1::2] + jax.nn.log_sigmoid(ranking.surplus)[..., None]
    rest = NETWORKS_WEIGHT * log_p
    return inserted + rest, substituted + rest, ranking.surplus - NETWORKS_WEIGHT * own


def token_log_probabilities(config: ModelConfig, params: Params, given: Hypotheses) -> Array:
    """[R, L, V]: log p of each token behind the first t tokens of a hypothesis, of inverter and corrector, summed."""

    def log_p(network: type[Inverter] | type[Corrector], stage: str, *inputs: Array) -> Array:
        return jax.nn.log_softmax(network(config).apply({"params": params[stage]}, *inputs, given.ids))

    total = log_p(Inverter, "inverter", given.e)
    if "corrector" in params:
        total += log_p(Corrector, "corrector", given.e, given.ids, given.embedding)
    return total


def apply_edits(ids: Array, edits: Array) -> Array:
    """Texts [R, n, L] of ids [R, L] with edits [R, n, 2, 2 L + 1] made.

    Slot 2 i is the gap in front of token i, and slot 2 i + 1 that token. An edit holds what it writes into each slot,
    an id, or a pad to take a token out, and the slot's new place, where slot s has place PLACES * s; or KEEP.
    """
    text = jnp.where(jnp.cumsum(ids == EOS, axis=1) == 0, ids, PAD)
    slots = jnp.pad(jnp.stack([jnp.zeros_like(text), text], axis=2).reshape(len(ids), -1), ((0, 0), (0, 1)))
    places = PLACES * jnp.arange(edits.shape[3])[None, None]
    tokens, moved = edits[:, :, 0], edits[:, :, 1]
    tokens = jnp.where(tokens == KEEP, slots[:, None], tokens)
    return arranged(tokens, jnp.where(moved == KEEP, places, moved), ids.shape[1])
