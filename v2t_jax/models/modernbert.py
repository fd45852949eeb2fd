"""ModernBERT (Warner et al. 2024): pre-norm, rotary positions, GeGLU, no biases, and local attention in most layers."""

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
    reach_bias,
    rotary,
    self_attention,
)

PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"word_embedding", ("vocab", None)),
    (r"(embedding_norm|layers/\w+_norm|final_norm)/scale", (None,)),
    *ATTENTION_AXES,
    *GATED_AXES,
)


@dataclass(frozen=True)
class ModernBertConfig:
    vocab_size: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    local: tuple[bool, ...]
    """of each layer: whether its tokens see only those at most `reach` away"""
    reach: int = 64
    local_theta: float = 10_000.0
    global_theta: float = 160_000.0
    layer_norm_epsilon: float = 1e-5
    dtype: Dtype = "float32"


def init(config: ModernBertConfig, key: jax.Array) -> Params:
    """Random parameters, float32: for tests and for shapes. The first layer's `attention_norm` is not used."""
    c, width = config, config.hidden_size
    keys = jax.random.split(key)

    def layer(key: jax.Array) -> Params:
        k = jax.random.split(key)
        return {
            "attention_norm": init_norm(width, bias=False),
            **init_attention(k[0], width, bias=False),
            "feed_forward_norm": init_norm(width, bias=False),
            **init_gated_feed_forward(k[1], width, c.intermediate_size),
        }

    return {
        "word_embedding": init_table(keys[0], c.vocab_size, width),
        "embedding_norm": init_norm(width, bias=False),
        "layers": jax.vmap(layer)(jax.random.split(keys[1], len(c.local))),
        "final_norm": init_norm(width, bias=False),
    }


def encode(
    config: ModernBertConfig, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Ids and mask of 0 and 1 -> hidden states, float32."""
    c, dtype, length = config, jnp.dtype(config.dtype), ids.shape[1]
    x = layer_norm(params["embedding_norm"], params["word_embedding"][ids], c.layer_norm_epsilon)
    head_width = c.hidden_size // c.num_heads
    # Index 0 is for global layers, 1 for local ones.
    masks = jnp.stack([reach_bias(length, causal=False), reach_bias(length, causal=False, reach=c.reach)])
    turns = jax.tree.map(
        lambda *a: jnp.stack(a), *(rotary(length, head_width, t) for t in (c.global_theta, c.local_theta))
    )

    def layer(x: jax.Array, scanned: tuple[Params, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        p, local, is_first = scanned
        h = jnp.where(is_first, x, layer_norm(p["attention_norm"], x, c.layer_norm_epsilon))
        turn = (turns[0][local], turns[1][local])
        h = self_attention(p, h, mask_bias(mask) + masks[local], c.num_heads, dtype, turn=turn)
        x = x + h.astype(jnp.float32)
        h = layer_norm(p["feed_forward_norm"], x, c.layer_norm_epsilon)
        h = gated_feed_forward(p, h, lambda a: jax.nn.gelu(a, approximate=False), dtype)
        return x + h.astype(jnp.float32), None

    scanned = (params["layers"], jnp.asarray(c.local, jnp.int32), jnp.arange(len(c.local)) == 0)
    x = jax.lax.scan(layer, x, scanned)[0]
    return layer_norm(params["final_norm"], x, c.layer_norm_epsilon)
