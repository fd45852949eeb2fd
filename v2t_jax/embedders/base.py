"""Text embedders: the protocol, what identifies one, the one whose network runs here, and quantized vectors."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

import jax
import msgspec
import numpy as np
from msgspec import Meta
from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.config import Dtype
from v2t_jax.data.vector_file import whole_numbers
from v2t_jax.errors import InputError, as_numpy, check_texts, check_whole
from v2t_jax.models.embedder import EmbedderConfig, Layer, Pooling, TokenMap, embed, unstacked_on_cpu
from v2t_jax.models.layers import Params

Precision = Literal["float32", "int8", "binary"]
TOKENIZED_TEXTS = 16_384  # at a time, and sorted by length
AT_ONCE = 3  # batches under way: one alone leaves part of a CPU's cores idle

_embed = jax.jit(embed, static_argnums=0)


def quantize(vectors: np.ndarray, precision: Precision, ranges: np.ndarray | None = None) -> np.ndarray:
    """Embeddings [n, E] as vector stores keep them, and as sentence-transformers' `quantize_embeddings` makes them.

    int8 cuts each dimension's range into 256 steps: `ranges` [2, E], by default smallest and largest of `vectors`; give
    those of a large sample to make batches comparable. binary keeps the signs, as [n, ceil(E / 8)] int8: eight
    dimensions a byte less 128, the first in the highest bit.
    """
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
    if precision == "float32":
        return vectors.astype(np.float32)
    if precision != "int8":
        raise InputError(f"precision is {precision!r}; choose {', '.join(get_args(Precision))}.")
    low, high = ranges_of(vectors) if ranges is None else ranges
    step = (high - low) / 255
    steps = np.floor((vectors - low[None]) / np.where(step == 0, 1, step)[None])
    return (np.clip(steps, 0, 255) - 128).astype(np.int8)


def ranges_of(vectors: np.ndarray) -> np.ndarray:
    """The smallest and the largest value of each dimension, [2, E], of vectors [n, E]."""
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)])


def is_signed(quantized: np.ndarray) -> bool:
    """Whether bytes count from -128, as int8 does, by their type, or by themselves where a text file has none."""
    return quantized.dtype == np.int8 or (quantized.dtype != np.uint8 and bool((quantized < 0).any()))


def dequantize(vectors: Any, ranges: np.ndarray, signed: bool | None = None) -> np.ndarray:
    """Vectors [n, E] float32 of those that `quantize` made int8 with these ranges [2, E].

    Args:
        signed: False for uint8, which counts from 0; None: see `is_signed`.
    """
    vectors = as_numpy(vectors)
    if vectors.shape[-1] != ranges.shape[1] or not whole_numbers(vectors):
        found = f"{vectors.dtype} {vectors.shape[-1]} wide"
        raise InputError(f"The ranges are of int8 vectors {ranges.shape[1]} wide, but these are {found}; check both.")
    signed = is_signed(vectors) if signed is None else signed
    low, high = np.asarray(ranges, np.float32)
    middle = vectors.astype(np.float32) + (128.5 if signed else 0.5)  # of each step
    return low[None] + middle * ((high - low) / 255)[None]


def signs(packed: np.ndarray, width: int) -> np.ndarray:
    """Vectors [n, width] float32 of length 1, by signs [n, ceil(width / 8)] as `quantize` packs them, or as uint8."""
    unsigned = (packed.astype(np.int16) + (128 if is_signed(packed) else 0)).astype(np.uint8)
    bits = np.unpackbits(unsigned, axis=-1, count=width).astype(np.float32)
    return (2 * bits - 1) / np.float32(width) ** 0.5


@dataclass(frozen=True)
class EmbedderIdentity:
    """Everything that decides an embedder's vectors; None where it isn't known, as behind an API."""

    name: str  # where the embedder was found; it identifies the embedder only where the weights can't be seen
    weights_sha256: str = ""  # empty where the weights can't be seen
    pooling: Pooling | tuple[Pooling, ...] | None = None
    dense: tuple[Layer, ...] | None = None
    normalize: bool | None = None
    prefix: str | None = None
    width: int | None = None
    max_length: Annotated[int, Meta(ge=3)] | None = None  # room for [CLS], a token and [SEP]
    dtype: Dtype | None = None

    def to_dict(self) -> dict[str, Any]:
        """The known fields as JSON types."""
        return {name: value for name, value in json.loads(msgspec.json.encode(self)).items() if value is not None}


def differing_field(recorded: dict[str, Any], given: EmbedderIdentity, ignored: Sequence[str] = ()) -> str:
    """The first field in which an embedder differs from the one on record, an `EmbedderIdentity.to_dict()`; or "".

    Fields that either lacks may differ; names too, where the weights of both can be seen.
    """
    both_seen = recorded.get("weights_sha256") and given.weights_sha256
    skipped = {*ignored, "name" if both_seen else "weights_sha256"}
    fields = {name: value for name, value in given.to_dict().items() if name not in skipped}
    return next((name for name, value in fields.items() if recorded.get(name) not in (None, value)), "")


def check_identity(recorded: dict[str, Any], given: EmbedderIdentity, whose: str, ignored: Sequence[str] = ()) -> None:
    """Refuses an embedder that differs in a field from the one on record, that of `whose`."""
    if name := differing_field(recorded, given, ignored):
        made = f"{whose} was made with an embedder whose {name} is {recorded[name]!r}"
        value = given.to_dict()[name]
        raise InputError(f"{made}, but that of {given.name} is {value!r}: give the embedder it was made with.")


@runtime_checkable
class TextEmbedder(Protocol):
    """Texts in, vectors out: all that evaluation and a correction loop through the host ask of an embedder."""

    name: str
    weights_sha256: str  # empty where the weights can't be seen

    @property
    def width(self) -> int: ...

    @property
    def normalized(self) -> bool:
        """Whether its vectors have length 1."""

    @property
    def identity(self) -> EmbedderIdentity:
        """What decides its vectors, as far as it is known without asking it anything."""

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Embeddings [len(texts), E] float32; refuses blank texts with an `InputError`."""


def named_or_embedder(embedder: Any) -> Any:
    """An embedder as people give it: a name (or a path, as a name), or an object that embeds."""
    if isinstance(embedder, os.PathLike):
        return os.fspath(embedder)
    if not isinstance(embedder, str) and not hasattr(embedder, "embed"):
        given, advice = type(embedder).__name__, "v2t_jax.embedders.black_box.CallableEmbedder(function)"
        raise InputError(f"The embedder is of type {given}; give a name, a folder, an embedder, or {advice}.")
    return embedder


def embed_texts(embedder: TextEmbedder, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Embeddings [len(texts), E] of texts that may repeat, or be blank: such a one has the zero vector."""
    vectors = dict.fromkeys(texts, np.zeros(embedder.width, np.float32))
    full = [text for text in vectors if text.strip()]
    if full:
        vectors |= dict(zip(full, embedder.embed(full, batch_size), strict=True))
    return np.stack([vectors[text] for text in texts])


@dataclass
class JaxEmbedder:
    """An embedder whose network runs in JAX, with its weights and tokenizer."""

    name: str
    config: EmbedderConfig
    params: Params
    tokenizer: Tokenizer
    weights_sha256: str = ""

    def __post_init__(self) -> None:
        self.params = unstacked_on_cpu(self.params)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.config.max_length)

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def normalized(self) -> bool:
        return self.config.normalize

    @property
    def identity(self) -> EmbedderIdentity:
        names = ("pooling", "dense", "normalize", "prefix", "width", "max_length")
        fields = {name: getattr(self.config, name) for name in names}
        return EmbedderIdentity(self.name, self.weights_sha256, **fields, dtype=self.config.encoder.dtype)

    def shortened(self, max_length: int) -> "JaxEmbedder":
        """The same embedder, cutting texts to so many tokens."""
        config = dataclasses.replace(self.config, max_length=max_length)
        # Truncation is a state of the tokenizer: this one gets a copy.
        return dataclasses.replace(self, config=config, tokenizer=Tokenizer.from_str(self.tokenizer.to_str()))

    def tokenize(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts -> ids [B, L] and mask [B, L], int32, L by small steps."""
        return self._padded(self._encoded(texts))

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        return self.tokenizer.encode_batch_fast([self.config.prefix + text for text in texts])

    def _padded(self, encodings: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        longest = max(1, *map(len, encodings))
        step = max(4, 1 << (longest - 1).bit_length() >> 3)  # four to eight lengths for each doubling
        length = min(-(-longest // step) * step, self.config.max_length)
        for encoding in encodings:
            encoding.pad(length)
        ids = np.array([encoding.ids for encoding in encodings], np.int32)
        mask = np.array([encoding.attention_mask for encoding in encodings], np.int32)
        highest, vocab_size = ids.max(), self.config.encoder.vocab_size
        if highest >= vocab_size:  # JAX would read another piece's row
            wrong = f"The tokenizer of {self.name} gives the id {highest}, but its network's vocab_size is {vocab_size}"
            raise InputError(f"{wrong}: they don't belong together; download the embedder again.")
        return ids, mask

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        check_whole("batch_size", batch_size, 1)
        check_texts(texts)
        result, done = np.zeros((len(texts), self.width), np.float32), 0
        batch_size = min(batch_size, 1 << (max(len(texts), 1) - 1).bit_length())

        def embedded(batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            chosen, ids, mask = batch
            return chosen, np.asarray(_embed(self.config, self.params, ids, mask))[: len(chosen)]

        with progress.bar(len(texts), "embedding", unit="texts") as update, ThreadPoolExecutor(AT_ONCE) as pool:
            for first in range(0, len(texts), TOKENIZED_TEXTS):
                batches = self._batches(texts[first : first + TOKENIZED_TEXTS], batch_size)
                for chosen, vectors in pool.map(embedded, batches):
                    if not np.isfinite(vectors).all():
                        wrong = f"The embedder {self.name} gives NaN or infinite values"
                        raise InputError(f"{wrong}; its weights are damaged: download it again.")
                    result[first + chosen] = vectors
                    update(done := done + len(chosen))
        return result

    def _batches(self, texts: Sequence[str], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Texts' numbers, ids and mask, of texts of similar length; all of one size, so that few shapes compile."""
        encodings = self._encoded(texts)
        order = np.argsort([len(encoding) for encoding in encodings], kind="stable")
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            padded = self._padded([encodings[i] for i in chosen])
            missing = ((0, batch_size - len(chosen)), (0, 0))
            ids, mask = (np.pad(part, missing, mode="edge") for part in padded)
            yield chosen, ids, mask

    def token_map(self) -> TokenMap:
        """What surrounds a text, for `embed_model_ids`; the tokenizer must put at most one token after it."""
        # The space behind a prefix belongs to the text's first piece where it belongs to any.
        around = self.tokenizer.encode(self.config.prefix.rstrip()).ids
        behind = self.tokenizer.encode("a").special_tokens_mask[::-1]
        if behind[:1] == [0]:
            return TokenMap(tuple(around), None)
        if behind[:2] != [1, 0]:
            wrong = f"The tokenizer of {self.name} ends a text with several tokens of its own"
            raise InputError(f"{wrong}, so its pieces can't be a model's; give the model another tokenizer.")
        return TokenMap(tuple(around[:-1]), around[-1])


def shares_vocabulary(embedder: TextEmbedder, tokenizer: Tokenizer) -> bool:
    """Whether this tokenizer's ids are the embedder's own, so that they reach it without becoming text."""
    if not isinstance(embedder, JaxEmbedder):
        return False
    ours, theirs = (
        json.loads(one.to_str()) | {"truncation": None, "padding": None} for one in (embedder.tokenizer, tokenizer)
    )
    return ours == theirs
