"""Guided edits: hypotheses improved one token at a time.

An edit takes at most one token out of a text and puts at most one in: substitution, insertion, deletion or move. What
to put where is read off three rankings of every token at every place, each from one pass over the hypothesis: log p of
inverter and corrector, which name words that are missing, and the embedder's gradient, which finds words of a similar
meaning (after HotFlip, Ebrahimi et al. 2018). The edits that rank first are candidates of the correction loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from v2t_jax.config import ModelConfig
from v2t_jax.decode.state import EOS, PAD
from v2t_jax.inversion.correction import Hypotheses, Params, Propose, cosine_similarity
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.embedder import EmbedderConfig, TokenMap, token_gradient
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.t5 import stack_decoder

GRADIENT_CALLS = 3  # what a gradient costs, in calls of the embedder: forward, and backward twice that
TOKENS_A_PLACE = 64  # that a ranking offers at most

Gain = Callable[[Params, Hypotheses], Array]  # [R, L, V], to first order, of each token at each place


class EditCounts(NamedTuple):
    """Candidates of one hypothesis."""

    substitutions: int = 28
    insertions: int = 30
    moves: int = 16
    deletions: int = 4
    by_gradient: int = 30


# Where the embedder can't be differentiated, as many.
BLACK_BOX = EditCounts(substitutions=44, insertions=44, moves=16, deletions=4, by_gradient=0)


def embedder_gain(config: EmbedderConfig, token_map: TokenMap) -> Gain:
    """The gain in cosine, by the gradient of an embedder that shares the model's vocabulary."""

    def gain(params: Params, given: Hypotheses) -> Array:
        def cosine(embedding: Array) -> Array:
            return cosine_similarity(embedding, given.e)

        return token_gradient(config, token_map, params["embedder"], params["pieces"], given.ids, cosine)

    return gain


def propose_edits(config: ModelConfig, writable: Array, counts: EditCounts, gain: Gain | None = None) -> Propose:
    """The edits that rank first, [R, sum(counts), L]; where a text has fewer, it fills the shape itself.

    Args:
        writable: bool [V], the ids that may be put into a text.
        gain: ranks the substitutions `by_gradient`.
    """

    def propose(params: Params, given: Hypotheses, k: int) -> Array:
        ids, size = given.ids, len(writable)
        known = jnp.minimum(ids, size - 1)  # T5's table may have rows that are no token's
        rows, none = jnp.arange(len(ids))[:, None], ids.shape[1]
        place = jnp.arange(none)[None]
        length = jnp.sum(ids > EOS, axis=1, keepdims=True)
        is_text, has_room = place < length, (place <= length) & (length < none - 1)

        def best(scores: Array, count: int) -> tuple[Array, Array]:
            """Scores and ids [R, L, K] of the best other tokens at each place."""
            others = jnp.where(writable[None, None], scores, -jnp.inf).at[rows, place, known].set(-jnp.inf)
            return jax.lax.top_k(others, min(count, TOKENS_A_PLACE, others.shape[2]))

        candidates = []

        def add(count: int, scores: Array, *edit: Any) -> None:
            """The `count` best by score of edits (out, into, token), all of the scores' shape or broadcast to it."""
            flat, *parts = (jnp.broadcast_to(x, scores.shape).reshape(len(ids), -1) for x in (scores, *edit))
            top, index = jax.lax.top_k(flat, min(count, flat.shape[1]))
            chosen = (jnp.where(top == -jnp.inf, none, jnp.take_along_axis(x, index, axis=1)) for x in parts)
            candidates.append(apply_edits(ids, *chosen))

        log_p = token_log_probabilities(config, params, given)[..., :size]
        scores, token = best(log_p, max(counts.substitutions, counts.insertions))
        at = place[..., None]
        add(counts.substitutions, jnp.where(is_text[..., None], scores, -jnp.inf), at, at, token)
        add(counts.insertions, jnp.where(has_room[..., None], scores, -jnp.inf), none, at, token)
        if gain is not None:
            scores, token = best(gain(params, given), counts.by_gradient)
            add(counts.by_gradient, jnp.where(is_text[..., None], scores, -jnp.inf), at, at, token)
        own = jnp.take_along_axis(log_p, known[..., None], axis=2)
        add(counts.deletions, jnp.where(is_text & (length > 1), -own[..., 0], -jnp.inf), place, none, PAD)
        # Moves [R, from, to] gain the token's log p in front of what stands there now, and lose that at its old place.
        stands = jnp.minimum(place + (place >= place[0, :, None]), none - 1)  # [from, to]
        elsewhere = jnp.take_along_axis(log_p, jnp.broadcast_to(known[:, None], (*ids.shape, none)), axis=2)
        gained = jnp.swapaxes(elsewhere, 1, 2)[:, jnp.arange(none)[:, None], stands] - own
        # A token moved to the place before it is the one there moved to the next.
        differs = (at != place[:, None]) & (at != place[:, None] + 1)
        possible = is_text[..., None] & is_text[:, None] & differs
        add(counts.moves, jnp.where(possible, gained, -jnp.inf), at, place[:, None], ids[..., None])
        return jnp.concatenate(candidates, axis=1)

    return propose


def token_log_probabilities(config: ModelConfig, params: Params, given: Hypotheses) -> Array:
    """[R, L, V]: log p of each token behind the first t tokens of a hypothesis, of inverter and corrector, summed."""

    def log_p(network: type[Inverter] | type[Corrector], stage: str, *inputs: Array) -> Array:
        weights = {**params[stage], "t5": stack_decoder(params[stage]["t5"])}
        return jax.nn.log_softmax(network(config).apply({"params": weights}, *inputs, given.ids))

    total = log_p(Inverter, "inverter", given.e)
    return (
        total + log_p(Corrector, "corrector", given.e, given.ids, given.embedding) if "corrector" in params else total
    )


def apply_edits(ids: Array, out: Array, into: Array, token: Array) -> Array:
    """Texts [R, n, L]: ids [R, L] with the token at `out` taken out and then `token` put in at `into`, each [R, n].

    L stands for nowhere, of `out` or `into`. What leaves room for an end token ends with one.
    """
    place = jnp.arange(ids.shape[1])[None, None]
    source = place - (place > into[..., None])
    source = source + (source >= out[..., None])
    padded = jnp.pad(ids, ((0, 0), (0, 1)), constant_values=PAD)
    kept = jnp.take_along_axis(padded[:, None], jnp.minimum(source, ids.shape[1]), axis=2)
    texts = jnp.where(place == into[..., None], token[..., None], kept)
    length = jnp.sum(texts > EOS, axis=2, keepdims=True)
    return jnp.where(place == length, EOS, texts)
