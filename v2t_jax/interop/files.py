"""A checkpoint folder as Hugging Face's `save_pretrained` leaves it: its tensors, each read when it is asked for."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from v2t_jax.errors import InputError
from v2t_jax.interop.torch_files import read_torch_file

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


class StoredTensor:
    """A tensor in a file: its shape, and its values, read at every access (of a pickle, a view of the mapped file)."""

    def __init__(self, path: Path, source: Any, shape: Any) -> None:
        self.shape: tuple[int, ...] = tuple(shape)
        self._path, self._source = path, source

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return np.asarray(self._source[index])
        except (OSError, SafetensorError, TypeError) as error:
            raise InputError(f"{self._path} is unreadable or of an unknown dtype ({error}); fetch it again.") from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype, copy=copy)


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its key; safetensors before `.bin`, one file or shards with an index.

    Raises:
        InputError: no weights, a damaged or missing file, or a `.bin` that contains more than weights.
    """
    return open_weights(weight_files(folder))


def open_weights(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of files by its key; see `open_checkpoint`."""
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            tensors |= _open_safetensors(path)
        else:
            tensors |= {key: StoredTensor(path, array, array.shape) for key, array in read_torch_file(path).items()}
    return tensors


def sha256_of(files: Iterable[Path]) -> str:
    """The sha256 of a file; of several, that of their sha256s, in hexadecimal and in order."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def part(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The tensors under a prefix, named without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def weight_files(folder: Path) -> list[Path]:
    """The file of a folder's weights, or all that its index names: safetensors before `.bin`.

    Raises:
        InputError: there is none, or the index is damaged or names files that are missing.
    """
    for name in (SAFETENSORS, PICKLE):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index, "a checkpoint").get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise InputError(f"{index} has no weight_map; fetch it again.")
            files = [folder / Path(shard).name for shard in sorted(set(shards.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise InputError(f"{folder} lacks {missing[0]}, which its index names; fetch it again.")
            return files
    raise InputError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}; fetch it again.")


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, "numpy")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}); fetch it again.") from error
    return {key: StoredTensor(path, values, values.get_shape()) for key, values in slices.items()}


def read_json(path: Path, what: str, kind: type = dict) -> Any:
    """An object, or another `kind` of value, from a JSON file of `what`.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not {what}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); fetch it again.") from error
    if not isinstance(values, kind):
        raise InputError(f"{path} holds no JSON {'object' if kind is dict else kind.__name__}; fetch it again.")
    return values


def size(config: dict[str, Any], *names: str, default: int | None = None) -> int:
    """A whole number from 1 to 2**31 - 1 from a `config.json`, under the first of these names that is there.

    Raises:
        InputError: it is something else, or there is none and no default.
    """
    for name in names:
        if config.get(name) is not None:
            value = config[name]
            if type(value) is not int or not 1 <= value < 2**31:
                raise InputError(f"config.json says {name} = {value!r}; it must be a whole number from 1 to 2**31 - 1.")
            return value
    if default is None:
        raise InputError(f"config.json lacks {names[0]!r}; it must be the one beside the weights.")
    return default


def number(config: dict[str, Any], *names: str, default: float, or_zero: bool = False) -> float:
    """A positive number from a `config.json`, as `size`.

    Raises:
        InputError: it is something else.
    """
    for name in names:
        if config.get(name) is not None:
            value = config[name]
            fits = type(value) in (int, float) and 0 <= value <= sys.float_info.max and (value > 0 or or_zero)
            if not fits:
                kind = "0 or a positive number" if or_zero else "a positive number"
                raise InputError(f"config.json says {name} = {value!r}; it must be {kind}.")
            return float(value)
    return default


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder, filled elsewhere beside it and renamed at the end: it appears whole or not at all.

    Args:
        replace: whether what lies at `folder` goes.

    Raises:
        InputError: there is something at `folder`, or it can't be written.
    """
    if replace:
        _check_replaceable(folder)
    else:
        check_new(folder)
    around = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        around = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        building = around / folder.name
        building.mkdir()
        yield building
        mode = building.stat().st_mode & 0o666  # the umask's; what safetensors writes is its owner's alone
        for path in building.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} can't be written ({error}); free space or give another folder.") from error
    finally:
        if around is not None:
            shutil.rmtree(around, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Refuses a target of `whole_folder` where something lies.

    Raises:
        InputError: there is something at `folder`, or it can't be replaced.
    """
    _check_replaceable(folder)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        above = next(parent for parent in folder.absolute().parents if parent.exists())
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error}); give another folder.") from error
    if taken:
        raise InputError(f"{folder} exists already; give a new or an empty folder.")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder} can't be written: {above} is no folder or can't be written to; give another.")


def _check_replaceable(folder: Path) -> None:
    """Refuses what another folder can't be renamed to."""
    try:
        is_link, is_here = folder.is_symlink(), folder.exists() and folder.samefile(".")
        if is_link or is_here or folder.is_mount():
            kind = "a link" if is_link else "the current folder" if is_here else "a mounted disk"
            raise InputError(
                f"{folder} is {kind}, which can't be replaced; give another folder, such as one inside it."
            )
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error}); give another folder.") from error
