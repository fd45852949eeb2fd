"""What is known of a program that was compiled for TPUs that aren't here, as numbers and in words."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """What is known of a compiled program; bytes, operations and seconds of one chip and one run."""

    program: str
    chips: int
    rows: int
    """texts, of all chips"""
    memory: dict[str, int]
    """bytes: params, optimizer, other weights (frozen), activations kept for the backward pass (estimated), and the
    compiler's total of temporaries, activations among them"""
    needed: int
    capacity: int
    collectives: dict[str, dict[str, int]]
    """kind -> {count, bytes}, within a slice; empty too where the program can't be read. What goes from slice to slice
    is no part of a TPU program's text: a training step's gradients are reckoned, under seconds["dcn"]"""
    flops: float
    """ours: matrix products of the model, without what is recomputed"""
    flops_run: float
    """the same with what is recomputed"""
    seconds: dict[str, float]
    """the least for compute, memory, ici, dcn"""
    advice: str

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    @property
    def step_seconds(self) -> float:
        """The roofline: what takes longest, if all else happens meanwhile."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """The model's operations by the chip's peak in that time: none can do better."""
        return self.flops / self.flops_run * self.seconds["compute"] / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        derived = {"fits": self.fits, "step_seconds": self.step_seconds, "mfu": self.mfu}
        return dataclasses.asdict(self) | derived | {"texts_per_second": self.rows / self.step_seconds}


def text(report: Report) -> str:
    """A report in lines."""
    r = report
    memory = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in r.memory.items())
    verdict = "it fits" if r.fits else "it does not fit"
    lines = [
        f"{r.program}, {r.rows} texts on {r.chips} chips (compiled, not run)",
        f"  GB a chip: {r.needed / 1e9:.2f} of {r.capacity / 1e9:.2f} ({memory}); {verdict}",
    ]
    if not r.fits:
        return "\n".join([*lines, f"  {r.advice}"])
    sent = ", ".join(f"{kind} {e['count']}x {e['bytes'] / 1e6:.1f} MB" for kind, e in r.collectives.items())
    seconds = ", ".join(f"{name} {1e3 * value:.2f}" for name, value in r.seconds.items())
    return "\n".join(
        [
            *lines,
            f"  a chip sends: {sent or 'nothing'}",
            f"  TFLOP a chip: {r.flops / 1e12:.3f}, with what is recomputed {r.flops_run / 1e12:.3f}",
            f"  at least {1e3 * r.step_seconds:.2f} ms a step (roofline, in ms: {seconds}), hence at most "
            f"{r.mfu:.0%} MFU and {r.rows / r.step_seconds:,.0f} texts/s",
        ]
    )
