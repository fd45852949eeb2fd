"""Columns of a built data set: an array of one shape for each text, such as its embedding.

DIR/columns/NAME/values.npy      [N, ...], memory-mapped by readers
DIR/columns/NAME/manifest.json   what made it, and once it is finished, its size and sha256
DIR/columns/NAME/done/PIECE      while it is being made, an empty file for each piece of rows that is on disk
"""

import json
import os
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np

from v2t_jax.data.dataset import (
    FORMAT,
    TokenDataset,
    check_file,
    claim,
    npy_header,
    open_array,
    read_manifest,
    write_json,
)
from v2t_jax.errors import InputError
from v2t_jax.interop.files import sha256_of

PIECE_ROWS = 4096  # rows that are computed, and kept, at a time


@dataclass(frozen=True, eq=False)
class Column:
    """A finished column."""

    name: str
    values: np.ndarray  # [N, ...], a row for each text
    made_by: dict[str, Any]  # everything that determines the values


def open_column(dataset: TokenDataset, name: str) -> Column:
    """Opens a finished column; compares its file's size with the manifest, but not every byte."""
    folder = dataset.folder / "columns" / name
    maker = "v2t data embed', 'import' or 'hypotheses"
    manifest, _ = read_manifest(folder / "manifest.json", maker, ("of", "file", "made_by"))
    if manifest["of"] != dataset.manifest_sha256:
        raise InputError(f"{folder} belongs to another build of {dataset.folder}: delete it and make it again.")
    if manifest["file"] is None:
        raise InputError(f"{folder} was never finished: run the command that makes it again.")
    check_file(folder / "values.npy", manifest["file"], whole=False)
    return Column(name, open_array(folder / "values.npy"), manifest["made_by"])


class ColumnWriter:
    """Writes a column piece by piece, in any order and from any number of processes.

    `made_by` must hold everything that determines the values: another one is refused. A piece is a run of rows, or,
    with `num_pieces`, the rows that it is written with.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        made_by: dict[str, Any],
        num_pieces: int | None = None,
    ):
        folder = dataset.folder / "columns" / name
        self._values, self._manifest, self._done = (folder / part for part in ("values.npy", "manifest.json", "done"))
        self._rows, self._dtype, self._shape = len(dataset), np.dtype(dtype).newbyteorder("<"), shape
        self._num_pieces = -(-self._rows // PIECE_ROWS) if num_pieces is None else num_pieces
        described = {"dtype": dtype, "shape": shape, "piece_rows": PIECE_ROWS, "made_by": made_by}
        self._described = {"format": FORMAT, "of": dataset.manifest_sha256, **json.loads(json.dumps(described))}
        claim(self._manifest, self._described | {"file": None}, folder)
        header = npy_header((self._rows, *shape), self._dtype)
        self._start, self._row_bytes = len(header), self._dtype.itemsize * int(np.prod(shape))
        # The same in every process: it doesn't matter who comes first.
        with open(os.open(self._values, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            file.write(header)
            file.truncate(self._start + self._rows * self._row_bytes)

    def rows(self, piece: int) -> slice:
        return slice(piece * PIECE_ROWS, min((piece + 1) * PIECE_ROWS, self._rows))

    def missing(self) -> list[int]:
        """The pieces that have yet to be written."""
        if json.loads(self._manifest.read_bytes())["file"]:
            return []
        done = {int(file.name) for file in self._done.glob("[0-9]*")}
        return [piece for piece in range(self._num_pieces) if piece not in done]

    def write(self, piece: int, values: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Writes the values [n, ...] of a piece, whose rows may be given; they are on disk when this returns."""
        run = self.rows(piece)
        expected = run.stop - run.start if rows is None else len(rows)
        assert values.shape == (expected, *self._shape), f"{values.shape} in piece {piece}"
        values = np.ascontiguousarray(values, self._dtype)
        with self._values.open("r+b") as file:
            for row, part in [(run.start, values)] if rows is None else zip(rows.tolist(), values, strict=True):
                file.seek(self._start + row * self._row_bytes)
                file.write(part.tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._done.mkdir(exist_ok=True)
        (self._done / f"{piece:06d}").touch()

    def finish(self) -> None:
        """Writes the final manifest once no piece is missing: from then on the column can be read."""
        assert not self.missing(), f"pieces {self.missing()} of {self._values} are missing"
        entry = {"bytes": self._values.stat().st_size, "sha256": sha256_of([self._values])}
        write_json(self._manifest, self._described | {"file": entry})
        shutil.rmtree(self._done, ignore_errors=True)
