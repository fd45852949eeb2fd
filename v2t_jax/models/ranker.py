"""The ranker: which words a text has that a hypothesis lacks, and which the hypothesis has too many.

It sees only the two embeddings, not the order of words, and costs less than one more text to embed. Guided edits rank
words by it (inversion/edits.py).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.config import ModelConfig, Stage
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.inverter import EmbeddingToText, Inverter
from v2t_jax.models.layers import Dense, Network, look_up, matmul_float32


class Ranker(Network):
    """A perceptron that reads e, ê and the direction of e - ê, and answers with points in the space of word vectors."""

    config: ModelConfig

    PARAM_AXES = (
        (r"(input|hidden|linear|missing|surplus)/kernel", (None, None)),
        (r"(input|hidden)/bias", (None,)),
        (r"(missing|surplus)_bias", ("vocab",)),
    )

    @nn.nowrap
    def examples(self) -> tuple[Any, ...]:
        c = self.config
        e, ids = jnp.zeros((1, c.embedding_width)), jnp.ones((1, 2), jnp.int32)
        return jnp.zeros((c.t5.vocab_size, c.t5.d_model)), e, ids, e

    @nn.compact
    def __call__(
        self,
        table: Float[Array, "V D"],
        e: Float[Array, "B E"],
        hypothesis: Int[Array, "B L"],
        embedding: Float[Array, "B E"],
    ) -> tuple[Float[Array, "B V"], Float[Array, "B L"]]:
        """Of each word the logit of being what is missing, and of each of the hypothesis's the logit of being surplus.

        Args:
            table: the inverter's token embeddings.
            hypothesis, embedding: its ids, and its embedding ê.
        """
        width, words = self.config.embedding_width, self.config.t5.d_model
        table = (table - jnp.mean(table, axis=0, keepdims=True)) / jnp.std(table)
        difference = e - embedding
        # Near the target the difference is short, but its direction says as much.
        inputs = [_unit(x) * width**0.5 for x in (difference, e, embedding)]
        share = jnp.linalg.norm(difference, axis=1, keepdims=True) / jnp.linalg.norm(e, axis=1, keepdims=True)
        h = nn.gelu(Dense(4 * width, name="input")(jnp.concatenate([*inputs, share], axis=1)))
        h = h + nn.gelu(Dense(4 * width, name="hidden")(h))

        def point(name: str, x: jax.Array) -> jax.Array:
            small = nn.initializers.normal(0.1 / x.shape[1] ** 0.5)
            return Dense(words, use_bias=False, kernel_init=small, name=name)(x) / words**0.5

        def bias(name: str) -> jax.Array:
            return self.param(name, nn.initializers.zeros, (len(table),))

        missing = matmul_float32(point("linear", inputs[0]) + point("missing", h), table, jnp.float32, True)
        surplus = jnp.sum(point("surplus", h)[:, None] * look_up(table, hypothesis), axis=2)
        return missing + bias("missing_bias")[None], surplus + look_up(bias("surplus_bias"), hypothesis)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)


NETWORKS: dict[Stage, type[EmbeddingToText] | type[Ranker]] = {
    "inverter": Inverter,
    "corrector": Corrector,
    "ranker": Ranker,
}
