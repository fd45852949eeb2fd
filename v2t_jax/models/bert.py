"""BERT encoder (Devlin et al. 2019), post-norm, exact GELU: the body of MiniLM, BGE, E5, GTE and their kin.

Pure functions around plain parameter dicts; the layers are stacked and scanned.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.models.layers import NEGATIVE, Params, attend, dense, init_dense, init_layer_norm, layer_norm

PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"word_embedding", ("vocab", None)),
    (r"(position|type)_embedding", (None, None)),
    (r"(embedding_norm|layers/\w+_norm)/(scale|bias)", (None,)),
    (r"layers/(query|key|value)/kernel", ("layers", "embed", "heads")),
    (r"layers/(query|key|value)/bias", ("layers", "heads")),
    (r"layers/attention_out/kernel", ("layers", "heads", "embed")),
    (r"layers/intermediate/kernel", ("layers", "embed", "mlp")),
    (r"layers/intermediate/bias", ("layers", "mlp")),
    (r"layers/output/kernel", ("layers", "mlp", "embed")),
    (r"layers/(attention_out|output)/bias", ("layers", None)),
    (r"pooler/kernel", ("embed", None)),
    (r"pooler/bias", (None,)),
)


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_epsilon: float = 1e-12
    pooler: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"


def init(config: BertConfig, key: jax.Array) -> Params:
    """Random parameters, float32: for tests and for shapes."""
    c, width = config, config.hidden_size
    keys = jax.random.split(key, 5)

    def layer(key: jax.Array) -> Params:
        k = jax.random.split(key, 6)
        return {
            "query": init_dense(k[0], width, width),
            "key": init_dense(k[1], width, width),
            "value": init_dense(k[2], width, width),
            "attention_out": init_dense(k[3], width, width),
            "attention_norm": init_layer_norm(width),
            "intermediate": init_dense(k[4], width, c.intermediate_size),
            "output": init_dense(k[5], c.intermediate_size, width),
            "output_norm": init_layer_norm(width),
        }

    def table(key: jax.Array, rows: int) -> jax.Array:
        return 0.02 * jax.random.normal(key, (rows, width), jnp.float32)

    params = {
        "word_embedding": table(keys[0], c.vocab_size),
        "position_embedding": table(keys[1], c.max_positions),
        "type_embedding": table(keys[2], c.type_vocab_size),
        "embedding_norm": init_layer_norm(width),
        "layers": jax.vmap(layer)(jax.random.split(keys[3], c.num_layers)),
    }
    if c.pooler:
        params["pooler"] = init_dense(keys[4], width, width)
    return params


def encode(
    config: BertConfig, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]
) -> Float[Array, "B L D"]:
    """Ids and mask of 0 and 1 -> hidden states, float32."""
    c, dtype = config, jnp.dtype(config.dtype)
    length = ids.shape[1]
    positions = params["position_embedding"][:length] + params["type_embedding"][:1]
    x = layer_norm(params["embedding_norm"], params["word_embedding"][ids] + positions[None], c.layer_norm_epsilon)
    bias = jnp.where(mask[:, None, None, :] != 0, 0.0, NEGATIVE).astype(jnp.float32)
    head_width = c.hidden_size // c.num_heads

    def heads(p: Params, x: jax.Array) -> jax.Array:
        return dense(p, x, dtype).reshape(*x.shape[:-1], c.num_heads, head_width)

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        h = attend(heads(p["query"], x), heads(p["key"], x), heads(p["value"], x), bias, scale=head_width**-0.5)
        h = dense(p["attention_out"], h.reshape(x.shape), dtype)
        x = layer_norm(p["attention_norm"], x + h.astype(jnp.float32), c.layer_norm_epsilon)
        h = jax.nn.gelu(dense(p["intermediate"], x, dtype), approximate=False)
        h = dense(p["output"], h, dtype)
        return layer_norm(p["output_norm"], x + h.astype(jnp.float32), c.layer_norm_epsilon), None

    return jax.lax.scan(layer, x, params["layers"])[0]


def pool_first_token(params: Params, hidden: Float[Array, "B L D"]) -> Float[Array, "B D"]:
    """BERT's own pooler: tanh of a dense layer on the first token."""
    return jnp.tanh(dense(params["pooler"], hidden[:, 0]))


def from_huggingface(config: dict[str, Any], dtype: Literal["float32", "bfloat16"] = "float32") -> BertConfig:
    """Sizes from a Hugging Face `config.json` of model_type bert."""
    return BertConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
        type_vocab_size=config["type_vocab_size"],
        layer_norm_epsilon=config["layer_norm_eps"],
        dtype=dtype,
    )
