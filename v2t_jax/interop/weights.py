"""Weights as PyTorch projects keep them, read tensor by tensor into our parameters.

Ours differ in three ways: layers of a stack are stacked on a leading axis, linear weights are [in, out] where torch has
[out, in], and matrices that are stored as one are kept apart.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.errors import InputError
from v2t_jax.models.layers import Params


class ShapeError(InputError):
    """A weight's shape isn't what the config means: one of them is another model's."""


class Tensor(Protocol):
    """An array, or something that can be read as one, whole or in part."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: Any) -> np.ndarray: ...


class Entry(NamedTuple):
    """Where a tensor of theirs goes in our parameters."""

    theirs: str
    ours: tuple[str, ...]
    layer: int | None  # index on our leading axis, None where there is no such axis
    transposed: bool
    part: tuple[int, int] = (0, 1)
    """(i, n): ours is the i-th of n equal parts of theirs, cut over its first axis"""


def fill(
    abstract: Any,
    entries: Iterable[Entry],
    tensors: Mapping[str, Tensor],
    what: str,
    ignored: Callable[[str], bool],
    kernel_dtype: str = "float32",
    put: Callable[[np.ndarray], Any] = lambda array: array,
) -> Params:
    """Parameters like `abstract` (a tree of shapes), filled from `tensors`.

    One of our arrays is in the host's memory at a time, if `put` takes it away.

    Args:
        what: the architecture's name, for errors.
        ignored: keys that may be there and aren't read.
        kernel_dtype: of what is only ever multiplied with in this dtype; the rest is float32.
        put: takes each array when it is full.

    Raises:
        InputError: a key is missing, unknown, of a shape that the config doesn't mean, or holds no real numbers.
    """
    parts: dict[tuple[str, ...], list[Entry]] = {}
    used = set()
    for entry in entries:
        parts.setdefault(entry.ours, []).append(entry)
        used.add(entry.theirs)
        if entry.theirs not in tensors:
            raise InputError(
                f"The {what} weights lack {entry.theirs!r}; the file is incomplete or its config describes another "
                "model."
            )
    unknown = sorted(key for key in tensors if key not in used and not ignored(key))
    if unknown:
        raise InputError(f"The {what} weights hold the unknown key {unknown[0]!r}; its config describes another model.")

    def filled(path: tuple[Any, ...], leaf: Any) -> Any:
        chosen = parts[tuple(step.key for step in path)]
        for entry in chosen:  # before there is an array of the size that the config means
            shape = leaf.shape if entry.layer is None else leaf.shape[1:]
            shape = shape[::-1] if entry.transposed else shape
            found, meant = tensors[entry.theirs].shape, (entry.part[1] * shape[0], *shape[1:])
            if found != meant:
                raise ShapeError(f"{what} weight {entry.theirs!r} has shape {found}; its config means {meant}.")
        array = np.zeros(leaf.shape, kernel_dtype if chosen[0].transposed else np.float32)
        for entry in chosen:
            target = array if entry.layer is None else array[entry.layer]
            target = target.T if entry.transposed else target
            i = entry.part[0]
            values = tensors[entry.theirs][i * target.shape[0] : (i + 1) * target.shape[0]]
            target[...] = real_numbers(values, f"{what} weight {entry.theirs!r}")
        return put(array)

    return jax.tree_util.tree_map_with_path(filled, abstract)


def real_numbers(values: np.ndarray, where: str) -> np.ndarray:
    """The values themselves.

    Raises:
        InputError: they are quantized.
    """
    if not jnp.issubdtype(values.dtype, jnp.floating):  # numpy's own doesn't know bfloat16
        raise InputError(
            f"{where} is of dtype {values.dtype}; quantized weights aren't read: give those of float32, float16 or "
            "bfloat16."
        )
    return values
