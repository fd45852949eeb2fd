"""Greedy decoding of a T5 beside transformers' `generate`: v2t bench decode

A turn is a whole call: encoder, cross-attention keys and every token. The ends of sequence are banned on both sides,
so that both make exactly `num_tokens` tokens a row, and both must make the same ones.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.bench import T5_BASE, Comparison, load_torch, report, take_turns, to_numpy, torch_t5
from v2t_jax.config import T5Config
from v2t_jax.decode.sample import greedy
from v2t_jax.decode.state import Special
from v2t_jax.errors import InputError
from v2t_jax.interop.hf_t5 import t5_from_huggingface
from v2t_jax.models import t5
from v2t_jax.models.layers import Params

SPECIAL = Special(start=0, eos=1, pad=0)


@dataclass(frozen=True)
class Decode:
    """Times greedy decoding of a T5-base-sized model (random float32 weights) beside transformers on PyTorch."""

    batch_size: tuple[int, ...] = (1, 32)
    """batch sizes to time, one after the other"""
    num_tokens: int = 32
    """generated tokens a row"""
    source_length: int = 16
    """encoder tokens a row"""
    repeats: int = 3
    """turns of each side"""
    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        report(compare(self), self.json)


def generate(config: T5Config, params: Params, ids: jax.Array, num_tokens: int) -> jax.Array:
    """Encoder ids [B, S] -> greedy ids [B, num_tokens], without ends of sequence."""
    mask = jnp.ones_like(ids)
    encoded = t5.encode(config, params, t5.embed_tokens(config, params, ids), mask)
    step, cache = t5.start_decoding(config, params, encoded, mask, max_length=num_tokens)
    return greedy(
        step,
        cache,
        batch_size=ids.shape[0],
        max_length=num_tokens,
        min_length=num_tokens,
        special=SPECIAL,
    ).ids


def compare(options: Decode, config: T5Config = T5_BASE) -> list[Comparison]:
    """One comparison for every batch size.

    Raises:
        InputError: torch isn't installed, or an option is out of range.
        AssertionError: the two made different tokens.
    """
    if min(options.batch_size, default=0) < 1 or options.num_tokens < 1 or options.source_length < 1:
        raise InputError("Give batch sizes, num_tokens and source_length of at least 1.")
    torch = load_torch()
    model = torch_t5(config)
    params = jax.tree.map(jnp.asarray, t5_from_huggingface(to_numpy(model), config))
    params = t5.unstack_decoder(params)
    jitted = jax.jit(generate, static_argnums=(0, 3))
    results = []
    for batch_size in options.batch_size:
        ids = np.random.default_rng(0).integers(2, config.vocab_size, (batch_size, options.source_length))
        ours_in, theirs_in = jnp.asarray(ids, jnp.int32), torch.from_numpy(ids)

        def ours(ids: jax.Array = ours_in) -> np.ndarray:
            return np.asarray(jitted(config, params, ids, options.num_tokens))

        def theirs(ids: Any = theirs_in) -> np.ndarray:
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=options.num_tokens,
                min_new_tokens=options.num_tokens,
            )
            return made[:, 1:].numpy()  # without the start id

        mine, reference = ours(), theirs()
        assert mine.shape == reference.shape == (batch_size, options.num_tokens)
        same = float(np.mean(mine == reference))
        assert same == 1.0, f"batch {batch_size}: only {same:.1%} of the tokens are the same"
        name = f"greedy decoding of {options.num_tokens} tokens, batch {batch_size}"
        results.append(take_turns(name, ours, theirs, options.repeats))
    return results
