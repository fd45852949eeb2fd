"""The embedder under attack: encoder + pooling (+ dense) (+ L2), as sentence-transformers composes them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.errors import check_texts
from v2t_jax.models import bert
from v2t_jax.models.layers import NEGATIVE, Params, dense

Pooling = Literal["mean", "cls", "pooler", "last", "max"]
LENGTH_MULTIPLE = 16  # batches are padded to a multiple of this, so that few shapes are compiled


@dataclass(frozen=True)
class EmbedderConfig:
    encoder: bert.BertConfig
    pooling: Pooling = "mean"
    dense_activation: Literal["none", "identity", "tanh"] = "none"
    """none: there is no dense layer after pooling"""
    normalise: bool = True
    prefix: str = ""
    """put before every text"""
    max_length: int = 256
    """tokens a text is cut to, [CLS] and [SEP] included"""
    width: int = 384


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
    hidden = bert.encode(config.encoder, params["encoder"], ids, mask)
    if config.pooling == "pooler":
        pooled = bert.pool_first_token(params["encoder"], hidden)
    else:
        pooled = pool(config.pooling, hidden, mask)
    if config.dense_activation != "none":
        pooled = dense(params["dense"], pooled)
        pooled = jnp.tanh(pooled) if config.dense_activation == "tanh" else pooled
    if config.normalise:
        pooled = pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
    return pooled.astype(jnp.float32)


_embed = jax.jit(embed, static_argnums=0)


@runtime_checkable
class TextEmbedder(Protocol):
    """Texts in, vectors out: all that the evaluation and the bridged correction loop ask of an embedder."""

    name: str
    weights_sha256: str
    """of the weights; empty where they can't be seen"""

    @property
    def width(self) -> int:
        """E"""

    @property
    def normalised(self) -> bool:
        """Whether its vectors have length 1."""

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Embeddings [len(texts), E] float32; refuses blank texts with an `InputError`."""


def embed_texts(embedder: TextEmbedder, texts: Sequence[str]) -> np.ndarray:
    """Embeddings [len(texts), E] of texts that may repeat, or be blank: such a one has the zero vector."""
    vectors = dict.fromkeys(texts, np.zeros(embedder.width, np.float32))
    full = [text for text in vectors if text.strip()]
    if full:
        vectors |= dict(zip(full, embedder.embed(full), strict=True))
    return np.stack([vectors[text] for text in texts])


@dataclass
class Embedder:
    """An embedder whose network runs in JAX, with its weights and tokenizer."""

    name: str
    config: EmbedderConfig
    params: Params
    tokenizer: Tokenizer
    weights_sha256: str = ""

    def __post_init__(self) -> None:
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.config.max_length)

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def normalised(self) -> bool:
        return self.config.normalise

    def shortened(self, max_length: int) -> "Embedder":
        """The same embedder, cutting texts to so many tokens."""
        config = dataclasses.replace(self.config, max_length=max_length)
        # Truncation is a state of the tokenizer: this one gets a copy.
        return dataclasses.replace(self, config=config, tokenizer=Tokenizer.from_str(self.tokenizer.to_str()))

    def tokenise(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts -> ids [B, L] and mask [B, L], int32, L a multiple of 16."""
        encodings = self.tokenizer.encode_batch_fast([self.config.prefix + text for text in texts])
        rows = [encoding.ids for encoding in encodings]
        longest = max(map(len, rows))
        length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, self.config.encoder.max_positions)
        ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return ids, mask

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Embeddings [len(texts), E] float32.

        Raises:
            InputError: a text is empty or blank: its vector would say nothing.
        """
        check_texts(texts)
        # Similar lengths share a batch; the batch size is fixed (the last one is padded), so few shapes compile.
        order = np.argsort([len(text) for text in texts], kind="stable")
        result = np.zeros((len(texts), self.width), np.float32)
        batch_size = min(batch_size, 1 << (max(len(texts), 1) - 1).bit_length())
        with progress.bar(len(texts), "embedding", unit="texts") as update:
            for start in range(0, len(texts), batch_size):
                chosen = order[start : start + batch_size]
                ids, mask = self.tokenise([texts[i] for i in chosen])
                pad = batch_size - len(chosen)
                ids, mask = (np.pad(a, ((0, pad), (0, 0)), mode="edge") for a in (ids, mask))
                result[chosen] = np.asarray(_embed(self.config, self.params, ids, mask))[: len(chosen)]
                update(start + len(chosen))
        return result


@dataclass(frozen=True)
class PieceMap:
    """How a model's token ids become the embedder's, when they share word-pieces.

    `before` and `after` are the embedder ids that surround a text: [CLS] (and a prefix's pieces), and [SEP].
    """

    before: tuple[int, ...]
    after: int

    @classmethod
    def of(cls, embedder: Embedder) -> "PieceMap":
        around = embedder.tokenizer.encode(embedder.config.prefix).ids
        return cls(tuple(around[:-1]), around[-1])


def embed_pieces(
    config: EmbedderConfig, piece_map: PieceMap, params: Params, pieces: Int[Array, " V"], ids: Int[Array, "B L"]
) -> Float[Array, "B E"]:
    """Model ids -> embeddings, without leaving the device.

    Args:
        pieces: model id -> embedder id; model ids 0 and 1 are pad and end.
        ids: a text ends at its first pad or end id, or at L: [SEP] is put there in any case.
    """
    is_text = jnp.cumsum((ids <= 1).astype(jnp.int32), axis=1) == 0
    length = jnp.sum(is_text, axis=1, keepdims=True)  # [B, 1]
    num_before = len(piece_map.before)
    before = jnp.broadcast_to(jnp.asarray(piece_map.before, jnp.int32)[None], (ids.shape[0], num_before))
    text = jnp.pad(jnp.where(is_text, pieces[ids], 0), ((0, 0), (0, 1)))
    text = jnp.where(jnp.arange(text.shape[1])[None] == length, piece_map.after, text)
    whole = jnp.concatenate([before, text], axis=1)
    mask = (jnp.arange(whole.shape[1])[None] <= num_before + length).astype(jnp.int32)
    return embed(config, params, whole, mask)
