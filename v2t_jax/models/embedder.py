"""The embedder under attack: encoder + pooling (+ dense layers) (+ L2), as sentence-transformers composes them."""

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.config import T5Config
from v2t_jax.models import bert, clip_text, llama, modernbert, nomic_bert, t5_encoder
from v2t_jax.models.layers import NEGATIVE, Params, dense

Pooling = Literal["mean", "cls", "pooler", "last", "max"]
Activation = Literal["identity", "tanh"]

EncoderConfig = (
    bert.BertConfig
    | T5Config
    | nomic_bert.NomicBertConfig
    | modernbert.ModernBertConfig
    | llama.LlamaConfig
    | clip_text.ClipTextConfig
)
# An encoder's configuration says which network it is: a module with init, encode and PARAM_AXES.
NETWORKS: dict[type, ModuleType] = {
    bert.BertConfig: bert,
    T5Config: t5_encoder,
    nomic_bert.NomicBertConfig: nomic_bert,
    modernbert.ModernBertConfig: modernbert,
    llama.LlamaConfig: llama,
    clip_text.ClipTextConfig: clip_text,
}


@dataclass(frozen=True)
class EmbedderConfig:
    encoder: EncoderConfig
    pooling: Pooling = "mean"
    dense: tuple[Activation, ...] = ()
    """the activation of each dense layer behind pooling"""
    normalize: bool = True
    prefix: str = ""
    """put before every text"""
    max_length: int = 256
    """tokens a text is cut to, special ones such as [CLS] and [SEP] included"""
    width: int = 384
    """E; where it is less than the network gives, the first E dimensions are kept (Matryoshka, Kusupati et al. 2022)"""


def pool(pooling: Pooling, hidden: Float[Array, "B L D"], mask: Int[Array, "B L"]) -> Float[Array, "B D"]:
    """A text's vector from its tokens'; positions with mask 0 don't count."""
    weights = mask.astype(hidden.dtype)[:, :, None]
    if pooling == "mean":
        return jnp.sum(hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
    if pooling == "max":
        return jnp.max(jnp.where(weights > 0, hidden, NEGATIVE), axis=1)
    if pooling == "last":
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return hidden[:, 0]


def embed(
    config: EmbedderConfig, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]
) -> Float[Array, "B E"]:
    """Tokenizer ids and mask -> embeddings, float32."""
    hidden = NETWORKS[type(config.encoder)].encode(config.encoder, params["encoder"], ids, mask).astype(jnp.float32)
    if config.pooling == "pooler":
        pooled = bert.pool_first_token(params["encoder"], hidden)
    else:
        pooled = pool(config.pooling, hidden, mask)
    for activation, layer in zip(config.dense, params.get("dense", ()), strict=True):
        pooled = dense(layer, pooled)
        pooled = jnp.tanh(pooled) if activation == "tanh" else pooled
    pooled = pooled[:, : config.width]
    if config.normalize:
        pooled = pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
    return pooled


@dataclass(frozen=True)
class TokenMap:
    """How a model's token ids become the embedder's, when they share word-pieces.

    `before` and `after` are the embedder ids that surround a text: [CLS] (and a prefix's pieces), and [SEP].
    """

    before: tuple[int, ...]
    after: int


def embed_model_ids(
    config: EmbedderConfig, piece_map: TokenMap, params: Params, pieces: Int[Array, " V"], ids: Int[Array, "B L"]
) -> Float[Array, "B E"]:
    """Model ids -> embeddings, without leaving the device.

    Args:
        pieces: model id -> embedder id; model ids 0 and 1 are pad and end.
        ids: a text ends at its first pad or end id, or at L: [SEP] is put there in any case. It is cut where the
            embedder's tokenizer cuts it, so that [SEP] fits.
    """
    ids = ids[:, : config.max_length - len(piece_map.before) - 1]
    is_text = jnp.cumsum((ids <= 1).astype(jnp.int32), axis=1) == 0
    length = jnp.sum(is_text, axis=1, keepdims=True)  # [B, 1]
    num_before = len(piece_map.before)
    before = jnp.broadcast_to(jnp.asarray(piece_map.before, jnp.int32)[None], (ids.shape[0], num_before))
    text = jnp.pad(jnp.where(is_text, pieces[ids], 0), ((0, 0), (0, 1)))
    text = jnp.where(jnp.arange(text.shape[1])[None] == length, piece_map.after, text)
    whole = jnp.concatenate([before, text], axis=1)
    mask = (jnp.arange(whole.shape[1])[None] <= num_before + length).astype(jnp.int32)
    return embed(config, params, whole, mask)
