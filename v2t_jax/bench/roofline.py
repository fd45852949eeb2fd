"""The least time that a compiled program can take on a TPU, and what it needs there (roofline, Williams et al. 2009).

Matrix products are counted in the traced program, because XLA's `cost_analysis` counts the body of a loop once, however
often it runs: of T5's layers, which are scanned, it would see one. What crosses the network is read from the HLO text.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.errors import InputError


@dataclass(frozen=True)
class Chip:
    """Peaks: bfloat16 FLOP/s, bytes of HBM, bytes/s from HBM, bytes/s to its slice (all links, one way), and bytes/s to
    other slices (its share of the host's network)."""

    flops: float
    memory: float
    bandwidth: float
    ici: float
    dcn: float


GIB = 2**30
# As docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} state them (read in 2026), except v4's share of the data-center
# network, which is assumed to equal v5e's.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 2400e9 / 8, 25e9 / 8),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8, 6.4e12 / 256 / 8),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8, 50e9 / 8),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 3200e9 / 8, 25.6e12 / 256 / 8),
}
QUIET = {
    # Otherwise libtpu asks the cloud's metadata server which machine this is, and complains if there is none.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    # Its lock guards a TPU from a second process; compiling opens none.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Topology:
    """TPUs by name, such as v5e:4x4 or v4:2x2x4.

    Raises:
        InputError: libtpu isn't installed, or there is no such topology.
    """

    def __init__(self, name: str, num_slices: int = 1) -> None:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError("Compiling for TPUs needs libtpu, which isn't installed: pip install 'jax[tpu]' (Linux).")
        kind = name.partition(":")[0]
        if kind not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
            raise InputError(f"There is no topology {name!r}: give one of {', '.join(CHIPS)} and a shape, as v5e:4x4.")
        if not 1 <= num_slices <= 256:
            raise InputError(f"slices is {num_slices}; give 1 to 256.")
        from jax.experimental import topologies

        for variable, value in QUIET.items():
            os.environ.setdefault(variable, value)
        options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
        if kind == "v4":
            options["chip_config_name"] = "megacore"  # users see a v4 chip's two cores as one device
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        except Exception as error:  # XlaRuntimeError, NotImplementedError: by version
            raise InputError(f"libtpu knows no topology {name} ({str(error).splitlines()[0]}).") from error
        self.name = f"{num_slices} x {name}" if num_slices > 1 else name
        self.num_slices, self.chip, self.devices = num_slices, CHIPS[kind], list(found.devices)


@dataclass(frozen=True)
class Work:
    """A program's matrix products: FLOPs, and bytes of operands and results. The rest is assumed fused and free."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.bytes * factor)


def work(jaxpr: Any, while_turns: int = 1) -> Work:
    """Counts the matrix products of a traced program (`jax.make_jaxpr(f)(...).jaxpr`), loops included.

    Args:
        while_turns: assumed turns of loops of unknown length, such as the one over the tokens of a text.
    """
    total = Work()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [work(part, while_turns) for part in _jaxprs(equation.params.values())]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval, prod(equation.outvars[0].aval.shape)
            flops = 2 * result * prod(left.shape[axis] for axis in contracted)
            # Sums are float32, but what is written usually has the operands' dtype: the cast is fused.
            total += Work(flops, sum(nbytes(v.aval) for v in equation.invars) + result * left.dtype.itemsize)
        elif name == "cond":
            total += max(inner, key=lambda branch: branch.flops)
        elif inner:
            turns = {"scan": equation.params.get("length", 1), "while": while_turns}.get(name, 1)
            total += sum(inner, Work()).times(turns)
    return total


def _jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _jaxprs(value)
        elif hasattr(value, "jaxpr") or hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def nbytes(shape: Any) -> int:
    """Bytes of an array or of its shape; 0 for random keys."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.extended):
        return 0
    return prod(shape.shape) * np.dtype(shape.dtype).itemsize


KINDS: tuple[str, ...] = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute")
KINDS += ("ragged-all-to-all", "reduce-scatter")
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.-]+)\s*\(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT\s+)?%?([\w.-]+)\s*=\s*(.*)$")
_OPCODE = re.compile(r"(?<=[\s)}\]])([a-z][a-z0-9-]*)\(")  # after the shape: `f32[8]{0} all-reduce(%x), ...`
_CALLED = re.compile(
    r"(?:calls|to_apply|body|\w+_computation|called_computations)=\{?%?([\w.-]+)|branch_\w+=\{([^}]*)\}"
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")
Computations = dict[str, list[tuple[str, str]]]


def collectives(hlo_text: str) -> list[tuple[str, int]]:
    """(kind, bytes) of every collective in a run of a compiled program, as one device sees it.

    The bytes are those of the whole array where it is larger: the result of an all-gather or a permute, the operand of
    an all-reduce or a reduce-scatter. A collective in a loop of known length is listed once per turn, otherwise once.
    Asynchronous start and done are one collective; so are the parts, of one channel, that TPU programs spread over
    fusions. (TPU programs write a reduce-scatter as an all-reduce in a fusion, and it is listed as that.)
    """
    found: Computations = {}
    entry, current = "", None
    for line in hlo_text.splitlines():
        if not line.startswith((" ", "}")) and (head := _COMPUTATION.match(line)):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append((instruction[1], instruction[2]))
    return list(_walk(entry, found, set())) if entry else []


def totals(hlo_text: str) -> dict[str, dict[str, int]]:
    """The collectives of a program by kind: {count, bytes}."""
    found: dict[str, dict[str, int]] = {}
    for kind, size in sorted(collectives(hlo_text)):
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return found


def ring_bytes(sent: dict[str, dict[str, int]]) -> float:
    """Upper bound on the bytes that a device sends in rings; an all-reduce goes around twice."""
    return float(sum(entry["bytes"] * (2 if kind == "all-reduce" else 1) for kind, entry in sent.items()))


def _walk(name: str, computations: Computations, channels: set[str]) -> Iterator[tuple[str, int]]:
    shapes: dict[str, str] = {}
    for instruction, text in computations.get(name, []):
        found = _OPCODE.search(text)
        if found is None or found[1].endswith("-done"):  # a done names its start's computation again
            continue
        shapes[instruction] = text[: found.start()]
        opcode, arguments = found[1], text[found.end() :].partition(")")[0]
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            operands = sum(_shape_bytes(shapes.get(operand, "")) for operand in re.findall(r"%([\w.-]+)", arguments))
            result = _shape_bytes(shapes[instruction])
            if opcode != kind and kind != "all-reduce":  # the result of a start is (operands, result)
                result -= operands
            channel = _CHANNEL.search(text)
            if channel is None or channel[1] not in channels:
                yield kind, max(operands, result)
            channels |= {channel[1]} if channel else set()
            continue  # the computation that an all-reduce applies is arithmetic
        turns = _turns(text, computations) if opcode == "while" else 1
        for one, several in _CALLED.findall(text):
            for called in [one] if one else re.findall(r"[\w.-]+", several):
                yield from list(_walk(called, computations, channels)) * turns


def _turns(text: str, computations: Computations) -> int:
    """Turns of a loop: annotated, or (TPU) the constant that its condition compares a counter with; 1 if unknown."""
    if known := _TURNS.search(text):
        return int(known[1])
    condition = dict(computations.get(found[1], []) if (found := _CONDITION.search(text)) else [])
    bounds = [int(n) for line in condition.values() for n in re.findall(r"^[su]32\[\]\S* constant\((\d+)\)", line)]
    last = next(reversed(condition.values()), "")
    return bounds[0] if len(bounds) == 1 and " compare(" in last and "direction=LT" in last else 1


def _shape_bytes(shape: str) -> int:
    """Bytes of an array or a tuple of arrays; 32-bit scalars beside them are a collective's bookkeeping."""
    total = 0
    for kind, bits, dimensions in _ARRAY.findall(shape):
        if dimensions or kind != "u32":
            sizes = [int(size.lstrip("<=")) for size in dimensions.split(",")] if dimensions else []
            total += prod(sizes) * int(bits or 8) // 8
    return total


@dataclass(frozen=True)
class Report:
    """A compiled program; bytes, operations and seconds of one chip in one run.

    Attributes:
        rows: texts, on all chips.
        memory: params, optimizer, frozen weights, activations kept for the backward pass (estimated), and the
            compiler's total of temporaries, activations among them.
        collectives: kind -> {count, bytes} within a slice. What goes between slices is no part of a TPU program's text:
            a training step's gradients are estimated, under seconds["dcn"].
        flops: of the model's matrix products, without recomputation; flops_run: with it.
        seconds: lower bounds for compute, memory, ici, dcn.
    """

    program: str
    chips: int
    rows: int
    memory: dict[str, int]
    needed: int
    capacity: int
    collectives: dict[str, dict[str, int]]
    flops: float
    flops_run: float
    seconds: dict[str, float]
    advice: str

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    @property
    def step_seconds(self) -> float:
        """The roofline: the longest, if everything else happens meanwhile."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """The largest possible share of the chip's peak FLOP/s."""
        return self.flops / self.flops_run * self.seconds["compute"] / self.step_seconds

    def to_dict(self) -> dict[str, Any]:
        derived = {"fits": self.fits, "step_seconds": self.step_seconds, "mfu": self.mfu}
        return dataclasses.asdict(self) | derived | {"texts_per_second": self.rows / self.step_seconds}

    def __str__(self) -> str:
        memory = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.memory.items())
        lines = [
            f"{self.program}, {self.rows} texts on {self.chips} chips (compiled, not run)",
            f"  GB a chip: {self.needed / 1e9:.2f} of {self.capacity / 1e9:.2f} ({memory}); "
            + ("it fits" if self.fits else "it does not fit"),
        ]
        if not self.fits:
            return "\n".join([*lines, f"  {self.advice}"])
        sent = ", ".join(f"{kind} {e['count']}x {e['bytes'] / 1e6:.1f} MB" for kind, e in self.collectives.items())
        seconds = ", ".join(f"{name} {1e3 * value:.2f}" for name, value in self.seconds.items())
        lines += [
            f"  a chip sends: {sent or 'nothing'}",
            f"  TFLOP a chip: {self.flops / 1e12:.3f}, with what is recomputed {self.flops_run / 1e12:.3f}",
            f"  at least {1e3 * self.step_seconds:.2f} ms a step (roofline, in ms: {seconds}), hence at most "
            f"{self.mfu:.0%} MFU and {self.rows / self.step_seconds:,.0f} texts/s",
        ]
        return "\n".join(lines)
