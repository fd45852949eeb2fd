"""The inverter: embedding -> text (Morris et al. 2023, section 3.2), on T5."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v2t_jax.config import ModelConfig
from v2t_jax.decode.state import Cache
from v2t_jax.models.layers import Dense, Dropout, Network, Params, matmul_float32
from v2t_jax.models.t5 import T5, shift_right

# Encoder output [B, X, D], its mask [B, X], and the bag-of-words offset [B, D] of the last hidden state, or None.
Condition = tuple[jax.Array, jax.Array, jax.Array | None]


class Projection(nn.Module):
    """MLP(x) = Linear(E, E) -> dropout -> exact GELU -> Linear(E, D * R), of R pseudo-tokens."""

    config: ModelConfig
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B E"]) -> Float[Array, "B R D"]:
        c, dtype = self.config, jnp.dtype(self.config.t5.dtype)
        init = nn.initializers.normal(c.embedding_width**-0.5)
        h = Dense(c.embedding_width, dtype=dtype, kernel_init=init, name="hidden")(x)
        h = jax.nn.gelu(Dropout(self.dropout_rate)(h), approximate=False)
        h = Dense(c.t5.d_model * c.num_pseudo_tokens, dtype=dtype, kernel_init=init, name="output")(h)
        # The kernel's columns are sharded. A cut through pseudo-tokens would make XLA recompute all of them.
        h = nn.with_logical_constraint(h, ("batch", None))
        return h.reshape(x.shape[0], c.num_pseudo_tokens, c.t5.d_model)


class Statistics(nn.Module):
    """Mean and deviation [E] of the training texts' embeddings: constants, not trained."""

    width: int

    def setup(self) -> None:
        self.mean = self.param("mean", nn.initializers.zeros, (self.width,))
        self.std = self.param("std", nn.initializers.ones, (self.width,))

    def scale(self, difference: Float[Array, "B E"]) -> Float[Array, "B E"]:
        return difference / jax.lax.stop_gradient(self.std)[None]

    def __call__(self, e: Float[Array, "B E"]) -> Float[Array, "B E"]:
        return self.scale(e - jax.lax.stop_gradient(self.mean)[None])


class EmbeddingToText(Network):
    """What inverter and corrector share: T5 on a condition that `encode` makes of the inputs."""

    config: ModelConfig

    PARAM_AXES = (
        (r"projection\w*/hidden/kernel", (None, None)),
        (r"projection\w*/output/kernel", (None, "embed")),
        (r"projection\w*/(hidden|output)/bias", (None,)),
        (r"statistics/(mean|std)", (None,)),
        (r"bag_of_words\w*", (None, None)),
        *((f"t5/{path}", axes) for path, axes in T5.PARAM_AXES),
    )

    def setup(self) -> None:
        c = self.config
        self.t5 = T5(c.t5)
        if c.standardize:
            self.statistics = Statistics(c.embedding_width)
        if c.bag_of_words:
            self.bag_of_words = self.linear_term("bag_of_words")

    def encode(self, *inputs: Any) -> Condition:
        raise NotImplementedError

    def linear_term(self, name: str) -> jax.Array:
        """A matrix A of which `bag_offset` adds the term x A E^T to the logits; at first zero."""
        return self.param(name, nn.initializers.zeros, (self.config.embedding_width, self.config.t5.d_model))

    def bag_offset(self, *terms: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The sum of x A, for the last hidden state. A tied head scales that by 1/sqrt(D), but not this term."""
        c, dtype = self.config.t5, jnp.dtype(self.config.t5.dtype)
        scale = c.d_model**0.5 if c.tie_word_embeddings else 1.0
        return functools.reduce(
            jnp.add, (scale * matmul_float32(x, kernel, dtype).astype(dtype) for x, kernel in terms)
        )

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Teacher forcing: the inputs of `encode`, then labels [B, L] -> logits [B, L, V], float32.

        Position t predicts labels[:, t].
        """
        *inputs_, labels = inputs
        encoded, mask, offset = self.encode(*inputs_)
        hidden = self.t5.decode(shift_right(labels), encoded, mask)
        if offset is not None:
            hidden = hidden + offset[:, None].astype(hidden.dtype)
        return nn.with_logical_constraint(self.t5.logits(hidden), ("batch", None, "vocab"))

    @nn.nowrap
    def start_decoding(self, params: Params, *inputs: jax.Array, num_beams: int = 1) -> tuple[Callable, Cache]:
        """`tokens_to_logits` and its empty cache for rows = B * num_beams; see `T5.start_decoding`."""
        encoded, mask, offset = self.apply({"params": params}, *inputs, method="encode")
        options: Any = {"max_length": self.config.max_length, "num_beams": num_beams, "hidden_offset": offset}
        return T5(self.config.t5).start_decoding(params["t5"], encoded, mask, **options)


class Inverter(EmbeddingToText):
    """Embedding e [B, E] -> text."""

    def setup(self) -> None:
        super().setup()
        self.projection = Projection(self.config, self.config.projection_dropout)

    @nn.nowrap
    def examples(self) -> tuple[Any, ...]:
        return jnp.zeros((1, self.config.embedding_width)), jnp.ones((1, 2), jnp.int32)

    def encode(self, e: Float[Array, "B E"]) -> Condition:
        x = self.statistics(e) if self.config.standardize else e
        embeds = self.projection(x)
        mask = jnp.ones(embeds.shape[:2], jnp.int32)
        offset = self.bag_offset((x, self.bag_of_words)) if self.config.bag_of_words else None
        return self.t5.encode(embeds, mask), mask, offset
