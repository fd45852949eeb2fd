"""BERT encoder (Devlin et al. 2019), post-norm, exact GELU: the body of MiniLM, BGE, E5, GTE and their kin.

By its configuration it is DistilBERT (no token types), RoBERTa and XLM-R (positions that count from behind the pad id),
MPNet (those, no token types, and T5's relative position bias) and DPR's encoders too. Pure functions around plain
parameter dicts; the layers are stacked and scanned.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
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
    self_attention,
)
from v2t_jax.models.t5 import relative_buckets

PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"word_embedding", ("vocab", None)),
    (r"(position|type)_embedding|relative_bias", (None, None)),
    (r"(embedding_norm|layers/\w+_norm)/(scale|bias)", (None,)),
    *ATTENTION_AXES,
    (r"layers/(query|key|value)/bias", ("layers", "heads")),
    (r"layers/intermediate/kernel", ("layers", "embed", "mlp")),
    (r"layers/intermediate/bias", ("layers", "mlp")),
    (r"layers/output/kernel", ("layers", "mlp", "embed")),
    (r"layers/(attention_out|output)/bias", ("layers", None)),
    (r"pooler/kernel", ("embed", None)),
    (r"pooler/bias", (None,)),
)
RELATIVE_DISTANCE = 128  # from where on MPNet's relative positions share a bucket


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    """0: there are no token types"""
    layer_norm_epsilon: float = 1e-12
    pooler: bool = False
    dtype: Dtype = "float32"
    pad_id: int | None = None
    """if given, the first token's position is pad_id + 1, and pads are not counted (RoBERTa)"""
    relative_buckets: int = 0
    """of a relative position bias that all layers share (MPNet); 0: there is none"""


def init(config: BertConfig, key: jax.Array) -> Params:
    """Random parameters, float32: for tests and for shapes."""
    c, width = config, config.hidden_size
    keys = jax.random.split(key, 6)

    def layer(key: jax.Array) -> Params:
        k = jax.random.split(key, 3)
        return {
            **init_attention(k[0], width),
            "attention_norm": init_norm(width),
            "intermediate": init_dense(k[1], width, c.intermediate_size),
            "output": init_dense(k[2], c.intermediate_size, width),
            "output_norm": init_norm(width),
        }

    params = {
        "word_embedding": init_table(keys[0], c.vocab_size, width),
        "position_embedding": init_table(keys[1], c.max_positions, width),
        "embedding_norm": init_norm(width),
        "layers": jax.vmap(layer)(jax.random.split(keys[3], c.num_layers)),
    }
    if c.type_vocab_size:
        params["type_embedding"] = init_table(keys[2], c.type_vocab_size, width)
    if c.relative_buckets:
        params["relative_bias"] = init_table(keys[5], c.relative_buckets, c.num_heads)
    if c.pooler:
        params["pooler"] = init_dense(keys[4], width, width)
    return params


def encode(
    config: BertConfig, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Ids and mask of 0 and 1 -> hidden states, float32."""
    c, dtype = config, jnp.dtype(config.dtype)
    if c.pad_id is None:
        positions = params["position_embedding"][None, : ids.shape[1]]
    else:
        is_text = (ids != c.pad_id).astype(jnp.int32)
        positions = params["position_embedding"][c.pad_id + jnp.cumsum(is_text, axis=1) * is_text]
    if c.type_vocab_size:
        positions = positions + params["type_embedding"][None, :1]
    x = layer_norm(params["embedding_norm"], params["word_embedding"][ids] + positions, c.layer_norm_epsilon)
    bias = mask_bias(mask)
    if c.relative_buckets:
        index = np.arange(ids.shape[1])
        buckets = relative_buckets(index[None, :] - index[:, None], True, c.relative_buckets, RELATIVE_DISTANCE)
        bias = bias + jnp.transpose(params["relative_bias"][buckets], (2, 0, 1))[None]

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        h = self_attention(p, x, bias, c.num_heads, dtype)
        x = layer_norm(p["attention_norm"], x + h.astype(jnp.float32), c.layer_norm_epsilon)
        h = jax.nn.gelu(dense(p["intermediate"], x, dtype), approximate=False)
        h = dense(p["output"], h, dtype)
        return layer_norm(p["output_norm"], x + h.astype(jnp.float32), c.layer_norm_epsilon), None

    return jax.lax.scan(layer, x, params["layers"])[0]


def pool_first_token(params: Params, hidden: Float[Array, "B L D"]) -> Float[Array, "B D"]:
    """BERT's own pooler: tanh of a dense layer on the first token."""
    return jnp.tanh(dense(params["pooler"], hidden[:, 0]))
