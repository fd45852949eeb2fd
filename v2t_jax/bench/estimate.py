"""How long a recipe takes on hardware that isn't here, by arithmetic alone: `v2t bench estimate`."""

import dataclasses
import re
from typing import NamedTuple

import jax
import numpy as np

from v2t_jax.bench.aot import ROWS_A_CHIP, RecipeShapes
from v2t_jax.bench.peaks import Peak, published
from v2t_jax.config import Config, MeshConfig, StageConfig
from v2t_jax.errors import InputError

DEVICES = {"a100": "A100", "h100": "H100", "h200": "H200", "b200": "B200"}
DEVICES |= {name: f"TPU {name}" for name in ("v4", "v5e", "v5p", "v6e")}
CORES_A_CHIP = {"v4": 2, "v5p": 2}  # whose slices are named by TensorCores, so v5p-128 has 64 chips


class Hardware(NamedTuple):
    kind: str
    devices: int
    peak: Peak  # of each


class Estimate(NamedTuple):
    """A part of a recipe's work. Nothing of it was measured."""

    part: str
    runs: float  # steps of training, or batches of embeddings
    flops: float  # of a run, on all devices
    bound: str  # what takes longest at the peak: arithmetic or memory
    hours: float
    device_hours: float


def hardware(name: str) -> Hardware:
    """Such as h100, h100x8, v5e-16 or v5p-128; a slice's number is the cloud's, which counts cores of v4 and v5p."""
    found = re.fullmatch(r"(\w+?)(?:[x-](\d+))?", name)
    kind, count = (found[1], int(found[2] or 1)) if found else ("", 0)
    cores = CORES_A_CHIP.get(kind, 1) if found and found[2] else 1
    if kind not in DEVICES or count < 1 or count % cores:
        known = ", ".join(DEVICES)
        raise InputError(
            f"There is no hardware {name!r}: give one of {known} and a number, as h100x8, v5e-16 or v5p-128."
        )
    peak = published(DEVICES[kind])
    assert peak is not None
    return Hardware(DEVICES[kind], count // cores, peak)


def estimate(
    config: Config, on: Hardware, mfu: float, num_vectors: int, num_steps: int, sequence_beam_width: int
) -> list[Estimate]:
    """The recipe's stages, each on its batch split evenly over the devices, and the inversion of `num_vectors`.

    A run takes the roofline's time, the longer of arithmetic and memory, divided by `mfu`. Left out are the network
    between devices, reading the data, compiling, evaluations and checkpoints.
    """
    if not 0 < mfu <= 1:
        raise InputError(f"mfu is {mfu}; give a share of the peak above 0, at most 1.")
    shapes = RecipeShapes(dataclasses.replace(config, mesh=MeshConfig()), jax.devices()[:1])

    def part(name: str, runs: float, flops: float, work: np.ndarray) -> Estimate:
        times = {"arithmetic": work[0] / on.peak.flops, "memory": work[1] / on.peak.bandwidth}
        bound = max(times, key=lambda name: times[name])
        hours = runs * float(times[bound]) / mfu / 3600
        return Estimate(name, runs, flops, bound, hours, hours * on.devices)

    found = []
    for stage in config.stages:
        settings: StageConfig = getattr(config, stage)
        least = settings.optimizer.accumulate_steps * 2 ** (config.partial_hypotheses + config.edited_hypotheses)
        rows = -(-settings.batch_size // (on.devices * least)) * least
        run, flops = shapes.train_work(stage, rows)
        flops *= settings.batch_size / rows
        found.append(part(f"train {stage}", settings.num_steps, flops, run))
    if shapes.embedder is not None:  # otherwise the endpoint decides
        run = shapes.loop_work(sequence_beam_width, num_steps, ROWS_A_CHIP)
        batches, flops = num_vectors / (ROWS_A_CHIP * on.devices), float(run[0]) * on.devices
        found.append(part(f"invert {num_vectors:,} vectors", batches, flops, run))
    return found
