"""An embedder: `v2t bench embed`. Its network alone, on tokens, and the whole way from texts to vectors."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from v2t_jax.bench.command import Measurement
from v2t_jax.bench.measure import Row, compile_program, measure
from v2t_jax.data.readers import open_source
from v2t_jax.embedders.base import JaxEmbedder
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError, check_whole
from v2t_jax.models.embedder import embed

BATCHES = 8  # that the texts of the whole way make: several are under way at a time


@dataclass(frozen=True, kw_only=True)
class Embed(Measurement):
    """Time an embedder: the network alone, and the whole way from texts to vectors."""

    embedder: str = "all-MiniLM-L6-v2"  # a name that `v2t embedders` lists, or a folder
    num_tokens: int = 32  # tokens of every text, with those that the tokenizer puts around it
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_whole("num_tokens", self.num_tokens, 4)
        check_whole("batch_size", self.batch_size, 1)

    def rows(self) -> Iterator[Row]:
        embedder = load_embedder(self.embedder)
        if self.num_tokens > (most := embedder.config.max_length):
            raise InputError(f"{embedder.name} reads {most} tokens of a text; give num_tokens={most} or less.")
        embedder = embedder.shortened(self.num_tokens)
        dtype, size = embedder.config.encoder.dtype, self.batch_size
        texts = long_texts(embedder, BATCHES * size)
        ids, mask = embedder.tokenize(texts[:size])
        program = compile_program(jax.jit(embed, static_argnums=0), embedder.config, embedder.params, ids, mask)
        what = f"{embedder.name}, {dtype}, {self.num_tokens} tokens, batch {size}"
        call = functools.partial(program.run, embedder.params, ids, mask)
        yield measure(f"embedder's network, {what}", call, self.repeats, size, int(mask.sum()), program, dtype)
        whole = functools.partial(embedder.embed, texts, size)
        tokens = int(embedder.tokenize(texts)[1].sum())
        yield measure(f"texts to vectors, {len(texts)} texts, {what}", whole, self.repeats, len(texts), tokens)


def long_texts(embedder: JaxEmbedder, count: int) -> list[str]:
    """Texts that have all the tokens that the embedder reads, and hardly more: packaged ones, one behind another."""
    words = " ".join(open_source("wordnet")).split()
    most = embedder.config.max_length
    starts = [(i * most) % max(1, len(words) - most) for i in range(count)]
    encodings = embedder.tokenizer.encode_batch([" ".join(words[start : start + most]) for start in starts])
    ends = [max(end for _, end in encoding.offsets) for encoding in encodings]
    return [" ".join(words[start : start + most])[:end] for start, end in zip(starts, ends, strict=True)]
