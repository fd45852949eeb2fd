"""Folders of weights: written whole or not at all, with the user's own permissions, and what is refused of them."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from v2t_jax.errors import InputError
from v2t_jax.interop.files import check_new, whole_folder


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_that_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as building:
            (building / "inside").mkdir()
            save_file({"x": np.zeros(1)}, building / "inside" / "model.safetensors")
            (building / "config.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folders, files = 0o777 & ~umask, 0o666 & ~umask
    assert modes == {"out": folders, "inside": folders, "model.safetensors": files, "config.json": files}


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as building:
        (building / "config.json").write_text("{}")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def _link(folder: Path) -> Path:
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("empty")
    return folder / "link"


def _dangling(folder: Path) -> Path:
    (folder / "link").symlink_to("nothing")
    return folder / "link"


def _full(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("years of work")
    return folder / "out"


def _file(folder: Path) -> Path:
    (folder / "out").write_text("years of work")
    return folder / "out"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (lambda folder: Path(), "is the current folder, which can't be replaced; give another folder"),
        (lambda folder: folder, "is the current folder"),
        (lambda folder: Path("/"), "is a mounted disk"),
        (_link, "link is a link, which can't be replaced"),
        (_dangling, "link is a link"),
        (_full, "exists already; give a new or an empty folder"),
        (_file, "exists already"),
        (lambda folder: folder / ("x" * 300), "can't be written .*; give another folder"),
    ],
)
def test_targets_that_are_refused_before_any_work(
    target: Callable[[Path], Path], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = target(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        check_new(path)
    with pytest.raises(InputError, match=words), whole_folder(path):
        pytest.fail("the work was begun")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as building:
        (building / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "config.json"]
