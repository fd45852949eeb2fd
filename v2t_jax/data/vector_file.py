"""A file of vectors as the rest of the package sees it: rows in batches, checked; what holds them; damage named."""

import itertools
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from numbers import Number
from tokenize import TokenError
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np

from v2t_jax.data.readers import IDS
from v2t_jax.errors import InputError

VECTORS = ("embedding", "embeddings", "vector", "vectors", "values", "emb", "dense")
MOST_FIELDS, MOST_BITS = 1000, 10_000  # of a record and a number that are looked at: stores are anybody's
TEXTS = ("text", "texts", "document", "documents", "content", "page_content", "sentence", "passage", "chunk")


class Rows(NamedTuple):
    """Some rows of a file."""

    vectors: np.ndarray  # [n, E], of the type that is stored
    ids: list[Any] | None = None
    texts: list[Any] | None = None
    metadata: list[dict[str, Any]] | None = None  # what else is kept beside them, as `plain` has it

    def part(self, rows: slice) -> "Rows":
        return Rows(self.vectors[rows], *(column if column is None else column[rows] for column in self[1:]))


@dataclass(frozen=True)
class VectorFile:
    """An opened file of vectors."""

    path: str
    count: int | None  # rows, where they can be told without reading them
    read: Callable[[int], Iterator[Rows]]  # the rows from one on, some at a time
    field: str | None = None  # of the vectors, if it was named
    first: int = 0  # the row of the file that is the first here
    described: Callable[[int], Iterator[Rows]] | None = None  # as `read`, with metadata, which takes longer

    def share(self, index: int, count: int) -> "VectorFile":
        """The `index`-th of `count` parts of equal size."""
        if self.count is None:
            raise InputError(
                f"How many rows {self.path} has isn't known, so it can't be shared; give .npy or .parquet."
            )
        first, end = self.count * index // count, self.count * (index + 1) // count

        def read(start: int) -> Iterator[Rows]:
            left = end - first - start
            for rows in self.read(first + start) if left else ():
                yield rows.part(slice(left))
                left -= len(rows.vectors)
                if left <= 0:
                    return

        return VectorFile(self.path, end - first, read, self.field, first)

    def rows(self) -> int:
        """How many rows there are, if need be by reading them."""
        return self.count if self.count is not None else sum(len(rows.vectors) for rows in self._checked(0))

    def sampled(self, size: int, seed: int = 0) -> "VectorFile":
        """`size` rows drawn without replacement, in their order; see `at`."""
        count = self.rows()
        return self.at(np.sort(np.random.default_rng(seed).choice(count, min(size, count), replace=False)))

    def with_texts(self, field: str) -> "VectorFile":
        """The same rows with the texts of a field of their metadata, which one of the first must have."""
        names = {name for beside in next(self.batches(1024)).metadata or () for name in beside}
        if field not in names:
            known = ", ".join(sorted(names)) or "none"
            raise InputError(f"{self.path} has no field {field!r} beside its vectors; give one of {known}.")

        def read(start: int) -> Iterator[Rows]:
            for rows in self.read(start):
                texts = [beside.get(field) for beside in rows.metadata or [{}] * len(rows.vectors)]
                yield rows._replace(texts=texts)

        return replace(self, read=read)

    def at(self, chosen: np.ndarray) -> "VectorFile":
        """The rows of these numbers, which ascend; rows without ids get their numbers as such."""

        def read(start: int) -> Iterator[Rows]:
            row = int(chosen[start]) if start < len(chosen) else 0
            for rows in self.read(row) if start < len(chosen) else ():
                end = row + len(rows.vectors)
                i = chosen[np.searchsorted(chosen, row) : np.searchsorted(chosen, end)] - row
                columns = [column and [column[j] for j in i] for column in rows[1:]]
                columns[0] = columns[0] or [self.first + row + int(j) for j in i]
                yield Rows(rows.vectors[i], *columns)
                row = end
                if row > chosen[-1]:
                    return

        return VectorFile(self.path, len(chosen), read, self.field)

    def batches(self, size: int, start: int = 0) -> Iterator[Rows]:
        """Rows from `start` on, `size` at a time but for the last."""
        held: list[Rows] = []
        for piece in self._checked(start):
            while len(piece.vectors):
                room = size - sum(len(part.vectors) for part in held)
                held.append(piece.part(slice(room)))
                piece = piece.part(slice(room, None))
                if len(held[-1].vectors) == room:
                    yield _joined(held)
                    held = []
        if held:
            yield _joined(held)

    def whole(self) -> Rows:
        """All rows at once, of a file that is small."""
        return _joined([*self._checked(0)] or [Rows(np.zeros((0, 0)))])

    def _checked(self, start: int) -> Iterator[Rows]:
        width = None
        with damage_named(self.path):
            for rows in self.read(start):
                if rows.vectors.ndim != 2:
                    shape = ", ".join(map(str, rows.vectors.shape[1:]))
                    raise InputError(f"{self.path} holds an array [n, {shape}]; give one of vectors, [n, E].")
                if rows.vectors.dtype == object:
                    raise InputError(f"{self.path} holds lists of lists; give one vector a row.")
                if any(column is not None and len(column) != len(rows.vectors) for column in rows[1:]):
                    raise InputError(f"{self.path} has not as many ids or texts as vectors; give one for each.")
                width = width or rows.vectors.shape[1]
                if rows.vectors.shape[1] != width:
                    found = f"{rows.vectors.shape[1]} after those of {width}"
                    raise InputError(f"{self.path} holds vectors of {found} numbers; leave only those of one embedder.")
                ids, texts = (column and [*map(readable, column)] for column in rows[1:3])
                yield Rows(rows.vectors, ids, texts, rows.metadata)


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def readable(value: Any) -> Any:
    """A value that can be written as text: no halves of characters, no numbers of thousands of digits."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        return f"a number of {value.bit_length():,} bits"
    return value


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, texts, times and lists of texts in a record; those of inner records by dotted names."""
    found: dict[str, Any] = {}
    left, seen = deque([("", record)]), 0
    while left:
        before, values = left.popleft()
        for key, value in values.items():
            seen += 1
            if seen > MOST_FIELDS:
                return found
            name, several = readable(f"{before}{key}"), value[:MOST_FIELDS] if isinstance(value, list) else [value]
            left.extend((f"{name}.", one) for one in several if isinstance(one, Mapping))
            kinds = str if isinstance(value, list) else str | Number | date | UUID  # lists of numbers are vectors
            if told := [readable(one) for one in several if isinstance(one, kinds)]:
                if name in found:
                    held = found[name]
                    found[name] = [*(held if isinstance(held, list) else [held]), *told]
                else:
                    found[name] = told if isinstance(value, list) else told[0]
    return found


def described(columns: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]] | None:
    """Metadata of rows by columns."""
    if not columns:
        return None
    return [plain(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def _joined(parts: list[Rows]) -> Rows:
    columns = zip(*(part[1:] for part in parts), strict=True)
    lists = [None if column[0] is None else [*itertools.chain(*column)] for column in columns]
    return Rows(np.concatenate([part.vectors for part in parts]), *lists)


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """What the libraries raise over a damaged file, as one sentence."""
    from pyarrow import ArrowException
    from safetensors import SafetensorError

    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8.") from error
    # numpy reads a header as Python source, so damage in it shows as that language's errors too.
    except (
        *(ArrowException, SafetensorError, zipfile.BadZipFile, zlib.error, NotImplementedError, OSError, EOFError),
        *(ValueError, OverflowError, TypeError, KeyError, SyntaxError, TokenError),
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:  # no damage: the file can't be read
            raise
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is truncated, damaged or not what its name says ({why}); write it again.") from error


def pick(path: str, field: str | None, names: Sequence[str], candidates: Sequence[str]) -> list[str | None]:
    """What holds the vectors, ids and texts, among `names`, of which `candidates` can hold vectors."""
    listed = ", ".join(map(str, names)) or "nothing"
    if field is not None and field not in candidates:
        raise InputError(f"{path} has no vectors named {field!r}; it holds {listed}.")
    chosen = field or next((name for name in VECTORS if name in candidates), None)
    if chosen is None and len(candidates) != 1:
        kind, advice = "no vectors", "give a file with a column or array of them"
        if candidates:
            kind, advice = "several that can be vectors", f"name one, as {path}:{candidates[0]}"
        raise InputError(f"{path} holds {kind} ({', '.join(candidates) or listed}); {advice}.")
    chosen = chosen or candidates[0]
    others = [name for name in names if name != chosen]
    return [chosen, *(next((name for name in known if name in others), None) for known in (IDS, TEXTS))]


def of_rows(path: str, rows: list[Any], first: int) -> np.ndarray:
    """Vectors [n, E] of lists of numbers, NaN where one is missing; row `first` of the file is the first."""
    known = [row for row in rows if row is not None]
    width = len(known[0]) if known and isinstance(known[0], list | np.ndarray) else 0
    try:
        vectors = np.asarray([[np.nan] * width if row is None else row for row in rows])
        if vectors.dtype == object:  # a number is missing
            vectors = np.where(vectors == None, np.nan, vectors).astype(np.float64)  # noqa: E711 (each of them)
        if vectors.ndim == 2 and width and vectors.dtype.kind in "fiu":
            return vectors
    except (ValueError, TypeError):  # rows of unequal length, or no numbers
        pass
    for number, row in enumerate(rows, first + 1):
        where = f"Row {number} of {path}"
        if not isinstance(row, list | np.ndarray | None):
            raise InputError(f"{where} has {str(row)[:40]!r} where a list of numbers is meant; remove or repair it.")
        if row is not None and len(row) != width:
            raise InputError(f"{where} has {len(row)} numbers, but others have {width}; remove or repair it.")
        if wrong := [one for one in row or () if not isinstance(one, int | float | np.number | None)]:
            raise InputError(f"{where} has {str(wrong[0])[:40]!r} where a number is meant; remove or repair it.")
    raise InputError(f"{path} has no vectors from row {first + 1} to {first + len(rows)}; remove or repair these rows.")


def whole_numbers(vectors: np.ndarray) -> bool:
    """Whether vectors are quantized to bytes, of whatever type a file's numbers have become."""
    return bool((vectors == np.round(vectors)).all() and (np.abs(vectors) <= 255).all())
