"""Speed beside PyTorch: `v2t bench decode` and `v2t bench train`.

Both sides hold the same random float32 weights, do the same work (which is checked), use the same cores and take turns
in one process, so that whatever else the machine is doing slows both. Importing these modules doesn't import torch:
`load_torch` does, when a benchmark runs, and nothing else in the package.
"""

import dataclasses
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from v2t_jax.config import T5_SIZES, T5Config
from v2t_jax.errors import InputError

T5_SMALL = dataclasses.replace(T5_SIZES["t5-small"], dropout_rate=0.0)
T5_BASE = dataclasses.replace(T5_SIZES["t5-base"], dropout_rate=0.0)


class Turn(NamedTuple):
    """What one call took."""

    wall: float  # seconds
    cpu: float  # processor seconds of all threads: what is left to compare by when others use the machine too


@dataclass(frozen=True)
class Comparison:
    """Turn i of ours was next to turn i of theirs."""

    name: str
    ours: tuple[Turn, ...]
    torch: tuple[Turn, ...]

    @property
    def speedup(self) -> float:
        """The median over turns of torch's time by ours: above 1 we are faster."""
        return statistics.median(t.wall / o.wall for o, t in zip(self.ours, self.torch, strict=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ours_seconds": statistics.median(turn.wall for turn in self.ours),
            "torch_seconds": statistics.median(turn.wall for turn in self.torch),
            "speedup": self.speedup,
            "ours_cpu_seconds": statistics.median(turn.cpu for turn in self.ours),
            "torch_cpu_seconds": statistics.median(turn.cpu for turn in self.torch),
            "turns": {
                "ours": [turn._asdict() for turn in self.ours],
                "torch": [turn._asdict() for turn in self.torch],
            },
        }


def num_cores() -> int:
    """Cores this process may use: what XLA takes, and what torch is told to take."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_torch() -> Any:
    """The torch module, set to `num_cores()` threads.

    Raises:
        InputError: it isn't installed.
    """
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise InputError(
            "This benchmark needs PyTorch, which isn't installed here: `pip install torch`, "
            "or run it with .venv-oracle/bin/python, which `make oracle` sets up."
        ) from error
    torch.set_num_threads(num_cores())
    return torch


def torch_t5(config: T5Config, seed: int = 0) -> Any:
    """A `T5ForConditionalGeneration` of these sizes with random float32 weights, in evaluation mode."""
    torch = load_torch()
    transformers = importlib.import_module("transformers")
    torch.manual_seed(seed)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_heads=config.num_heads,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            feed_forward_proj=config.feed_forward,
            tie_word_embeddings=config.tie_word_embeddings,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
            layer_norm_epsilon=config.layer_norm_epsilon,
            dropout_rate=config.dropout_rate,
            decoder_start_token_id=0,
        )
    )
    return model.float().eval()


def to_numpy(module: Any) -> dict[str, np.ndarray]:
    """A torch module's state dict as arrays that share its memory."""
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def take_turns(name: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> Comparison:
    """Times both `repeats` times, ours, theirs, ours, theirs ...; both must return only when their work is done.

    Neither is warmed up here: callers have run both once, to compare what they return.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; take at least one turn.")

    def turn(run: Callable[[], object]) -> Turn:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return Turn(time.perf_counter() - wall, time.process_time() - cpu)

    turns = [(turn(ours), turn(theirs)) for _ in range(repeats)]
    return Comparison(name, tuple(pair[0] for pair in turns), tuple(pair[1] for pair in turns))


def report(comparisons: list[Comparison], as_json: bool) -> None:
    """Prints medians and ratios to stdout, as lines or as one JSON document."""
    import jax
    import transformers

    versions = {"jax": jax.__version__, "torch": load_torch().__version__, "transformers": transformers.__version__}
    if as_json:
        print(json.dumps({"cores": num_cores(), **versions, "results": [c.to_dict() for c in comparisons]}))
        return
    print(f"{num_cores()} cores, float32, " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    for c in comparisons:
        r = c.to_dict()
        print(
            f"{c.name}: v2t_jax {r['ours_seconds']:.3f} s, torch {r['torch_seconds']:.3f} s, "
            f"speed-up {c.speedup:.2f}x (median of {len(c.ours)} turns); "
            f"processor time {r['ours_cpu_seconds']:.2f} s and {r['torch_cpu_seconds']:.2f} s"
        )
