"""Commands about speed: beside PyTorch, and on TPUs that aren't here."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Aot:
    """Compile a recipe for TPUs that aren't here: memory, collectives, the least time of a step. Nothing is run."""

    config: str
    """the recipe, such as configs/gtr_nq32_inverter.py"""
    topology: str = "v5e:4x4"
    """v4, v5e, v5p or v6e, and a slice's shape, such as v5e:4x4 or v4:2x2x4"""
    slices: int = 1
    """slices of that shape, joined by the data-centre network"""
    programs: tuple[Literal["train", "hypotheses", "correct"], ...] = ("train", "hypotheses", "correct")
    """what to compile: the stages' training steps, greedy hypotheses, a step of the correction loop"""
    sequence_beam_width: int = 4
    """of the correction loop"""
    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        import jax

        from v2t_jax.bench import aot
        from v2t_jax.config import load_recipe

        jax.config.update("jax_platforms", "cpu")  # nothing runs here, least of all on a TPU that someone else may use
        config, topology = load_recipe(self.config), aot.Topology(self.topology, self.slices)
        reports = []
        for report in aot.compile_recipe(config, topology, self.programs, self.sequence_beam_width):
            reports.append(report)
            if not self.json:
                print(aot.text(report), flush=True)
        if self.json:
            shown = {"topology": self.topology, "slices": self.slices, "config": self.config}
            print(
                json.dumps({**shown, "compiled, not run": True, "programs": [r.to_dict() for r in reports]}, indent=1)
            )


@dataclass(frozen=True)
class Bench:
    """Measure: aot (compile for TPUs)."""

    command: Annotated[Aot, tyro.conf.subcommand("aot")]

    def run(self) -> None:
        self.command.run()
