"""The least time that a compiled program can take on a TPU, and what it needs there (roofline, Williams et al. 2009).

Matrix products are counted in the traced program: XLA's `cost_analysis` and `jax.experimental.roofline` count the body
of a loop once, however often it runs, so of T5's layers, which are scanned, they see one. (With the layers unrolled,
`cost_analysis` agrees to 0.1% for T5-small's inverter.) What crosses the network is read from the HLO text.
"""

import importlib.util
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.errors import InputError, check_whole


class Chip(NamedTuple):
    """A chip's peaks."""

    flops: float  # bfloat16 FLOP/s
    memory: int  # bytes of HBM
    bandwidth: float  # bytes/s from HBM
    ici: float  # bytes/s to its slice, all links, one way
    dcn: float  # bytes/s to other slices, its share of the host's network


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
        options |= {"chip_config_name": "megacore"} if kind == "v4" else {}  # its two cores are one device
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        except Exception as error:  # XlaRuntimeError, NotImplementedError: by version
            raise InputError(f"libtpu knows no topology {name} ({str(error).splitlines()[0]}).") from error
        self.name = f"{num_slices} x {name}" if num_slices > 1 else name
        self.num_slices, self.chip, self.devices = num_slices, CHIPS[kind], list(found.devices)


def memory_of(compiled: Any) -> dict[str, int] | None:
    """Bytes of device memory that a compiled program needs, by what they hold; None: the backend doesn't tell."""
    found = compiled.memory_analysis()
    return found and {
        "arguments and results": found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }


def work(jaxpr: Any, while_turns: int = 1) -> np.ndarray:
    """[FLOPs, bytes of operands and results] of a traced program's matrix products; the rest is assumed fused and free.

    `while_turns` are assumed of loops of unknown length, such as the one over the tokens of a text.
    """
    total = np.zeros(2)
    for equation in jaxpr.eqns:
        name, parts = equation.primitive.name, jax.tree.leaves(list(equation.params.values()))
        inner = [work(getattr(x, "jaxpr", x), while_turns) for x in parts if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval, prod(equation.outvars[0].aval.shape)
            # Sums are float32, but what is written usually has the operands' dtype: the cast is fused.
            moved = sum(nbytes(v.aval) for v in equation.invars) + result * left.dtype.itemsize
            total += 2 * result * prod(left.shape[axis] for axis in contracted), moved
        elif name == "cond":
            # Of equal work, the branch that moves less: `embed` takes parts on a CPU alone.
            total += max(inner, key=lambda branch: (branch[0], -branch[1]))
        elif inner:
            total += sum(inner) * {"scan": equation.params.get("length", 1), "while": while_turns}.get(name, 1)
    return total


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


def collectives(hlo_text: str) -> list[tuple[str, int]]:
    """(kind, bytes) of every collective in a run of a compiled program, as one device sees it.

    The bytes are those of the whole array where it is larger: the result of an all-gather or a permute, the operand of
    an all-reduce or a reduce-scatter. A collective in a loop of known length is listed once per turn, otherwise once.
    Asynchronous start and done are one collective; so are the parts, of one channel, that TPU programs spread over
    fusions. (TPU programs write a reduce-scatter as an all-reduce in a fusion, and it is listed as that.)
    """
    computations: dict[str, list[re.Match[str]]] = {"": []}
    entry, current = "", ""
    channels: set[str] = set()
    for line in hlo_text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            computations[current].append(instruction)

    def walk(computation: str) -> Iterator[tuple[str, int]]:
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
                channels.update([channel[0]] if channel else [])
                continue  # the computation that an all-reduce applies is arithmetic
            turns = _turns(attributes, computations) if opcode == "while" else 1
            for one, several in _CALLED.findall(attributes):
                for called in [one] if one else re.findall(r"[\w.-]+", several):
                    yield from list(walk(called)) * turns

    return list(walk(entry))


def totals(hlo_text: str) -> dict[str, dict[str, int]]:
    """The collectives of a program by kind: {count, bytes}."""
    found: dict[str, list[int]] = {}
    for kind, size in sorted(collectives(hlo_text)):
        found.setdefault(kind, []).append(size)
    return {kind: {"count": len(sizes), "bytes": sum(sizes)} for kind, sizes in found.items()}


def _turns(attributes: str, computations: dict[str, list[re.Match[str]]]) -> int:
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
    return sum(
        prod(int(size) for size in re.findall(r"\d+", dimensions)) * int(bits or 8) // 8
        for kind, bits, dimensions in _ARRAY.findall(shape)
        if dimensions or kind != "u32"
    )


@dataclass
class Report:
    """A compiled program; bytes, operations and seconds of one chip in one run."""

    program: str
    chips: int
    rows: int  # texts, on all chips
    memory: dict[str, int]  # what it is given, and the compiler's totals of temporaries and of code
    needed: int
    capacity: int
    # kind -> {count, bytes} within a slice. What goes between slices is no part of a TPU program's text: a training
    # step's gradients are estimated, under seconds["dcn"].
    collectives: dict[str, dict[str, int]]
    flops: float  # of the model's matrix products, without recomputation
    flops_run: float  # with it
    seconds: dict[str, float]  # lower bounds for compute, memory, ici, dcn
    advice: str = ""
    fits: bool = field(init=False)
    step_seconds: float = field(init=False)  # the roofline: the longest, if everything else happens meanwhile
    mfu: float = field(init=False)  # the largest possible share of the chip's peak FLOP/s
    texts_per_second: float = field(init=False)

    def __post_init__(self) -> None:
        self.fits, self.step_seconds = self.needed <= self.capacity, max(self.seconds.values())
        self.mfu = self.flops / self.flops_run * self.seconds["compute"] / self.step_seconds
        self.texts_per_second = self.rows / self.step_seconds
        if not self.fits:
            self.advice = (
                f"It lacks {(self.needed - self.capacity) / 1e9:.2f} GB a chip: shard the weights over more chips "
                "(mesh.fsdp; for decoding mesh.model with mesh.decode=model), recompute in the backward pass "
                "(model.t5.remat=full), or take smaller micro-batches (optimizer.accumulate_steps)."
            )

    def __str__(self) -> str:
        memory = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self.memory.items())
        head = (
            f"{self.program}, {self.rows} texts on {self.chips} chips (compiled, not run)\n"
            f"  GB a chip: {self.needed / 1e9:.2f} of {self.capacity / 1e9:.2f} ({memory}); "
            f"it {'fits' if self.fits else 'does not fit'}\n"
        )
        if not self.fits:
            return _folded(f"{head}  {self.advice}")
        sent = ", ".join(f"{kind} {e['count']}x {e['bytes'] / 1e6:.1f} MB" for kind, e in self.collectives.items())
        seconds = ", ".join(f"{name} {1e3 * value:.2f}" for name, value in self.seconds.items())
        return _folded(
            f"{head}  a chip sends: {sent or 'nothing'}\n"
            f"  TFLOP a chip: {self.flops / 1e12:.3f}, with what is recomputed {self.flops_run / 1e12:.3f}\n"
            f"  at least {1e3 * self.step_seconds:.2f} ms a step (roofline, in ms: {seconds}), hence at most "
            f"{self.mfu:.0%} MFU and {self.texts_per_second:,.0f} texts/s"
        )


def _folded(text: str) -> str:
    """Lines of at most 80 characters."""
    fold = textwrap.TextWrapper(width=80, subsequent_indent="    ", break_on_hyphens=False).fill
    return "\n".join(map(fold, text.split("\n")))
