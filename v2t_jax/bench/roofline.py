"""The least time that a compiled program can take on a TPU, and what it needs there (roofline, Williams et al. 2009).

Matrix products are counted in the traced program: XLA's `cost_analysis` and `jax.experimental.roofline` count the body
of a loop once, however often it runs, so of T5's layers, which are scanned, they see one. (With the layers unrolled,
`cost_analysis` agrees to 0.1% for T5-small's inverter.) What crosses the network is read from the HLO text.
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

from v2t_jax.errors import InputError, check_whole


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
    """TPUs by name, such as v5e:4x4 or v4:2x2x4."""

    def __init__(self, name: str, num_slices: int = 1) -> None:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError("Compiling for TPUs needs libtpu, which isn't installed: pip install 'jax[tpu]' (Linux).")
        kind = name.partition(":")[0]
        if kind not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
            raise InputError(f"There is no topology {name!r}: give one of {', '.join(CHIPS)} and a shape, as v5e:4x4.")
        check_whole("slices", num_slices, 1, 256)
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


def work(jaxpr: Any, while_turns: int = 1) -> np.ndarray:
    """[FLOPs, bytes of operands and results] of a traced program's matrix products; the rest is assumed fused and free.

    Args:
        jaxpr: as of `jax.make_jaxpr(f)(...).jaxpr`.
        while_turns: assumed turns of loops of unknown length, such as the one over the tokens of a text.
    """
    total = np.zeros(2)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [work(part, while_turns) for part in _jaxprs(equation.params.values())]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval, prod(equation.outvars[0].aval.shape)
            # Sums are float32, but what is written usually has the operands' dtype: the cast is fused.
            moved = sum(nbytes(v.aval) for v in equation.invars) + result * left.dtype.itemsize
            total += 2 * result * prod(left.shape[axis] for axis in contracted), moved
        elif name == "cond":
            total += max(inner, key=lambda branch: branch[0])
        elif inner:
            total += sum(inner) * {"scan": equation.params.get("length", 1), "while": while_turns}.get(name, 1)
    return total


def _jaxprs(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _jaxprs(value)
        elif hasattr(value, "jaxpr") or hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def nbytes(array: Any, shape: tuple[int, ...] | None = None) -> int:
    """Bytes of an array or of its shape, or of a shard of it; 0 for random keys."""
    if jnp.issubdtype(array.dtype, jax.dtypes.extended):
        return 0
    return prod(array.shape if shape is None else shape) * np.dtype(array.dtype).itemsize


_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.-]+)\s*\(.*\{$")
# Name, shape, opcode, operands, attributes: `%x = f32[8]{0} all-reduce(%y), to_apply=%add`.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.-]+)\s*=\s*(.*?)\s([a-z][a-z0-9-]*)\(([^)]*)(.*)$")
_COLLECTIVE = re.compile(r"(all-gather|all-reduce|(?:ragged-)?all-to-all|collective-\w+|reduce-scatter)(-start)?")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|\w+_computation|called_computations)=\{?%?([\w.-]+)|branch_\w+=\{([^}]*)\}"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")
Computations = dict[str, list[re.Match[str]]]


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
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append(instruction)
    return list(_walk(entry, found, set()))


def totals(hlo_text: str) -> dict[str, dict[str, int]]:
    """The collectives of a program by kind: {count, bytes}."""
    found: dict[str, dict[str, int]] = {}
    for kind, size in sorted(collectives(hlo_text)):
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return found


def _walk(computation: str, computations: Computations, channels: set[str]) -> Iterator[tuple[str, int]]:
    shapes: dict[str, str] = {}
    for instruction in computations.get(computation, []):
        name, shape, opcode, operands, attributes = instruction.groups()
        shapes[name] = shape
        if opcode.endswith("-done"):  # it names its start's computation again
            continue
        if collective := _COLLECTIVE.fullmatch(opcode):
            kind, started = collective.groups()
            given = sum(_shape_bytes(shapes.get(operand, "")) for operand in re.findall(r"%([\w.-]+)", operands))
            result = _shape_bytes(shape)
            if started and kind != "all-reduce":  # the result of a start is (operands, result)
                result -= given
            channel = re.search(r"channel_id=\d+", attributes)
            if channel is None or channel[0] not in channels:
                yield kind, max(given, result)
            channels |= {channel[0]} if channel else set()
            continue  # the computation that an all-reduce applies is arithmetic
        turns = _turns(attributes, computations) if opcode == "while" else 1
        for one, several in _CALLED.findall(attributes):
            for called in [one] if one else re.findall(r"[\w.-]+", several):
                yield from list(_walk(called, computations, channels)) * turns


def _turns(attributes: str, computations: Computations) -> int:
    """Turns of a loop: annotated, or (TPU) the constant that its condition compares a counter with; 1 if unknown."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', attributes):
        return int(known[1])
    named = re.search(r"condition=%?([\w.-]+)", attributes)
    condition = computations.get(named[1], []) if named else []
    bounds = [int(i[4]) for i in condition if i[3] == "constant" and re.match(r"[su]32\[\]", i[2])]
    counts = bool(condition) and condition[-1][3] == "compare" and "direction=LT" in condition[-1][5]
    return bounds[0] if counts and len(bounds) == 1 else 1


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
            f"it {'fits' if self.fits else 'does not fit'}",
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
