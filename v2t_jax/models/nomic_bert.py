"""nomic-bert (Nussbaum et al. 2024, "Nomic Embed"): BERT with rotary positions, a SwiGLU feed-forward and no biases."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.config import Dtype
from v2t_jax.models.layers import (
    ATTENTION_AXES,
    GATED_AXES,
    Params,
    gated_feed_forward,
    init_attention,
    init_gated_feed_forward,
    init_norm,
    init_table,
    layer_norm,
    mask_bias,
    rotary,
    self_attention,
)

PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"word_embedding", ("vocab", None)),
    (r"type_embedding", (None, None)),
    (r"(embedding_norm|layers/\w+_norm)/(scale|bias)", (None,)),
    *ATTENTION_AXES,
    *GATED_AXES,
)


@dataclass(frozen=True)
class NomicBertConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    type_vocab_size: int = 2
    rotary_theta: float = 1000.0
    layer_norm_epsilon: float = 1e-12
    dtype: Dtype = "float32"


def init(config: NomicBertConfig, key: jax.Array) -> Params:
    """Random parameters, float32: for tests and for shapes."""
    c, width = config, config.hidden_size
    keys = jax.random.split(key, 3)

    def layer(key: jax.Array) -> Params:
        k = jax.random.split(key)
        return {
            **init_attention(k[0], width, bias=False),
            "attention_norm": init_norm(width),
            **init_gated_feed_forward(k[1], width, c.intermediate_size),
            "output_norm": init_norm(width),
        }

    return {
        "word_embedding": init_table(keys[0], c.vocab_size, width),
        "type_embedding": init_table(keys[1], c.type_vocab_size, width),
        "embedding_norm": init_norm(width),
        "layers": jax.vmap(layer)(jax.random.split(keys[2], c.num_layers)),
    }


def encode(
    config: NomicBertConfig, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Ids and mask of 0 and 1 -> hidden states, float32."""
    c, dtype = config, jnp.dtype(config.dtype)
    x = params["word_embedding"][ids] + params["type_embedding"][None, :1]
    x = layer_norm(params["embedding_norm"], x, c.layer_norm_epsilon)
    bias = mask_bias(mask)
    turn = rotary(ids.shape[1], c.hidden_size // c.num_heads, c.rotary_theta)

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        h = self_attention(p, x, bias, c.num_heads, dtype, turn=turn)
        x = layer_norm(p["attention_norm"], x + h.astype(jnp.float32), c.layer_norm_epsilon)
        h = gated_feed_forward(p, x, jax.nn.silu, dtype)
        return layer_norm(p["output_norm"], x + h.astype(jnp.float32), c.layer_norm_epsilon), None

    return jax.lax.scan(layer, x, params["layers"])[0]
