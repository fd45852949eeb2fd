"""The tensors of a folder that Hugging Face's `save_pretrained` wrote, each read when it is asked for."""

import functools
import importlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from v2t_jax.errors import InputError

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


class Weights(Mapping[str, np.ndarray]):
    """Names -> arrays of one folder; safetensors before `.bin`, one file or shards with an index.

    A context manager, because the files stay open. Arrays are read (and copied) at every access.

    Raises:
        InputError: no weights, a damaged or missing file, a pickle that holds more than weights, or a `.bin` without
            torch to read it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ExitStack()
        self._readers: dict[str, Callable[[], np.ndarray]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        try:
            for file in _files_of(folder):
                (self._open_safetensors if file.suffix == ".safetensors" else self._open_pickle)(file)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def __getitem__(self, name: str) -> np.ndarray:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers  # the inherited test would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def _open_safetensors(self, path: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(path, "numpy"))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path} is unreadable, truncated or no safetensors file ({error}); fetch it again."
            ) from error
        for name in file.keys():  # noqa: SIM118 (not a dict)
            self._readers[name] = functools.partial(file.get_tensor, name)
            self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def _open_pickle(self, path: Path) -> None:
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
                f"{path} is damaged or holds more than weights, so it isn't read ({gist}); save "
                f"the weights alone, best as {SAFETENSORS}."
            ) from error
        if not isinstance(loaded, dict) or not all(torch.is_tensor(tensor) for tensor in loaded.values()):
            raise InputError(f"{path} is not a dict of tensors; save a model's state_dict().")
        for name, tensor in loaded.items():
            self._readers[name] = functools.partial(_numpy, tensor)
            self._shapes[name] = tuple(tensor.shape)


class Part(Mapping[str, np.ndarray]):
    """The tensors under a prefix, named without it."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights, self._prefix = weights, prefix
        self._names = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
        self._known = set(self._names)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """An object from a JSON file of `what`.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not {what}.") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); fetch it again.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object; fetch it again.")
    return values


def _numpy(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()


def _files_of(folder: Path) -> list[Path]:
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
    raise InputError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}.")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder, filled under another name and renamed at the end: it appears whole or not at all.

    Raises:
        InputError: there is something at `folder`, or it can't be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; give a new or an empty folder.")
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
