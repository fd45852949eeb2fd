"""TPUs by name, what a chip can do at most, and the work that a program makes (roofline, Williams et al. 2009)."""

import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.errors import InputError


@dataclass(frozen=True)
class Chip:
    flops: float
    """bfloat16 operations a second"""
    memory: float
    """bytes of HBM"""
    bandwidth: float
    """bytes a second from HBM"""
    ici: float
    """bytes a second to the other chips of its slice, all links together, one way"""
    dcn: float
    """bytes a second to other slices, a chip's share of its host's network"""


GIB = 2**30
# Peaks as docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} state them (read in 2026). v4's share of the data-centre
# network isn't stated there: it is taken for v5e's.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 2400e9 / 8, 25e9 / 8),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 1600e9 / 8, 6.4e12 / 256 / 8),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 4800e9 / 8, 50e9 / 8),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 3200e9 / 8, 25.6e12 / 256 / 8),
}

QUIET = {
    # Without these libtpu asks the cloud's metadata server what machine this is, and complains that there is none.
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
        """Raises: InputError: there is no libtpu, or no such topology."""
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                "Compiling for TPUs needs libtpu, which isn't installed: `pip install 'jax[tpu]'` (Linux)."
            )
        kind = name.partition(":")[0]
        if kind not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
            raise InputError(f"There is no topology {name!r}: give one of {', '.join(CHIPS)} and a shape, as v5e:4x4.")
        if not 1 <= num_slices <= 256:
            raise InputError(f"slices is {num_slices}; give 1 to 256.")
        from jax.experimental import topologies

        for variable, value in QUIET.items():
            os.environ.setdefault(variable, value)
        # A v4 chip's two cores are one device for its users.
        extra = {"chip_config_name": "megacore"} if kind == "v4" else {}
        slices = {"num_slices": num_slices} if num_slices > 1 else {}
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices, **extra)
        except Exception as error:  # XlaRuntimeError, NotImplementedError: by version
            raise InputError(f"libtpu knows no topology {name} ({str(error).splitlines()[0]}).") from error
        self.name = f"{num_slices} x {name}" if num_slices > 1 else name
        self.num_slices = num_slices
        self.chip: Chip = CHIPS[kind]
        self.devices = list(found.devices)


@dataclass(frozen=True)
class Work:
    """Of a program's matrix products; what lies between them is taken to be fused and free."""

    flops: float = 0.0
    """two a multiplication and addition"""
    bytes: float = 0.0
    """operands read and results written"""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.bytes * factor)


def work(jaxpr: Any, while_turns: int = 1) -> Work:
    """Counts a traced program's matrix products (`jax.make_jaxpr(f)(...).jaxpr`), loops included.

    Args:
        while_turns: turns of a loop whose number isn't known, such as that over the tokens of a text.
    """
    total = Work()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
            continue
        inner = [work(part, while_turns) for part in _parts(equation.params.values())]
        if equation.primitive.name == "cond":
            total += max(inner, key=lambda branch: branch.flops)
        elif inner:
            turns = {"scan": equation.params.get("length", 1), "while": while_turns}.get(equation.primitive.name, 1)
            total += sum(inner, Work()).times(turns)
    return total


def _parts(values: Iterable[Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            found += _parts(value)
        elif hasattr(value, "jaxpr"):
            found.append(value.jaxpr)
        elif hasattr(value, "eqns"):
            found.append(value)
    return found


def _product(equation: Any) -> Work:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval
    result = equation.outvars[0].aval
    flops = 2 * prod(result.shape) * prod(left.shape[axis] for axis in contracted)
    operands = [variable.aval for variable in equation.invars]
    # Sums are float32, but what is written has the operands' dtype as a rule: the cast is fused.
    return Work(flops, sum(map(nbytes, operands)) + prod(result.shape) * left.dtype.itemsize)


def nbytes(shape: Any) -> int:
    """Of an array or its shape; of a key, 0."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.extended):
        return 0
    return prod(shape.shape) * np.dtype(shape.dtype).itemsize
