"""Llama-style decoders as encoders: Llama and Mistral (E5-Mistral), Qwen3 (Qwen3-Embedding), Gemma 3 (EmbeddingGemma).

Pre-norm with RMSNorm, rotary positions, grouped queries, gated feed-forward, no biases (Touvron et al. 2023; Jiang et
al. 2023; Qwen3 and Gemma 3 technical reports, 2025). What sets the four apart is in the configuration.
"""

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
    mask_bias,
    reach_bias,
    rms_norm,
    rotary,
    self_attention,
)

PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"word_embedding", ("vocab", None)),
    (r"(layers/\w+_norm|final_norm)/scale", (None,)),
    *ATTENTION_AXES,
    *GATED_AXES,
)


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_width: int
    intermediate_size: int
    local: tuple[bool, ...]
    """of each layer: whether its tokens see only those at most `reach` away"""
    reach: int = 0
    causal: bool = True
    rotary_theta: float = 10_000.0
    local_theta: float = 10_000.0
    """of local layers"""
    rms_norm_epsilon: float = 1e-6
    head_norms: bool = False
    """each head's queries and keys are normalized (Qwen3, Gemma 3)"""
    gemma: bool = False
    """norms behind attention and feed-forward too, scales stored less 1, scaled embeddings, tanh-GELU (Gemma 3)"""
    attention_scale: float | None = None
    """of the scores; by default 1/sqrt(head_width)"""
    dtype: Dtype = "float32"


_NORMS: dict[bool, tuple[str, ...]] = {
    False: ("attention_norm", "feed_forward_norm"),
    True: ("attention_norm", "attention_out_norm", "feed_forward_norm", "feed_forward_out_norm"),
}


def init(config: LlamaConfig, key: jax.Array) -> Params:
    """Random parameters, float32: for tests and for shapes."""
    c, width = config, config.hidden_size
    keys = jax.random.split(key)

    def layer(key: jax.Array) -> Params:
        k = jax.random.split(key)
        heads = ("query_norm", "key_norm") if c.head_norms else ()
        sizes = (c.num_heads * c.head_width, c.num_key_value_heads * c.head_width)
        return {
            **init_attention(k[0], width, *sizes, bias=False),
            **init_gated_feed_forward(k[1], width, c.intermediate_size),
            **{name: init_norm(width, bias=False) for name in _NORMS[c.gemma]},
            **{name: init_norm(c.head_width, bias=False) for name in heads},
        }

    return {
        "word_embedding": init_table(keys[0], c.vocab_size, width),
        "layers": jax.vmap(layer)(jax.random.split(keys[1], len(c.local))),
        "final_norm": init_norm(width, bias=False),
    }


def encode(
    config: LlamaConfig, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Ids and mask of 0 and 1 -> hidden states, float32. Padding stands behind the text."""
    c, dtype, length = config, jnp.dtype(config.dtype), ids.shape[1]
    # Index 0 is for global layers, 1 for local ones.
    masks = jnp.stack([reach_bias(length, causal=c.causal), reach_bias(length, causal=c.causal, reach=c.reach)])
    thetas = (c.rotary_theta, c.local_theta)
    turns = jax.tree.map(lambda *a: jnp.stack(a), *(rotary(length, c.head_width, theta) for theta in thetas))

    def norm(p: Params, x: jax.Array) -> jax.Array:
        return rms_norm({"scale": p["scale"] + 1} if c.gemma else p, x, c.rms_norm_epsilon)

    def activation(x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x, approximate=True) if c.gemma else jax.nn.silu(x)

    def layer(x: jax.Array, scanned: tuple[Params, jax.Array]) -> tuple[jax.Array, None]:
        p, local = scanned
        h = self_attention(
            p,
            norm(p["attention_norm"], x),
            mask_bias(mask) + masks[local],
            c.num_heads,
            dtype,
            turn=(turns[0][local], turns[1][local]),
            norm=norm if c.head_norms else None,
            scale=c.attention_scale,
        ).astype(jnp.float32)
        x = x + (norm(p["attention_out_norm"], h) if c.gemma else h)
        h = gated_feed_forward(p, norm(p["feed_forward_norm"], x), activation, dtype).astype(jnp.float32)
        return x + (norm(p["feed_forward_out_norm"], h) if c.gemma else h), None

    x = params["word_embedding"][ids].astype(jnp.float32)
    if c.gemma:
        x = x * c.hidden_size**0.5
    x = jax.lax.scan(layer, x, (params["layers"], jnp.asarray(c.local, jnp.int32)))[0]
    return norm(params["final_norm"], x)
