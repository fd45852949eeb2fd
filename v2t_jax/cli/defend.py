"""The commands defend and study. The comment or docstring at an option is its help text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from v2t_jax.cli.invert import PACKAGED_MODEL, print_table
from v2t_jax.errors import check_whole


@dataclass(frozen=True)
class Defend:
    """Measure what defences of embeddings still give away to an attacker who knows them, and what a search loses."""

    model: str = PACKAGED_MODEL  # name of a packaged model, or a model folder
    limit: int = 16  # held-out texts that are recovered behind each defence, and half as many with personal data
    budget: int = 300  # calls of the embedder for a text
    num_steps: int | None = None  # correction steps, by default as for v2t invert
    known_pairs: tuple[int, ...] = (10, 100, 200, 500, 1000)  # stored vectors whose texts a rotation's attacker knows
    adapt: int = 0  # steps that the attacker trains the inverter behind each defence, about a second each on two cores
    plot: str | None = None  # .png, .pdf or .svg file to write, with leakage against utility
    json: bool = False  # print a JSON document instead of a table

    def run(self) -> None:
        import random

        from v2t_jax.defences import measure
        from v2t_jax.defences.adapt import tuning
        from v2t_jax.eval.evaluate import check_plot_file, evaluation_texts
        from v2t_jax.eval.personal import sentence
        from v2t_jax.inversion.api import comparable
        from v2t_jax.inversion.pipeline import load

        check_whole("limit", self.limit, 1)
        check_whole("adapt", self.adapt, 0)
        if self.plot is not None:
            check_plot_file(Path(self.plot))
        model = load(self.model)
        public = measure.public_embeddings(model.embedder)
        some = measure.attacked(public, self.known_pairs)
        people, facts = zip(*(sentence(random.Random(i)) for i in range(-(-self.limit // 2))), strict=True)
        texts = evaluation_texts(model, limit=self.limit) + comparable(model, people)
        tune = tuning(model, self.adapt, public) if self.adapt else None
        rows = measure.leakage(model, texts, some, self.budget, facts, self.num_steps, tune)
        rows = [row | kept for row, kept in zip(rows, measure.utility(model.embedder, some, public), strict=True)]
        advice = measure.recommendation(rows)
        if self.plot is not None:
            measure.plot(rows, Path(self.plot))
        if self.json:
            conditions = {"model": model.name, "budget": self.budget, "adapt": self.adapt}
            print(json.dumps(conditions | {"rows": rows, "advice": advice}, indent=1))
            return
        title = f"{model.name}: {self.limit} texts behind each defence, {self.budget:,} calls a text"
        print_table(measure.table(rows, title))
        print(advice)


@dataclass(frozen=True)
class Study:
    """How recovery depends on a text's length, on an embedding's width or noise, and whether texts share a vector."""

    what: Annotated[Literal["length", "width", "collisions", "noise"], tyro.conf.Positional]
    model: str = PACKAGED_MODEL  # name of a packaged model, or a model folder
    limit: int = 32  # texts for each row
    budget: int = 300  # calls of the embedder for a text
    edits: int = 150_000  # texts that collisions compares
    plot: str | None = None  # .png, .pdf or .svg file to write
    json: bool = False  # print a JSON document instead of a table

    def run(self) -> None:
        from v2t_jax.defences import measure, study
        from v2t_jax.eval.evaluate import check_plot_file
        from v2t_jax.inversion.pipeline import load

        check_whole("limit", self.limit, 1)
        if self.plot is not None:
            check_plot_file(Path(self.plot))
        model = load(self.model)
        if self.what == "collisions":
            found = study.collisions(model, self.edits)
            if self.plot is not None:
                study.plot_collisions(found, Path(self.plot), f"{model.name}: {found['texts']:,} edits of texts")
            said = "{texts:,} texts; the nearest two, {nearest}, are {distance:.2g} apart, of a text in the middle "
            said += "{median:.2g}; {shared} pairs share a vector"
            print(json.dumps(found, indent=1) if self.json else said.format(**found))
            return
        rows: Any = {"length": study.by_length, "width": study.by_width, "noise": study.by_noise}[self.what](
            model, self.limit, self.budget
        )
        title = f"{model.name} by {self.what}: {self.limit} texts a row, {self.budget:,} calls a text"
        if self.plot is not None:
            study.plot(rows, Path(self.plot), title)
        if self.json:
            print(json.dumps({"model": model.name, "budget": self.budget, "rows": rows}, indent=1))
        else:
            print_table(measure.table(rows, title))
