"""The commands of `v2t bench`: speed on this machine, and what TPUs would do."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import jax

from v2t_jax.bench import aot
from v2t_jax.bench.data import Data
from v2t_jax.bench.decode import Decode
from v2t_jax.bench.roofline import Topology
from v2t_jax.bench.train import Train
from v2t_jax.config import load_recipe


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


COMMANDS: dict[str, Any] = {"aot": Aot, "data": Data, "decode": Decode, "train": Train}
