"""CLIP's text encoder (Radford et al. 2021, section 2.4): pre-norm and causal. Its text is pooled at the end token."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.config import Dtype
from v2t_jax.models.layers import (
    ATTENTION_AXES,
    Params,
    dense,
    init_attention,
    init_dense,
    init_norm,
    init_table,
    layer_norm,
    mask_bias,
    reach_bias,
    self_attention,
)

PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"word_embedding", ("vocab", None)),
    (r"position_embedding", (None, None)),
    (r"(layers/\w+_norm|final_norm)/(scale|bias)", (None,)),
    *ATTENTION_AXES,
    (r"layers/(query|key|value)/bias", ("layers", "heads")),
    (r"layers/intermediate/kernel", ("layers", "embed", "mlp")),
    (r"layers/intermediate/bias", ("layers", "mlp")),
    (r"layers/output/kernel", ("layers", "mlp", "embed")),
    (r"layers/(attention_out|output)/bias", ("layers", None)),
)


@dataclass(frozen=True)
class ClipTextConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    activation: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_epsilon: float = 1e-5
    dtype: Dtype = "float32"


def init(config: ClipTextConfig, key: jax.Array) -> Params:
    """Random parameters, float32: for tests and for shapes."""
    c, width = config, config.hidden_size
    keys = jax.random.split(key, 3)

    def layer(key: jax.Array) -> Params:
        k = jax.random.split(key, 3)
        return {
            "attention_norm": init_norm(width),
            **init_attention(k[0], width),
            "feed_forward_norm": init_norm(width),
            "intermediate": init_dense(k[1], width, c.intermediate_size),
            "output": init_dense(k[2], c.intermediate_size, width),
        }

    return {
        "word_embedding": init_table(keys[0], c.vocab_size, width),
        "position_embedding": init_table(keys[1], c.max_positions, width),
        "layers": jax.vmap(layer)(jax.random.split(keys[2], c.num_layers)),
        "final_norm": init_norm(width),
    }


def encode(
    config: ClipTextConfig, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Ids and mask of 0 and 1 -> hidden states, float32."""
    c, dtype, length = config, jnp.dtype(config.dtype), ids.shape[1]
    bias = mask_bias(mask) + reach_bias(length, causal=True)

    def activation(x: jax.Array) -> jax.Array:
        return x * jax.nn.sigmoid(1.702 * x) if c.activation == "quick_gelu" else jax.nn.gelu(x, approximate=False)

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        h = self_attention(p, layer_norm(p["attention_norm"], x, c.layer_norm_epsilon), bias, c.num_heads, dtype)
        x = x + h.astype(jnp.float32)
        h = dense(p["intermediate"], layer_norm(p["feed_forward_norm"], x, c.layer_norm_epsilon), dtype)
        return x + dense(p["output"], activation(h), dtype).astype(jnp.float32), None

    x = params["word_embedding"][ids] + params["position_embedding"][None, :length]
    x = jax.lax.scan(layer, x, params["layers"])[0]
    return layer_norm(params["final_norm"], x, c.layer_norm_epsilon)
