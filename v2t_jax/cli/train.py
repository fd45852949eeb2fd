"""v2t train: run a recipe, with any of its fields overridden."""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from v2t_jax.cli.invert import endpoint_options, print_table
from v2t_jax.config import Config, DistributedConfig, load_recipe
from v2t_jax.errors import InputError

USAGE = "v2t train configs/NAME.py --workdir DIR [--FIELD VALUE ...]"


@dataclass(frozen=True)
class Train:
    """Train a recipe: v2t train configs/NAME.py --workdir DIR [typed overrides of any field]."""

    workdir: str
    # Without a name, the recipe's fields are options by their own paths, such as --inverter.num-steps.
    config: Annotated[Config, tyro.conf.arg(name="")]
    distributed: DistributedConfig = DistributedConfig()

    def run(self) -> None:
        from v2t_jax.eval.evaluate import table
        from v2t_jax.parallel.processes import is_main
        from v2t_jax.train.loop import TrainingStopped, train

        try:
            folder = train(self.config, Path(self.workdir))
        except TrainingStopped as stopped:
            print(f"v2t: {stopped}", file=sys.stderr)
            raise SystemExit(0 if stopped.preempted else 130) from None
        if is_main():
            print_table(table(json.loads((folder.parent / "evaluation.json").read_text())))
            options = shlex.join(["--model", str(folder), *endpoint_options(self.config.embedder, self.config.api)])
            print(f'The model is in {folder}; try: v2t invert {options} --text "..."')


def parse(arguments: list[str]) -> Train:
    """The command of `v2t train RECIPE --workdir DIR [overrides]`, whose options are the recipe's fields."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: {USAGE}\n\nv2t train configs/NAME.py --help lists the recipe's fields and their values.")
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"The recipe is missing; put it first: {USAGE}.")
    recipe, *options = arguments
    about = f"Train {recipe}. Run again with the same work directory, it goes on where it stopped."
    default = Train(workdir=tyro.MISSING, config=load_recipe(recipe))
    return tyro.cli(Train, args=options, default=default, prog=f"v2t train {recipe}", description=about)
