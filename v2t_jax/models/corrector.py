"""The corrector: embedding, hypothesis and the hypothesis' embedding -> better text (Morris et al. 2023, 3.1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.config import ModelConfig
from v2t_jax.models import inverter, t5
from v2t_jax.models.layers import Params, init_norm, layer_norm, split_key

EOS_ID, PAD_ID = 1, 0
LAYER_NORM_EPSILON = 1e-5
PARAM_AXES = (*inverter.PARAM_AXES, (r"input_norm/(scale|bias)", (None,)))


def init(config: ModelConfig, key: jax.Array) -> Params:
    """The original numbers its three projections 1 (target), 2 (difference), 3 (hypothesis); ours have names."""
    keys = jax.random.split(key, 4)
    params: Params = {
        "t5": t5.init(config.t5, keys[0]),
        "projection_target": inverter.init_projection(config, keys[1]),
        "projection_difference": inverter.init_projection(config, keys[2]),
        "projection_hypothesis": inverter.init_projection(config, keys[3]),
    }
    if config.input_norm:
        params["input_norm"] = init_norm(config.t5.d_model)
    if config.standardize:
        params["statistics"] = inverter.init_statistics(config)
    if config.bag_of_words:
        zeros = jnp.zeros((config.embedding_width, config.t5.d_model), jnp.float32)
        params |= {"bag_of_words": zeros, "bag_of_words_difference": zeros}
    return params


def encode(
    config: ModelConfig,
    params: Params,
    e: Float[Array, "B E"],
    hypothesis: Int[Array, "B S"],
    hypothesis_embedding: Float[Array, "B E"],
    dropout_key: jax.Array | None = None,
) -> tuple[Float[Array, "B X D"], Int[Array, "B X"], Float[Array, "B D"] | None]:
    """Embedding, hypothesis ids and their embedding -> T5 encoder output, mask, offset.

    The encoder reads [</s>, target, </s>, hypothesis embedding, </s>, difference, </s>, start id, hypothesis], all
    layer-normalized: X = 5 + 3R + S positions. The start id is the original's quirk: masked, but it shifts positions.
    """
    difference = e - hypothesis_embedding
    target = e
    if config.standardize:
        std = jax.lax.stop_gradient(params["statistics"]["std"])
        difference = difference / std[None]
        target = inverter.standardize(params, e)
        hypothesis_embedding = inverter.standardize(params, hypothesis_embedding)
    batch = e.shape[0]
    hypothesis = jnp.pad(hypothesis, ((0, 0), (1, 0)), constant_values=PAD_ID)
    separator = t5.embed_tokens(config.t5, params["t5"], jnp.full((batch, 1), EOS_ID))
    parts = [
        separator,
        inverter.project(config, params["projection_target"], target),
        separator,
        inverter.project(config, params["projection_hypothesis"], hypothesis_embedding),
        separator,
        inverter.project(config, params["projection_difference"], difference),
        separator,
        t5.embed_tokens(config.t5, params["t5"], hypothesis),
    ]
    embeds = jnp.concatenate(parts, axis=1)
    if config.input_norm:
        embeds = layer_norm(params["input_norm"], embeds, LAYER_NORM_EPSILON)
    ones = jnp.ones((batch, embeds.shape[1] - hypothesis.shape[1]), jnp.int32)
    mask = jnp.concatenate([ones, (hypothesis != PAD_ID).astype(jnp.int32)], axis=1)
    offset = None
    if config.bag_of_words:
        offset = inverter.bag_of_words(config, params["bag_of_words"], target)
        offset = offset + inverter.bag_of_words(config, params["bag_of_words_difference"], difference)
    return t5.encode(config.t5, params["t5"], embeds, mask, dropout_key), mask, offset


def logits(
    config: ModelConfig,
    params: Params,
    e: Float[Array, "B E"],
    hypothesis: Int[Array, "B S"],
    hypothesis_embedding: Float[Array, "B E"],
    labels: Int[Array, "B L"],
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B L V"]:
    """Teacher forcing; float32."""
    k_encode, k_decode = split_key(dropout_key, 2)
    encoded, mask, offset = encode(config, params, e, hypothesis, hypothesis_embedding, k_encode)
    return inverter.decode_logits(config, params, labels, encoded, mask, offset, k_decode)


def start_decoding(
    config: ModelConfig,
    params: Params,
    e: Float[Array, "B E"],
    hypothesis: Int[Array, "B S"],
    hypothesis_embedding: Float[Array, "B E"],
    num_beams: int = 1,
) -> tuple[Callable, t5.Cache]:
    """`tokens_to_logits` and its empty cache for rows = B * num_beams; see `t5.start_decoding`."""
    encoded, mask, offset = encode(config, params, e, hypothesis, hypothesis_embedding)
    return t5.start_decoding(
        config.t5,
        params["t5"],
        encoded,
        mask,
        max_length=config.max_length,
        num_beams=num_beams,
        hidden_offset=offset,
    )
