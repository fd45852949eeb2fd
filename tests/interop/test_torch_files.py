"""Weights that torch saved are read without torch; anything but weights is refused, and never run."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.helpers import torch_bytes
from v2t_jax.errors import InputError
from v2t_jax.interop.files import open_checkpoint
from v2t_jax.interop.torch_files import read_torch_file

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_]


@pytest.fixture(autouse=True)
def no_torch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "oracle" not in request.keywords:
        monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: Any, tmp_path: Path) -> None:
    arrays = {"matrix": np.arange(6).reshape(2, 3), "scalar": np.array(3), "empty": np.zeros((0, 4))}
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    torch_bytes.save(tmp_path / "pytorch_model.bin", arrays)
    found = open_checkpoint(tmp_path)
    assert [*found] == [*arrays]
    for name, array in arrays.items():
        assert found[name].shape == array.shape and found[name][...].dtype == dtype
        np.testing.assert_array_equal(found[name][...], array)
    np.testing.assert_array_equal(found["matrix"][1:], arrays["matrix"][1:])


def test_views_of_one_storage(tmp_path: Path) -> None:
    data = np.arange(12, dtype=np.float32)
    items = {
        "transposed": torch_bytes.tensor("0", "float32", 12, (4, 3), (1, 4)),
        "row": torch_bytes.tensor("0", "float32", 12, (4,), (1,), offset=8),
    }
    torch_bytes.write(tmp_path / "x.bin", torch_bytes.state_dict(items), {"0": data.tobytes()})
    found = read_torch_file(tmp_path / "x.bin")
    np.testing.assert_array_equal(found["transposed"], data.reshape(3, 4).T)
    np.testing.assert_array_equal(found["row"], data[8:])


class Hostile:
    def __init__(self, target: Path) -> None:
        self.command = f"touch {target}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("hidden", [lambda one: one, lambda one: {"weight": one}, lambda one: {"a": {"b": [one]}}])
def test_hostile_pickles_are_refused_and_not_run(hidden: Any, protocol: int, tmp_path: Path) -> None:
    torch_bytes.write(tmp_path / "x.bin", pickle.dumps(hidden(Hostile(tmp_path / "ran")), protocol), {})
    with pytest.raises(InputError, match=r"contains more than weights .*it refers to (posix|nt).system"):
        read_torch_file(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


NAMES = ["builtins\neval", "builtins\ngetattr", "torch\nload", "torch.storage\n_load_from_bytes", "numpy\nndarray"]


@pytest.mark.parametrize("name", [*NAMES, "collections\nOrderedDict.fromkeys", "functools\npartial"])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    torch_bytes.write(tmp_path / "x.bin", b"\x80\x04c" + name.encode() + b"\n.", {})
    with pytest.raises(InputError, match=f"it refers to {name.replace(chr(10), '.')}"):
        read_torch_file(tmp_path / "x.bin")


WHOLE = torch_bytes.state_dict({"x": torch_bytes.tensor("0", "float32", 4, (2, 2), (2, 1))})
DAMAGED: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "no storage": (WHOLE, {}),
    "short storage": (WHOLE, {"0": bytes(12)}),
    "long storage": (WHOLE, {"0": bytes(20)}),
    "cut pickle": (WHOLE[:-20], {"0": bytes(16)}),
    "beyond": (
        torch_bytes.state_dict({"x": torch_bytes.tensor("0", "float32", 4, (2, 2), (2, 1), 1)}),
        {"0": bytes(16)},
    ),
    "before": (torch_bytes.state_dict({"x": torch_bytes.tensor("0", "float32", 4, (1,), (1,), -4)}), {"0": bytes(16)}),
    "backwards": (
        torch_bytes.state_dict({"x": torch_bytes.tensor("0", "float32", 4, (4,), (-1,), 2)}),
        {"0": bytes(16)},
    ),
    "negative": (torch_bytes.state_dict({"x": torch_bytes.tensor("0", "float32", 4, (-1,), (1,))}), {"0": bytes(16)}),
    "huge": (
        torch_bytes.state_dict({"x": torch_bytes.tensor("0", "float32", 4, (2**31 - 1,), (1,))}),
        {"0": bytes(16)},
    ),
    "negative count": (torch_bytes.state_dict({"x": torch_bytes.tensor("0", "float32", -4, (1,), (1,))}), {"0": b""}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_one_sentence(damage: str, tmp_path: Path) -> None:
    torch_bytes.write(tmp_path / "x.bin", *DAMAGED[damage])
    with pytest.raises(InputError, match="is damaged or contains more than weights .*fetch it again"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.parametrize("loaded", [{0: 1.0}, {"key": 3}, [1.0], None])
def test_something_else_than_a_state_dict(loaded: object, tmp_path: Path) -> None:
    torch_bytes.write(tmp_path / "x.bin", pickle.dumps(loaded, 2), {})
    with pytest.raises(InputError, match="x.bin is not a dict of tensors by name"):
        read_torch_file(tmp_path / "x.bin")


def test_the_format_before_zip_needs_torch(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    with pytest.raises(InputError, match="older than torch 1.6: .* 'pip install torch', or save .* model.safetensors"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.oracle
@pytest.mark.parametrize("legacy", [False, True])
def test_the_same_as_torch(legacy: bool, tmp_path: Path) -> None:
    torch: Any = __import__("torch")
    network = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    state = network.state_dict() | {"parameter": torch.nn.Parameter(torch.randn(2, 3))}
    base = torch.randn(6, 4)
    state |= {"transposed": base.T, "slice": base[1:5:2, 1:], "expanded": base[:1].expand(3, 4), "scalar": base[0, 0]}
    state |= {str(dtype): torch.arange(5).to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)}
    state |= {str(dtype): torch.arange(5).to(dtype) for dtype in (torch.int64, torch.int32, torch.int8, torch.bool)}
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    found = read_torch_file(tmp_path / "x.bin")
    expected = torch.load(tmp_path / "x.bin", weights_only=True)
    assert [*found] == [*expected]
    for name, value in expected.items():
        assert found[name].shape == tuple(value.shape)
        floats = value.detach().double() if value.is_floating_point() else value
        np.testing.assert_array_equal(found[name].astype(floats.numpy().dtype), floats.numpy())
