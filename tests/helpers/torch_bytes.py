"""Files as `torch.save` writes them, made without torch: pickles assembled opcode by opcode in a zip archive."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}
DICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    key: str, dtype: str, count: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0
) -> bytes:
    storage = b"(" + text("storage") + f"ctorch\n{STORAGES[dtype]}\n".encode() + text(key) + text("cpu") + number(count)
    arguments = storage + b"tQ" + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + DICT
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(items: Mapping[str, bytes]) -> bytes:
    """An OrderedDict with the attribute `_metadata`, as modules make it."""
    state = b"}" + text("_metadata") + DICT + b"s"
    return (
        b"\x80\x02" + DICT + b"(" + b"".join(text(key) + value for key, value in items.items()) + b"u" + state + b"b."
    )


def write(path: Path, pickled: bytes, storages: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """What `torch.save(state_dict, path)` would write."""
    items, storages = {}, {}
    for i, (name, array) in enumerate(tensors.items()):
        strides = tuple(step // array.itemsize for step in np.ascontiguousarray(array).strides) if array.ndim else ()
        items[name] = tensor(str(i), str(array.dtype), array.size, array.shape, strides)
        storages[str(i)] = array.tobytes()
    write(path, state_dict(items), storages)
