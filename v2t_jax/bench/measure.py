"""What every measurement says: time to compile, time of a call and its spread, work, share of the peak."""

import dataclasses
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from v2t_jax import __version__, progress
from v2t_jax.bench.peaks import Peak, peak_of
from v2t_jax.bench.roofline import memory_of, work
from v2t_jax.errors import InputError

PACKAGES = ("jax", "jaxlib", "flax", "numpy")


class Turn(NamedTuple):
    """Seconds of one call: elapsed, and processor time of all threads, which other programs disturb less."""

    wall: float
    cpu: float


class Program(NamedTuple):
    """A compiled program and what a call of it has to do."""

    run: Any  # of the arguments that aren't static
    compile_seconds: float  # tracing included
    flops: float | None  # of its matrix products, counted as in roofline.py; None: it depends on the arguments
    moved: float | None  # bytes of their operands and results
    xla_flops: float | None  # by XLA's cost analysis: elementwise operations too, but a loop's body only once
    needed: int | None  # bytes of device memory: arguments, results and temporaries; None: the backend doesn't tell


@dataclass(frozen=True)
class Row:
    """One measurement. What has no meaning for it, or isn't known, is None."""

    name: str
    seconds: float  # of a call, median of the turns
    spread: float  # seconds between the turns' quartiles
    cpu_seconds: float  # median
    turns: Sequence[Turn]
    sequences_per_second: float
    tokens_per_second: float | None = None  # without padding
    compile_seconds: float | None = None
    flops: float | None = None  # of a call, as in `Program`
    moved: float | None = None
    xla_flops: float | None = None
    needed: int | None = None
    tflops_per_second: float | None = None
    mfu: float | None = None  # share of the peak FLOP/s
    peak: Peak | None = None
    peak_bytes: int | None = None  # most device memory that this process has used so far

    def __str__(self) -> str:
        compiled = "" if self.compile_seconds is None else f", compiled in {self.compile_seconds:.1f} s"
        tokens = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.0f} tokens/s"
        times = f"{self.seconds:.3f} s (median of {len(self.turns)}, quartiles {self.spread:.3f} s apart{compiled})"
        lines = [f"{self.name}:", f"{times}, {self.sequences_per_second:,.1f} sequences/s{tokens}"]
        if self.flops is not None and self.moved is not None and self.peak is not None:
            done = f"{self.flops / 1e9:,.1f} GFLOP a call, {self.tflops_per_second:.4g} TFLOP/s"
            lines.append(f"{done}, {self.mfu:.1%} of {self.peak.flops / 1e12:.4g} ({self.peak.source})")
            read = f"operands and results: {self.moved / 1e9:.3g} GB a call, {self.moved / self.seconds / 1e9:.3g} GB/s"
            lines.append(f"{read}, {self.moved / self.seconds / self.peak.bandwidth:.1%} of the memory's peak")
        if self.needed is not None:
            lines.append(f"device memory: the program needs {self.needed / 1e9:.2f} GB")
        if self.peak_bytes is not None:
            lines.append(f"device memory: at most {self.peak_bytes / 1e9:.2f} GB so far")
        return "\n  ".join(lines)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def turn(run: Callable[[], object]) -> Turn:
    """Times one call, which must return only when its work is done."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)


def compile_program(jitted: Any, *arguments: Any, while_turns: int = 1, **static: Any) -> Program:
    """Compiles a jitted function for these arguments; `while_turns` as `work` takes them."""
    began = time.perf_counter()
    with progress.stage("compiling"):
        traced = jitted.trace(*arguments, **static)
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - began
    flops, moved = map(float, work(traced.jaxpr.jaxpr, while_turns))
    memory = memory_of(compiled)
    needed = None if memory is None else sum(memory.values())
    return Program(compiled, seconds, flops, moved, (compiled.cost_analysis() or {}).get("flops"), needed)


def largest_batch(compiled: Callable[[int], Program], size: int) -> tuple[int, Program]:
    """The last of size, 2 size, 4 size, ... whose program fits the device's memory, and the program; none is run."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        kind = jax.devices()[0].device_kind
        raise InputError(f"A device of kind {kind} doesn't tell its memory's limit: give the batch size yourself.")
    fitting: tuple[int, Program] | None = None
    while True:
        try:
            program = compiled(size)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            break
        if program.needed is None or program.needed > limit:
            break
        progress.note(f"batch {size} needs {program.needed / 1e9:.2f} of {limit / 1e9:.2f} GB")
        fitting, size = (size, program), 2 * size
    if fitting is None:
        raise InputError(f"batch_size {size} doesn't fit {limit / 1e9:.2f} GB; give a smaller one.")
    return fitting


def measure(
    name: str,
    run: Callable[[], object],
    repeats: int,
    sequences: int,
    tokens: int | None = None,
    program: Program | None = None,
    dtype: str = "float32",
) -> Row:
    """Calls `run` once to warm up, then times `repeats` calls.

    Args:
        sequences, tokens: what a call works on; tokens without padding.
        program: what `run` calls once, if its work is known.
        dtype: of its arithmetic, in which an unknown device's peak is measured.
    """

    def run_to_end() -> None:
        jax.block_until_ready(run())

    run_to_end()
    return row_of(name, [turn(run_to_end) for _ in range(repeats)], sequences, tokens, program, dtype)


def row_of(
    name: str,
    turns: Sequence[Turn],
    sequences: int,
    tokens: int | None = None,
    program: Program | None = None,
    dtype: str = "float32",
) -> Row:
    """The row of turns that were timed; see `measure`."""
    device, walls = jax.devices()[0], [one.wall for one in turns]
    seconds, quartiles = statistics.median(walls), np.quantile(walls, [0.25, 0.75])
    row = Row(
        name,
        seconds,
        spread=float(quartiles[1] - quartiles[0]),
        cpu_seconds=statistics.median(one.cpu for one in turns),
        turns=turns,
        sequences_per_second=sequences / seconds,
        tokens_per_second=None if tokens is None else tokens / seconds,
        peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
    )
    if program is None:
        return row
    row = dataclasses.replace(row, **{name: value for name, value in program._asdict().items() if name != "run"})
    if program.flops is None:
        return row
    peak, per_second = peak_of(device, dtype), program.flops / seconds
    return dataclasses.replace(row, tflops_per_second=per_second / 1e12, mfu=per_second / peak.flops, peak=peak)


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """Rows with the date and all that they may depend on, as JSON types."""
    packages = {name: version(name) for name in PACKAGES}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": num_cores(),
        "device": jax.devices()[0].device_kind,
        "versions": {"v2t_jax": __version__, "python": platform.python_version(), **packages},
        "rows": [_as_json(row) for row in rows],
    }


def _as_json(row: Row) -> dict[str, Any]:
    peak = row.peak and row.peak._asdict()
    return vars(row) | {"peak": peak, "turns": [one._asdict() for one in row.turns]}


def processor() -> str:
    """The processor's name, as /proc/cpuinfo has it where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
