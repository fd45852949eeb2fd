"""Folders of checkpoints: read, pickles too where torch is there to read their weights alone, and written whole."""

import importlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from v2t_jax.errors import InputError
from v2t_jax.interop.weights import Tensor, open_weights, weight_files

SAFETENSORS = "model.safetensors"


class _Pickled:
    """A tensor that torch has mapped from a file."""

    def __init__(self, tensor: Any) -> None:
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self._tensor = tensor

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._tensor[index].float().numpy()


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its key, each read only when it is indexed; safetensors before `.bin`.

    Raises:
        InputError: no weights, a damaged or missing file, a pickle that holds more than weights, or a `.bin` without
            torch to read it.
    """
    if any((folder / name).is_file() for name in (SAFETENSORS, f"{SAFETENSORS}.index.json")):
        return open_weights(weight_files(folder))
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        raise InputError(f"{folder} holds no weights: neither {SAFETENSORS} nor pytorch_model.bin.")
    return {key: tensor for path in pickled for key, tensor in _open_pickle(path).items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, named without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise InputError(
            f"Reading {path} needs torch, which isn't installed: run 'pip install torch', or save the weights as "
            f"{SAFETENSORS}."
        ) from error
    try:
        # Mapped, so that memory holds what was read; files older than the zip format can't be.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises whatever the damage leads to
        gist = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise InputError(
            f"{path} is damaged or holds more than weights, so it isn't read ({gist}); save the weights alone, best as "
            f"{SAFETENSORS}."
        ) from error
    if not isinstance(loaded, dict) or not all(torch.is_tensor(tensor) for tensor in loaded.values()):
        raise InputError(f"{path} is not a dict of tensors; save a model's state_dict().")
    return {key: _Pickled(tensor) for key, tensor in loaded.items()}


def read_json(path: Path, what: str) -> dict[str, Any]:
    """An object from a JSON file of `what`.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not {what}.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); fetch it again.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object; fetch it again.")
    return values


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder, filled under another name and renamed at the end: it appears whole or not at all.

    Raises:
        InputError: there is something at `folder`, or it can't be written.
    """
    check_new(folder)
    building = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        yield building
        building.chmod(0o755)  # a temporary folder, and what safetensors writes, are their owner's alone
        for path in building.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        building.replace(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} can't be written ({error}); free space or give another folder.") from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Refuses to write where something lies.

    Raises:
        InputError: there is something at `folder`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; give a new or an empty folder.")
