"""What the commands of `v2t bench` that measure have in common."""

import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import jax

from v2t_jax.bench.chart import plot
from v2t_jax.bench.measure import Row, document
from v2t_jax.errors import check_whole
from v2t_jax.eval.evaluate import check_plot_file


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What all commands that measure share."""

    repeats: int = 5  # calls that are timed, after a first one
    plot: str | None = None  # .png, .pdf or .svg file to write, with the rows in the device's roofline
    profile: str | None = None  # folder to write jax.profiler's trace to, for TensorBoard or Perfetto
    json: bool = False  # print one JSON document and nothing else

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The measurements, one after the other."""

    def run(self) -> None:
        check_whole("repeats", self.repeats, 1)
        if self.plot is not None:
            check_plot_file(Path(self.plot))
        jax.config.update("jax_enable_compilation_cache", False)  # or the time to compile would be that of reading it
        rows = []
        with nullcontext() if self.profile is None else jax.profiler.trace(self.profile):
            for row in self.rows():
                rows.append(row)
                if not self.json:
                    print(row, flush=True)
        found = document(rows)
        if self.json:
            print(json.dumps(found, indent=1))
        else:
            print("{processor}, {cores} cores, {device}, jax {versions[jax]}".format(**found))
        if self.plot is not None:
            plot(rows, Path(self.plot))
