"""The corrector: embedding, hypothesis and the hypothesis' embedding -> better text (Morris et al. 2023, 3.1)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.decode.state import EOS, PAD
from v2t_jax.models.inverter import Condition, EmbeddingToText, Projection
from v2t_jax.models.layers import LayerNorm


class Corrector(EmbeddingToText):
    """Embedding e [B, E], hypothesis ids [B, S] and their embedding [B, E] -> better text.

    The original numbers its three projections 1 (target), 2 (difference), 3 (hypothesis); ours have names.
    """

    PARAM_AXES = (*EmbeddingToText.PARAM_AXES, (r"input_norm/(scale|bias)", (None,)))

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.projection_target, self.projection_difference = Projection(c), Projection(c)
        self.projection_hypothesis = Projection(c)
        if c.input_norm:
            self.input_norm = LayerNorm(epsilon=1e-5)
        if c.bag_of_words:
            self.bag_of_words_difference = self.linear_term("bag_of_words_difference")

    @nn.nowrap
    def examples(self) -> tuple[Any, ...]:
        e, ids = jnp.zeros((1, self.config.embedding_width)), jnp.ones((1, 2), jnp.int32)
        return e, ids, e, ids

    def encode(
        self, e: Float[Array, "B E"], hypothesis: Int[Array, "B S"], hypothesis_embedding: Float[Array, "B E"]
    ) -> Condition:
        """The encoder reads [</s>, target, </s>, hypothesis embedding, </s>, difference, </s>, start id, hypothesis],
        all layer-normalized: X = 5 + 3R + S positions. The start id is the original's quirk: masked, but it shifts
        positions.
        """
        c = self.config
        target, difference = e, e - hypothesis_embedding
        if c.standardize:
            target, difference = self.statistics(e), self.statistics.scale(difference)
            hypothesis_embedding = self.statistics(hypothesis_embedding)
        hypothesis = jnp.pad(hypothesis, ((0, 0), (1, 0)), constant_values=PAD)
        separator = self.t5.embed_tokens(jnp.full((len(e), 1), EOS))
        projections = self.projection_target, self.projection_hypothesis, self.projection_difference
        vectors = target, hypothesis_embedding, difference
        parts = [
            part for projection, x in zip(projections, vectors, strict=True) for part in (separator, projection(x))
        ]
        embeds = jnp.concatenate([*parts, separator, self.t5.embed_tokens(hypothesis)], axis=1)
        if c.input_norm:
            embeds = self.input_norm(embeds)
        ones = jnp.ones((len(e), embeds.shape[1] - hypothesis.shape[1]), jnp.int32)
        mask = jnp.concatenate([ones, (hypothesis != PAD).astype(jnp.int32)], axis=1)
        offset = None
        if c.bag_of_words:
            offset = self.bag_offset((target, self.bag_of_words), (difference, self.bag_of_words_difference))
        return self.t5.encode(embeds, mask), mask, offset
