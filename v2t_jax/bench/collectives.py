"""What a compiled program sends between its devices, read from its optimised HLO text."""

import re
from collections.abc import Iterator
from math import prod

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
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


def collectives(hlo_text: str) -> list[tuple[str, int]]:
    """(kind, bytes) of every collective that a run of the program makes, as one device sees it.

    The bytes are those of the whole array on the device that is larger: what an all-gather or a permute leaves, what
    an all-reduce or a reduce-scatter takes. What crosses the wires depends on the algorithm; a ring over n devices
    sends (n - 1) / n of them, and twice that for an all-reduce.

    A collective in a loop of known length, such as the scan over layers, is listed once a turn; in one of unknown
    length once. An asynchronous pair of start and done is one collective; so are the parts of one that TPU programs lay
    into fusions along the way, which share its channel. (TPU programs write a reduce-scatter as an all-reduce in a
    fusion: it is listed as that.)
    """
    computations, entry = _computations(hlo_text)
    return list(_walk(entry, computations, set())) if entry else []


def totals(hlo_text: str) -> dict[str, dict[str, int]]:
    """The collectives of a program by kind: {count, bytes}."""
    found: dict[str, dict[str, int]] = {}
    for kind, size in sorted(collectives(hlo_text)):
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += size
    return found


def ring_bytes(sent: dict[str, dict[str, int]]) -> float:
    """What a device sends in rings, at most, of such totals: an all-reduce goes round twice."""
    return float(sum(entry["bytes"] * (2 if kind == "all-reduce" else 1) for kind, entry in sent.items()))


def _computations(hlo_text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Every computation's instructions as (name, rest of the line), and the entry's name."""
    found: dict[str, list[tuple[str, str]]] = {}
    entry, current = "", None
    for line in hlo_text.splitlines():
        if not line.startswith((" ", "}")) and (head := _COMPUTATION.match(line)):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            current.append((instruction[1], instruction[2]))
    return found, entry


def _walk(name: str, computations: dict[str, list[tuple[str, str]]], channels: set[str]) -> Iterator[tuple[str, int]]:
    shapes: dict[str, str] = {}
    for instruction, text in computations.get(name, []):
        found = _OPCODE.search(text)
        if found is None or found[1].endswith("-done"):  # a done names its start's computation again
            continue
        shapes[instruction] = text[: found.start()]
        opcode, arguments = found[1], text[found.end() :].partition(")")[0]
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            taken = sum(_bytes(shapes.get(operand, "")) for operand in re.findall(r"%([\w.-]+)", arguments))
            left = _bytes(shapes[instruction])
            if opcode != kind and kind != "all-reduce":  # its result is (what it takes, what it leaves)
                left -= taken
            channel = _CHANNEL.search(text)
            if channel is None or channel[1] not in channels:
                yield kind, max(taken, left)
            channels |= {channel[1]} if channel else set()
            continue  # what an all-reduce applies is arithmetic
        turns = _turns(text, computations) if opcode == "while" else 1
        for one, several in _CALLED.findall(text):
            for called in [one] if one else re.findall(r"[\w.-]+", several):
                yield from list(_walk(called, computations, channels)) * turns


def _turns(text: str, computations: dict[str, list[tuple[str, str]]]) -> int:
    """Turns of a loop: as it says itself, or, in TPU programs, the constant that its condition compares a counter with.

    1 where it isn't known.
    """
    if known := _TURNS.search(text):
        return int(known[1])
    condition = dict(computations.get(found[1], []) if (found := _CONDITION.search(text)) else [])
    bounds = [int(n) for line in condition.values() for n in re.findall(r"^[su]32\[\]\S* constant\((\d+)\)", line)]
    last = next(reversed(condition.values()), "")
    return bounds[0] if len(bounds) == 1 and " compare(" in last and "direction=LT" in last else 1


def _bytes(shape: str) -> int:
    """Of an array or a tuple of arrays; 32-bit scalars beside them are a collective's bookkeeping."""
    total = 0
    for kind, bits, dimensions in _ARRAY.findall(shape):
        if dimensions:
            total += prod(int(size.lstrip("<=")) for size in dimensions.split(",")) * int(bits or 8) // 8
        elif kind != "u32":
            total += int(bits or 8) // 8
    return total
