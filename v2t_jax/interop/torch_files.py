"""Reads `torch.save` files of weights without torch: tensors and plain containers; every other object is refused.

The format is a zip archive of uncompressed members: PREFIX/data.pkl, a pickle whose tensors refer to the members
PREFIX/data/KEY, the raw elements of a storage. A pickle can run any code that it names: `find_class` knows few names.
"""

import importlib
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from v2t_jax.errors import InputError

_DTYPES = {"Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": "bfloat16", "Long": "<i8", "Int": "<i4"}
_DTYPES |= {"Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?"}


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, as views of the memory-mapped file."""
    try:
        loaded = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        gist = f"{type(error).__name__}: {error}".split("\n")[0]
        ways = "fetch it again, or save the weights as model.safetensors"
        raise InputError(f"{path} is damaged or contains more than weights ({gist}); {ways}.") from error
    items = loaded.items() if isinstance(loaded, dict) else [(None, None)]
    if not all(isinstance(key, str) and isinstance(value, np.ndarray) for key, value in items):
        raise InputError(f"{path} is not a dict of tensors by name; save a model's state_dict().")
    return loaded


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        prefix = archive.namelist()[0].partition("/")[0]
        with archive.open(f"{prefix}/data.pkl") as file:
            return _Unpickler(file, np.memmap(path, np.uint8, "r"), archive, prefix).load()


class _Dict(dict[Any, Any]):
    def __setstate__(self, state: Any) -> None:
        """Ignores the attributes of an OrderedDict: torch keeps the versions of modules there."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, content: np.ndarray, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(file)
        self._content, self._archive, self._prefix = content, archive, prefix
        self._known = {"collections.OrderedDict": _Dict, "torch._utils._rebuild_tensor_v2": self._tensor}
        self._known |= {"torch._utils._rebuild_parameter": lambda tensor, *_: tensor}
        self._known |= {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._known:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not a tensor or a plain container")
        return self._known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> tuple[np.ndarray, np.dtype]:
        """The bytes and the dtype of the storage ("storage", dtype, key, device, count)."""
        _, name, key, _, count = pid
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        member = self._archive.getinfo(f"{self._prefix}/data/{key}")
        start = member.header_offset + 30  # a header of 30 bytes, then a name and extra fields of variable length
        start += sum(struct.unpack("<HH", self._content[start - 4 : start].tobytes()))
        data = self._content[start : start + member.file_size]
        if member.compress_type != zipfile.ZIP_STORED or not len(data) == member.file_size == count * dtype.itemsize:
            raise pickle.UnpicklingError(f"the storage {key} is incomplete")
        return data, dtype

    def _tensor(self, storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> np.ndarray:
        data, dtype = storage  # numpy refuses shapes and strides that leave the buffer
        return np.ndarray(shape, dtype, data, offset * dtype.itemsize, [step * dtype.itemsize for step in strides])


def _read_legacy(path: Path) -> Any:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        ways = "fetch it again, run 'pip install torch', or save the weights as model.safetensors"
        raise InputError(f"{path} is damaged, or older than torch 1.6: {ways}.") from error
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(map(torch.is_tensor, loaded.values())):
        return None
    return {key: (v.float() if v.is_floating_point() else v).detach().numpy() for key, v in loaded.items()}
