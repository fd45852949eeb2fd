"""Columns of a built data set: an array of one shape for each text, such as its embedding.

DIR/columns/NAME/values.npy      [N, ...], memory-mapped by readers
DIR/columns/NAME/manifest.json   what made it, and once it is finished, its size and sha256
DIR/columns/NAME/done/PIECE      while it is being made, an empty file for each piece of rows that is on disk
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from v2t_jax.data.dataset import FORMAT, TokenDataset, as_json, check_file, claim, npy_header, open_array, read_manifest
from v2t_jax.errors import InputError
from v2t_jax.interop.files import sha256_of, write_file

PIECE_ROWS = 4096  # rows that are computed, and kept, at a time


@dataclass(frozen=True, eq=False)
class Column:
    """A finished column."""

    name: str
    values: np.ndarray  # [N, ...], a row for each text
    made_by: dict[str, Any]  # everything that determines the values


def column_folder(dataset: TokenDataset, name: str) -> Path:
    """Where a column of this name lies."""
    return dataset.folder / "columns" / name


def open_column(dataset: TokenDataset, name: str, whole: bool = False) -> Column:
    """Opens a finished column of a built data set.

    Args:
        whole: compare every byte with the manifest, not only the file's size.

    Raises:
        InputError: there is none of this name, it isn't finished, is damaged, or belongs to another build.
    """
    folder = column_folder(dataset, name)
    manifest, _ = read_manifest(folder / "manifest.json", "v2t data embed' or 'v2t data hypotheses")
    if manifest.get("of") != dataset.manifest_sha256:
        raise InputError(f"{folder} belongs to another build of {dataset.folder}: delete it and make it again.")
    try:
        if manifest["file"] is None:
            raise InputError(f"{folder} was never finished: run the command that makes it again.")
        check_file(folder / "values.npy", manifest["file"], whole)
        return Column(name, open_array(folder / "values.npy"), manifest["made_by"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}/manifest.json is damaged ({error} is missing): delete {folder}.") from error


class ColumnWriter:
    """Writes a column piece by piece, in any order and from any number of processes.

    A piece on disk stays there whatever happens later; a process that is killed loses the piece in hand. `made_by`
    must hold everything that determines the values: another one is refused.

    Raises (all methods):
        InputError: the folder holds a column that something else made.
        OSError: the disk is full, or the like.
    """

    def __init__(
        self, dataset: TokenDataset, name: str, dtype: str, shape: tuple[int, ...], made_by: dict[str, Any]
    ) -> None:
        self._folder = column_folder(dataset, name)
        self._rows, self._dtype, self._shape = len(dataset), np.dtype(dtype).newbyteorder("<"), shape
        described = {"dtype": dtype, "shape": shape, "piece_rows": PIECE_ROWS, "made_by": made_by}
        self._described = {"format": FORMAT, "of": dataset.manifest_sha256, **json.loads(json.dumps(described))}
        claim(self._folder / "manifest.json", self._described | {"file": None}, self._folder)
        header = npy_header((self._rows, *shape), self._dtype)
        self._start = len(header)
        file = os.open(self._folder / "values.npy", os.O_RDWR | os.O_CREAT, 0o666)
        try:  # the same in every process: it doesn't matter who comes first
            os.pwrite(file, header, 0)
            os.ftruncate(file, self._start + self._rows * self._row_bytes)
        finally:
            os.close(file)

    @property
    def _row_bytes(self) -> int:
        return self._dtype.itemsize * int(np.prod(self._shape))

    def rows(self, piece: int) -> slice:
        """The rows of a piece."""
        return slice(piece * PIECE_ROWS, min((piece + 1) * PIECE_ROWS, self._rows))

    def missing(self) -> list[int]:
        """The pieces that have yet to be written."""
        if json.loads((self._folder / "manifest.json").read_bytes())["file"]:
            return []
        done = {int(file.name) for file in (self._folder / "done").glob("[0-9]*")}
        return [piece for piece in range(-(-self._rows // PIECE_ROWS)) if piece not in done]

    def write(self, piece: int, values: np.ndarray) -> None:
        """Writes the values [rows, ...] of a piece; they are on disk when this returns."""
        rows = self.rows(piece)
        assert values.shape == (rows.stop - rows.start, *self._shape), f"{values.shape} in piece {piece}"
        with (self._folder / "values.npy").open("r+b") as file:
            file.seek(self._start + rows.start * self._row_bytes)
            file.write(np.ascontiguousarray(values, self._dtype).tobytes())
            file.flush()
            os.fsync(file.fileno())
        (self._folder / "done").mkdir(exist_ok=True)
        (self._folder / "done" / f"{piece:06d}").touch()

    def finish(self) -> None:
        """Writes the final manifest once no piece is missing: from then on the column can be read."""
        assert not self.missing(), f"pieces {self.missing()} of {self._folder} are missing"
        values = self._folder / "values.npy"
        entry = {"bytes": values.stat().st_size, "sha256": sha256_of([values])}
        write_file(self._folder / "manifest.json", [as_json(self._described | {"file": entry})])
        shutil.rmtree(self._folder / "done", ignore_errors=True)
