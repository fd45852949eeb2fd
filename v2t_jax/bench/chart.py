"""The roofline of the measured device with what was measured in it (Williams et al. 2009): `--plot`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from v2t_jax.bench.measure import Row
from v2t_jax.errors import InputError


def plot(rows: Sequence[Row], file: Path) -> None:
    """FLOP/s against FLOPs per byte of the matrix products, a point a row, below the roof of each peak."""
    from matplotlib.figure import Figure

    known = [row for row in rows if row.mfu is not None]
    if not known:
        raise InputError("Nothing that was measured has a known number of FLOPs, so there is nothing to plot.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for row in known:
        assert row.flops is not None and row.moved is not None and row.tflops_per_second is not None
        axis.loglog(row.flops / row.moved, row.tflops_per_second, "o", label=row.name)
    least, most = axis.get_xlim()
    x = np.geomspace(least / 2, most * 2, 200)
    for peak in dict.fromkeys(row.peak for row in known if row.peak is not None):
        axis.loglog(x, np.minimum(peak.flops, peak.bandwidth * x) / 1e12, color="gray", label=f"peak, {peak.source}")
    axis.set(xlabel="FLOPs per byte of the matrix products' operands and results", ylabel="TFLOP/s")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    axis.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=110)
