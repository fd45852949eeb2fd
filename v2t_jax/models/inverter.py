"""The inverter: embedding -> text (Morris et al. 2023, section 3.2), on T5."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.config import ModelConfig
from v2t_jax.models import t5
from v2t_jax.models.layers import Params, dense, dropout, init_dense, matmul, split_key

PROJECTION_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"projection\w*/hidden/kernel", (None, None)),
    (r"projection\w*/output/kernel", (None, "embed")),
    (r"projection\w*/(hidden|output)/bias", (None,)),
    (r"statistics/(mean|std)", (None,)),
    (r"bag_of_words\w*", (None, None)),
)
PARAM_AXES = PROJECTION_AXES + tuple((f"t5/{path}", axes) for path, axes in t5.PARAM_AXES)


def init_projection(config: ModelConfig, key: jax.Array) -> Params:
    """MLP(x) = Linear(E, E) -> dropout -> exact GELU -> Linear(E, D * R), of R pseudo-tokens."""
    k_hidden, k_output = jax.random.split(key)
    width = config.embedding_width
    return {
        "hidden": init_dense(k_hidden, width, width),
        "output": init_dense(k_output, width, config.t5.d_model * config.num_pseudo_tokens),
    }


def project(
    config: ModelConfig, params: Params, x: Float[Array, "B E"], dropout_rate: float = 0.0, key: jax.Array | None = None
) -> Float[Array, "B R D"]:
    """Embeddings -> R pseudo-tokens."""
    dtype = jnp.dtype(config.t5.dtype)
    hidden = dropout(dense(params["hidden"], x, dtype), dropout_rate, key)
    flat = dense(params["output"], jax.nn.gelu(hidden, approximate=False), dtype)
    # The kernel's columns are cut over devices; cut through pseudo-tokens, XLA would have to compute all of them anew.
    flat = nn.with_logical_constraint(flat, ("batch", None))
    return flat.reshape(x.shape[0], config.num_pseudo_tokens, config.t5.d_model)


def init_statistics(config: ModelConfig) -> Params:
    width = config.embedding_width
    return {"mean": jnp.zeros((width,), jnp.float32), "std": jnp.ones((width,), jnp.float32)}


def standardize(params: Params, e: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """(e - mean) / std with the statistics of the training texts."""
    statistics = jax.lax.stop_gradient(params["statistics"])
    return (e - statistics["mean"][None]) / statistics["std"][None]


def bag_of_words(config: ModelConfig, kernel: Float[Array, "E D"], x: Float[Array, "B E"]) -> Float[Array, "B D"]:
    """What, added to the last hidden state, adds the linear term x A E^T to the logits."""
    # A tied head scales hidden states by 1/sqrt(D); the term itself isn't scaled.
    scale = config.t5.d_model**0.5 if config.t5.tie_word_embeddings else 1.0
    return scale * matmul(x, kernel, jnp.dtype(config.t5.dtype))


def init(config: ModelConfig, key: jax.Array) -> Params:
    k_t5, k_projection = jax.random.split(key)
    params: Params = {"t5": t5.init(config.t5, k_t5), "projection": init_projection(config, k_projection)}
    if config.standardize:
        params["statistics"] = init_statistics(config)
    if config.bag_of_words:
        params["bag_of_words"] = jnp.zeros((config.embedding_width, config.t5.d_model), jnp.float32)
    return params


def encode(
    config: ModelConfig, params: Params, e: Float[Array, "B E"], dropout_key: jax.Array | None = None
) -> tuple[Float[Array, "B R D"], Int[Array, "B R"], Float[Array, "B D"] | None]:
    """Embeddings -> T5 encoder output, mask, and the bag-of-words offset or None."""
    k_projection, k_t5 = split_key(dropout_key, 2)
    x = standardize(params, e) if config.standardize else e
    embeds = project(config, params["projection"], x, config.projection_dropout, k_projection)
    mask = jnp.ones(embeds.shape[:2], jnp.int32)
    offset = None
    if config.bag_of_words:
        offset = bag_of_words(config, params["bag_of_words"], x)
    return t5.encode(config.t5, params["t5"], embeds, mask, k_t5), mask, offset


def logits(
    config: ModelConfig,
    params: Params,
    e: Float[Array, "B E"],
    labels: Int[Array, "B L"],
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B L V"]:
    """Teacher forcing; float32, position t predicting labels[:, t]."""
    k_encode, k_decode = split_key(dropout_key, 2)
    encoded, mask, offset = encode(config, params, e, k_encode)
    return decode_logits(config, params, labels, encoded, mask, offset, k_decode)


def decode_logits(
    config: ModelConfig,
    params: Params,
    labels: Int[Array, "B L"],
    encoded: Float[Array, "B S D"],
    mask: Int[Array, "B S"],
    offset: Float[Array, "B D"] | None,
    dropout_key: jax.Array | None,
) -> Float[Array, "B L V"]:
    """The decoder's half of teacher forcing, the same for inverter and corrector; float32."""
    hidden = t5.decode(config.t5, params["t5"], t5.shift_right(labels), encoded, mask, dropout_key)
    if offset is not None:
        hidden = hidden + offset[:, None].astype(hidden.dtype)
    return nn.with_logical_constraint(t5.logits(config.t5, params["t5"], hidden), ("batch", None, "vocab"))


def start_decoding(
    config: ModelConfig, params: Params, e: Float[Array, "B E"], num_beams: int = 1
) -> tuple[Callable, t5.Cache]:
    """`tokens_to_logits` and its empty cache for rows = B * num_beams; see `t5.start_decoding`."""
    encoded, mask, offset = encode(config, params, e)
    return t5.start_decoding(
        config.t5,
        params["t5"],
        encoded,
        mask,
        max_length=config.max_length,
        num_beams=num_beams,
        hidden_offset=offset,
    )
