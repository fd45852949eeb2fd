"""Weights as PyTorch projects keep them: tensors in safetensors files, read one by one into our parameters.

Ours differ in three ways: layers of a stack are stacked on a leading axis, linear weights are [in, out] where torch has
[out, in], and matrices that are stored as one are kept apart.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from v2t_jax.errors import InputError
from v2t_jax.models.layers import Params


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


class _Stored:
    """A tensor in a safetensors file; nothing of it is in memory."""

    def __init__(self, path: Path, file: Any, key: str):
        self._path, self._slice = path, file.get_slice(key)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return self._slice[index]
        except (OSError, SafetensorError, TypeError) as error:
            raise InputError(f"{self._path} is unreadable or of an unknown dtype ({error}): fetch it again.") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors file of a folder, or all that its index names.

    Raises:
        InputError: there is none, or the index is damaged or names files that are missing.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file() or not index.is_file():
        if not single.is_file() and (pickled := [*folder.glob("pytorch_model*.bin")]):
            raise InputError(
                f"{folder} holds its weights as a pickle ({pickled[0].name}), which can run code and is not read: "
                "save them with transformers' save_pretrained, which writes model.safetensors."
            )
        if not single.is_file():
            raise InputError(f"{single} is missing: only safetensors weights are read.")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not a readable index of weights ({error}): fetch it again.") from error
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is missing, though {index.name} names it: fetch the folder again.")
    return files


def open_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of safetensors files by its key; each is read only when it is indexed.

    Raises:
        InputError: a file is missing, truncated or not a safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            file = safe_open(path, framework="numpy")
            tensors |= {key: _Stored(path, file, key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
        except FileNotFoundError:
            raise InputError(f"{path} is missing: only safetensors weights are read.") from None
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is unreadable, truncated or not a safetensors file ({error}): fetch it again."
            ) from error
    return tensors


def sha256_of(files: Iterable[Path]) -> str:
    """The sha256 of a file; of several, that of their sha256s, in hexadecimal and in order."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


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
        InputError: a key is missing, unknown, or of a shape that the config doesn't mean.
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
        array = np.zeros(leaf.shape, kernel_dtype if chosen[0].transposed else np.float32)
        for entry in chosen:
            target = array if entry.layer is None else array[entry.layer]
            target = target.T if entry.transposed else target
            tensor, (i, n) = tensors[entry.theirs], entry.part
            meant = (n * target.shape[0], *target.shape[1:])
            if tensor.shape != meant:
                raise InputError(f"{what} weight {entry.theirs!r} has shape {tensor.shape}; its config means {meant}.")
            target[...] = tensor[i * target.shape[0] : (i + 1) * target.shape[0]]
        return put(array)

    return jax.tree_util.tree_map_with_path(filled, abstract)
