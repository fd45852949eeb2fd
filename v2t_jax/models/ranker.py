"""The ranker: which words a hypothesis lacks, at which places, and which of its own are surplus.

It reads what the embedder computes anyway, the embeddings of text and hypothesis and the hypothesis's last hidden
states, and scores every edit of a word at once. Guided edits rank words by it (inversion/edits.py). One pass costs
about as much as one more text to embed.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from v2t_jax.config import ModelConfig, Stage
from v2t_jax.decode.state import EOS
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.inverter import EmbeddingToText, Inverter
from v2t_jax.models.layers import Dense, LayerNorm, Network, look_up, matmul_float32
from v2t_jax.models.t5 import T5Stack

ROUNDING = 1e-4  # difference of two embeddings of one text, as a share of their length


class Ranking(NamedTuple):
    """Logits. Slot 2 i is the gap in front of token i, and slot 2 i + 1 that token, as in inversion/edits.py."""

    missing: jax.Array  # [B, V], of being one of the words that the hypothesis lacks
    surplus: jax.Array  # [B, L], that a token has to go
    gap: jax.Array  # [B, L], that something is missing in front of a token
    words: jax.Array  # [B, S, V], of what is missing in a slot


class Ranker(Network):
    """A perceptron on e, ê and the direction of e - ê, which conditions T5 layers on the hypothesis's hidden states.

    Both answer with points in the space of word vectors.
    """

    config: ModelConfig

    PARAM_AXES = (
        (r"\w+/kernel", (None, None)),
        (r"\w+/bias|state_norm/scale", (None,)),
        (r"(missing|surplus)_bias", ("vocab",)),
        *((f"encoder/{path}", axes) for path, axes in T5Stack.PARAM_AXES),
    )

    @nn.nowrap
    def examples(self) -> tuple[Any, ...]:
        c = self.config
        e, ids, states = (
            jnp.zeros((1, c.embedding_width)),
            jnp.ones((1, 2), jnp.int32),
            jnp.zeros((1, 2, c.state_width)),
        )
        return jnp.zeros((c.t5.vocab_size, c.t5.d_model)), e, ids, e, states

    @nn.compact
    def __call__(
        self,
        table: Float[Array, "V D"],
        e: Float[Array, "B E"],
        hypothesis: Int[Array, "B L"],
        embedding: Float[Array, "B E"],
        states: Float[Array, "B L H"],
        slots: Int[Array, "B S"] | None = None,
    ) -> Ranking:
        """Scores of all edits of a word.

        Args:
            table: the inverter's token embeddings.
            hypothesis, embedding: its ids, and its embedding ê.
            states: the embedder's last hidden states at its places; zeros where an embedder doesn't show them.
            slots: those whose words are asked for; by default all 2 L.
        """
        c, width = self.config, self.config.t5.d_model
        table = (table - jnp.mean(table, axis=0, keepdims=True)) / jnp.std(table)
        share = jnp.linalg.norm(e - embedding, axis=1, keepdims=True) / jnp.linalg.norm(e, axis=1, keepdims=True)
        # Near the target the difference is short, but its direction says as much, until rounding is all of it.
        difference = jnp.where(share > ROUNDING, e - embedding, 0.0)
        inputs = [_unit(x) * c.embedding_width**0.5 for x in (difference, e, embedding)]
        h = nn.gelu(Dense(4 * c.embedding_width, name="input")(jnp.concatenate([*inputs, share], axis=1)))
        h = h + nn.gelu(Dense(4 * c.embedding_width, name="hidden")(h))

        def point(name: str, x: jax.Array) -> jax.Array:
            small = nn.initializers.normal(0.1 / x.shape[-1] ** 0.5)
            return Dense(width, use_bias=False, kernel_init=small, name=name)(x) / width**0.5

        def bias(name: str) -> jax.Array:
            return self.param(name, nn.initializers.zeros, (len(table),))

        own, word_bias, place = look_up(table, hypothesis), bias("missing_bias"), is_place(hypothesis)
        missing = point("linear", inputs[0]) + point("missing", h)
        surplus = jnp.sum(point("surplus", h)[:, None] * own, axis=2) + look_up(bias("surplus_bias"), hypothesis)
        at = Dense(width, name="token")(own) + Dense(width, name="shift")(h)[:, None]
        if c.state_width:
            state = Dense(width, name="state")(LayerNorm(epsilon=1e-5, name="state_norm")(states))
            at = at + state * (1 + Dense(width, name="scale")(h))[:, None]
        layers = dataclasses.replace(c.t5, num_encoder_layers=c.num_ranker_layers, dtype="float32", dropout_rate=0.0)
        stack = T5Stack(layers, is_decoder=False, name="encoder")
        here = stack(jnp.where(place[..., None], at, 0.0), place.astype(jnp.int32))
        before = jnp.pad(here[:, :-1], ((0, 0), (1, 0), (0, 0)))
        gap = nn.gelu(Dense(width, name="gap")(jnp.concatenate([before, here], axis=2)))
        token = nn.gelu(Dense(width, name="place")(here))
        points = jnp.stack([point("insert", gap), point("substitute", token)], axis=2).reshape(len(e), -1, width)
        if slots is not None:
            points = jnp.take_along_axis(points, slots[..., None], axis=1)

        def words(points: jax.Array) -> jax.Array:
            logits = matmul_float32(points, table, jnp.float32, True) + word_bias[None, None]
            return nn.with_logical_constraint(logits, ("batch", None, "vocab"))

        return Ranking(
            words(missing[:, None])[:, 0],
            surplus + Dense(1, name="surplus_place")(token)[..., 0],
            Dense(1, name="missing_place")(gap)[..., 0],
            words(points + missing[:, None]),
        )


def is_place(hypothesis: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Where a hypothesis has a gap in front: at its tokens, and behind the last one, at the text's end."""
    return jnp.arange(hypothesis.shape[1])[None] <= jnp.sum(hypothesis > EOS, axis=1, keepdims=True)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)


NETWORKS: dict[Stage, type[EmbeddingToText] | type[Ranker]] = {
    "inverter": Inverter,
    "corrector": Corrector,
    "ranker": Ranker,
}
