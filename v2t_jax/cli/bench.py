"""The commands of `v2t bench`: speed on this machine, and what TPUs would do."""

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

    config: str
    """the recipe, such as configs/gtr_nq32_inverter.py"""
    topology: str = "v5e:4x4"
    """v4, v5e, v5p or v6e, and a slice's shape, such as v5e:4x4 or v4:2x2x4"""
    slices: int = 1
    """slices of that shape, joined by the data-centre network"""
    programs: tuple[aot.Program, ...] = ("train", "hypotheses", "correct")
    """what to compile: the stages' training steps, greedy hypotheses, a step of the correction loop"""
    sequence_beam_width: int = 4
    """of the correction loop"""
    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        jax.config.update("jax_platforms", "cpu")  # nothing runs here, least of all on a TPU that someone else may use
        jax.config.update("jax_enable_compilation_cache", False)  # what is compiled so can't be read back
        config, topology = load_recipe(self.config), Topology(self.topology, self.slices)
        reports = []
        for report in aot.compile_recipe(config, topology, self.programs, self.sequence_beam_width):
            reports.append(report)
            if not self.json:
                print(report, flush=True)
        if self.json:
            shown = {"topology": self.topology, "slices": self.slices, "config": self.config}
            print(
                json.dumps({**shown, "compiled, not run": True, "programs": [r.to_dict() for r in reports]}, indent=1)
            )


COMMANDS: dict[str, Any] = {"aot": Aot, "data": Data, "decode": Decode, "train": Train}
