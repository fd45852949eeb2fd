"""Decoding of T5, greedy or by beams: `v2t bench decode`. A call is the encoder, cross-attention keys, every token."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.bench.command import Measurement
from v2t_jax.bench.measure import Row, compile_program, measure
from v2t_jax.config import T5_SIZES, Dtype, T5Config
from v2t_jax.decode.beam import beam_search
from v2t_jax.decode.state import EOS, Cache
from v2t_jax.errors import check_whole
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import T5, round_weights, unstack_decoder

Size = Literal["t5-small", "t5-base", "t5-large"]


@dataclass(frozen=True, kw_only=True)
class Decode(Measurement):
    """Time decoding of a T5 with random weights, greedily or by beams."""

    size: Size = "t5-base"
    batch_size: tuple[int, ...] = (1, 32)  # batch sizes to time, one after the other
    num_beams: int = 1  # beams of each row; 1 is greedy
    num_tokens: int = 32  # generated tokens per row
    source_length: int = 16  # encoder tokens per row
    dtype: Dtype = "float32"  # of the arithmetic

    def __post_init__(self) -> None:
        check_whole("num_beams", self.num_beams, 1)
        check_whole("num_tokens", self.num_tokens, 1)
        check_whole("source_length", self.source_length, 1)
        check_whole("batch_size", min(self.batch_size, default=0), 1)

    def rows(self) -> Iterator[Row]:
        config = sized(self.size, self.dtype)
        params = unstack_decoder(round_weights(config, T5(config).init_params(jax.random.key(0))))
        jitted = jax.jit(generate, static_argnums=(0, 3, 4))
        for size in self.batch_size:
            ids = jnp.asarray(source_ids(config, size, self.source_length), jnp.int32)
            how = "greedy decoding" if self.num_beams == 1 else f"decoding by {self.num_beams} beams"
            name = f"{how} of {self.num_tokens} tokens, {self.size}, {self.dtype}, batch {size}"
            sizes = self.num_tokens, self.num_beams
            program = compile_program(jitted, config, params, ids, *sizes, while_turns=self.num_tokens)
            call = functools.partial(program.run, params, ids)
            yield measure(name, call, self.repeats, size, size * self.num_tokens, program, self.dtype)


def sized(size: str, dtype: Dtype = "float32") -> T5Config:
    """A published size of T5 without dropout."""
    return dataclasses.replace(T5_SIZES[size], dropout_rate=0.0, dtype=dtype)


def source_ids(config: T5Config, batch_size: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, config.vocab_size, (batch_size, length))


def generate(config: T5Config, params: Params, ids: jax.Array, num_tokens: int, num_beams: int = 1) -> jax.Array:
    """Encoder ids [B, S] -> the best ids [B, num_tokens]; the end of sequence is banned."""
    mask, t5 = jnp.ones_like(ids), T5(config)
    encoded = t5.apply({"params": params}, method=lambda t5: t5.encode(t5.embed_tokens(ids), mask))
    step, cache = t5.start_decoding(params, encoded, mask, max_length=num_tokens, num_beams=num_beams)

    def endless(ids: jax.Array, cache: Cache, index: jax.Array) -> tuple[jax.Array, Cache]:
        logits, cache = step(ids, cache, index)
        return logits.at[:, EOS].set(-jnp.inf), cache

    sizes: dict[str, Any] = {"batch_size": len(ids), "num_beams": num_beams, "num_return": 1, "max_length": num_tokens}
    return beam_search(endless, cache, **sizes)[0].ids[:, 0]
