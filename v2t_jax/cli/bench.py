"""The commands of `v2t bench`: speed on this machine, what TPUs would do, and how long training takes elsewhere."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich import box
from rich.markup import escape
from rich.table import Table

from v2t_jax.bench import aot
from v2t_jax.bench.command import Measurement
from v2t_jax.bench.compare import compare, read_document
from v2t_jax.bench.correct import Correct
from v2t_jax.bench.data import Data
from v2t_jax.bench.decode import Decode
from v2t_jax.bench.embed import Embed
from v2t_jax.bench.estimate import estimate, hardware
from v2t_jax.bench.measure import Row
from v2t_jax.bench.roofline import Topology
from v2t_jax.bench.train import Train
from v2t_jax.cli.invert import print_table
from v2t_jax.config import load_recipe
from v2t_jax.errors import check_whole


@dataclass(frozen=True)
class Aot:
    """Compile a recipe for TPUs that aren't here: memory, collectives, the least time of a step. Nothing is run."""

    config: str  # the recipe, such as configs/gtr_nq32_inverter.py
    topology: str = "v5e:4x4"  # v4, v5e, v5p or v6e and the shape of a slice, such as v5e:4x4 or v4:2x2x4
    slices: int = 1  # number of slices, connected by the data-center network
    programs: tuple[aot.Program, ...] = ("train", "hypotheses", "correct")
    """what to compile: the stages' training steps, greedy hypotheses, a step of the correction loop"""
    sequence_beam_width: int = 4  # beam width of the correction loop
    json: bool = False  # print a JSON document instead of text

    def run(self) -> None:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, and a TPU here may be in use
        jax.config.update("jax_enable_compilation_cache", False)  # such programs can't be read back
        config, topology = load_recipe(self.config), Topology(self.topology, self.slices)
        reports = []
        for report in aot.compile_recipe(config, topology, self.programs, self.sequence_beam_width):
            reports.append(report)
            if not self.json:
                print(report, flush=True)
        if self.json:
            shown: dict[str, Any] = {"topology": self.topology, "slices": self.slices, "config": self.config}
            shown |= {"compiled, not run": True, "programs": [dataclasses.asdict(report) for report in reports]}
            print(json.dumps(shown, indent=1))


@dataclass(frozen=True, kw_only=True)
class All(Measurement):
    """Measure embed, train, decode, correct and data at small sizes, in a few minutes on two cores."""

    def rows(self) -> Iterator[Row]:
        for command in SMALL:
            yield from dataclasses.replace(command, repeats=self.repeats).rows()


SMALL: tuple[Measurement, ...] = (
    Embed(batch_size=16),
    Train(batch_size=4),
    Decode(size="t5-small", batch_size=(1, 8)),
    Correct(batch_size=4, num_steps=1, sequence_beam_width=2),
    Data(num_texts=20_000),
)


@dataclass(frozen=True)
class Compare:
    """Compare two documents that v2t bench --json printed: the measurements that both have."""

    before: Annotated[str, tyro.conf.Positional]  # file of the first document
    after: Annotated[str, tyro.conf.Positional]  # file of the second one
    json: bool = False  # print a JSON document instead of a table

    def run(self) -> None:
        documents = [read_document(Path(file)) for file in (self.before, self.after)]
        changes = compare(*documents)
        if self.json:
            print(json.dumps([change._asdict() for change in changes], indent=1))
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("measurement")
        for column in ("before", "after", "speed-up", ""):
            table.add_column(column, justify="right", no_wrap=True)
        for name, before, after, speedup, distinct in changes:
            times = f"{before:.3f} s", f"{after:.3f} s", f"{speedup:.2f}x"
            table.add_row(escape(name), *times, "" if distinct else "within the spread")
        for when, found in zip(("before", "after"), documents, strict=True):
            print("{}: {date}, {processor}, {cores} cores, {device}".format(when, **found))
        print_table(table)


@dataclass(frozen=True)
class Estimate:
    """Estimate, by arithmetic alone, how long a recipe trains and inverts vectors on hardware that isn't here."""

    config: Annotated[str, tyro.conf.Positional]  # the recipe, such as configs/gtr_nq32_inverter.py
    hardware: str = "h100x8"
    """a100, h100, h200, b200, v4, v5e, v5p or v6e and how many, as h100x8 or v5e-16; as in the cloud's names of slices,
    the number counts cores of v4 and v5p, two a chip"""
    mfu: float = 0.3
    """assumed share of the peak FLOP/s that is reached, or, where memory takes longer, of its bandwidth"""
    num_vectors: int = 1_000_000  # embeddings to invert
    num_steps: int = 8  # correction steps for each of them
    sequence_beam_width: int = 4
    json: bool = False  # print a JSON document instead of a table

    def run(self) -> None:
        on = hardware(self.hardware)
        check_whole("num_vectors", self.num_vectors, 1)
        check_whole("num_steps", self.num_steps, 0)
        config = load_recipe(self.config)
        found = estimate(config, on, self.mfu, self.num_vectors, self.num_steps, self.sequence_beam_width)
        if self.json:
            shown = {"estimated, not measured": True, "config": self.config, "hardware": on._asdict(), "mfu": self.mfu}
            print(json.dumps(shown | {"parts": [part._asdict() for part in found]}, indent=1))
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column(f"{config.name} on {on.devices} x {on.kind}", no_wrap=True)
        for column in ("runs", "TFLOP a run", "limited by", "hours", "device-hours"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, runs, flops, bound, hours, device_hours in found:
            table.add_row(name, f"{runs:,.0f}", f"{flops / 1e12:,.1f}", bound, f"{hours:,.2f}", f"{device_hours:,.1f}")
        print_table(table)
        print(
            f"Estimated, not measured: {self.mfu:.0%} of the published peak is assumed (--mfu). The network between\n"
            "devices, reading data, compiling, evaluations and checkpoints aren't counted."
        )


COMMANDS: dict[str, Any] = {
    "all": All,
    "aot": Aot,
    "compare": Compare,
    "correct": Correct,
    "data": Data,
    "decode": Decode,
    "embed": Embed,
    "estimate": Estimate,
    "train": Train,
}
