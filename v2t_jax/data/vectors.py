"""Reads vectors from files, with the ids and texts beside them, so that no file is ever whole in memory.

    NAME.npy                        an array [n, E]
    NAME.npz, NAME.safetensors      an array [n, E], and perhaps arrays of ids and texts [n]
    NAME.parquet, .arrow, .feather  a column of lists, or a column for each dimension, named by number: dim_0, ...
    NAME.csv, .tsv                  the same; lists as text: "[0.1, 0.2]", as pgvector, pandas and numpy write them
    NAME.jsonl                      an object or a list a line
    NAME.json                       a list of these; or lists in an object, as {"embeddings": ..., "ids": ...}

Lines, CSV and TSV may be compressed by gzip (.csv.gz ...). FILE:FIELD names the array, column or field of the vectors,
or what the names of the dimensions' columns begin with; without it, it is found by its name or as the only one.
"""

import codecs
import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import mmap
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from v2t_jax import progress
from v2t_jax.data.readers import IDS
from v2t_jax.data.vector_file import TEXTS, VECTORS, Rows, VectorFile, damage_named, described, of_rows, pick, plain
from v2t_jax.errors import InputError

ROWS = 1024  # that are read at a time
OBJECTS = "{} holds Python objects where vectors are meant; save an array of numbers."


def open_vectors(name: str) -> VectorFile:
    """A file of vectors, FILE or FILE:FIELD; see the module's docstring."""
    before, _, behind = name.rpartition(":")
    whole = os.path.exists(name) or not before
    path, field = (name, None) if whole else (before, behind)
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path!r} is a folder, a pipe or a device; give a file of vectors.")
    kind = path.lower()
    opener = next((opener for ending, opener in _OPENERS.items() if kind.removesuffix(".gz").endswith(ending)), None)
    if opener is None or (kind.endswith(".gz") and opener not in (_open_lines, _open_csv)):
        kinds, what = ", ".join(_OPENERS), "is of no known kind" if os.path.exists(path) else "doesn't exist"
        raise InputError(f"{name!r} {what}; give a file whose name ends in {kinds}, or FILE:FIELD.")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty; give a file with vectors in it.")
    with damage_named(path):
        return dataclasses.replace(opener(path, field), field=field)


def _open_npy(path: str, field: str | None) -> VectorFile:
    with open(path, "rb") as content:
        if content.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            raise ValueError("it doesn't begin as .npy files do")
        content.seek(0)
        if _npy_header(content)[2].hasobject:
            raise InputError(OBJECTS.format(path))

    def opened() -> dict[str, Any]:
        # Mapped, not read: a header that promises more than the file holds is refused before memory is asked for.
        array = np.load(path, allow_pickle=False, mmap_mode="r")
        return {"vectors": array[None] if array.ndim == 1 and len(array) else array}

    return _of_arrays(path, opened, field)


def _open_safetensors(path: str, field: str | None) -> VectorFile:
    from safetensors import safe_open

    def opened() -> dict[str, Any]:
        file = safe_open(path, "numpy")
        return {name: _Slices(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)

    return _of_arrays(path, opened, field)


class _Slices:
    """A safetensors array, of which slices are read."""

    def __init__(self, source: Any) -> None:
        self.shape, self._source = tuple(source.get_shape()), source

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._source[rows.start : min(rows.stop, len(self))]


def _of_arrays(path: str, opened: Callable[[], dict[str, Any]], field: str | None) -> VectorFile:
    arrays = opened()
    names = pick(path, field, list(arrays), [name for name, array in arrays.items() if len(array.shape) == 2])
    count = len(arrays[str(names[0])])

    def read(start: int) -> Iterator[Rows]:
        for first in range(start, count, ROWS):
            arrays = opened()  # each time, or what was read would stay mapped
            vectors, *others = (None if name is None else arrays[name][first : first + ROWS] for name in names)
            yield Rows(np.array(vectors), *map(_listed, others))

    return VectorFile(path, count, read)


def _open_npz(path: str, field: str | None) -> VectorFile:
    """An archive of arrays, which may be compressed: they are read from front to back."""
    archive = zipfile.ZipFile(path)
    headers = {}
    for member in archive.namelist():
        with archive.open(member) as stream:
            headers[member.removesuffix(".npy")] = _npy_header(stream)
    names = pick(path, field, list(headers), [name for name, (shape, *_) in headers.items() if len(shape) == 2])
    if headers[str(names[0])][1]:
        raise InputError(f"{path} holds an array in Fortran's order; save it as numpy.ascontiguousarray(vectors).")
    count = headers[str(names[0])][0][0]

    def column(name: str, start: int) -> Iterator[np.ndarray]:
        with archive.open(f"{name}.npy") as stream:
            shape, _, dtype = _npy_header(stream)
            row = dtype.itemsize * int(np.prod(shape[1:]))
            stream.seek(start * row, os.SEEK_CUR)
            for first in range(start, count, ROWS):
                content = stream.read(row * min(ROWS, count - first))
                yield np.frombuffer(content, dtype).reshape(-1, *shape[1:])

    # Arrays of Python objects would have to be unpickled.
    usable = [name if name and headers[name][2].hasobject is False else None for name in names]
    rest = [n for n, (shape, _, kind) in headers.items() if shape == (count,) and not kind.hasobject and n not in names]
    if usable[0] is None:
        raise InputError(OBJECTS.format(path))

    def read(start: int, rest: Sequence[str] = ()) -> Iterator[Rows]:
        columns = [itertools.repeat(None) if name is None else column(name, start) for name in (*usable, *rest)]
        for vectors, *others in zip(*columns):  # noqa: B905 (columns that aren't there have no end)
            ids, texts, *values = map(_listed, others)
            yield Rows(vectors, ids, texts, described(dict(zip(rest, filter(None, values), strict=True))))

    return VectorFile(path, count, read, described=functools.partial(read, rest=rest))


def _listed(array: np.ndarray | None) -> list[Any] | None:
    return None if array is None else (array.astype(np.str_) if array.dtype.kind == "S" else array).tolist()


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and type of an array; the stream then stands at its numbers."""
    old = np.lib.format.read_magic(stream) == (1, 0)
    return (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(stream)


def _open_parquet(path: str, field: str | None) -> VectorFile:
    from pyarrow import parquet

    file = parquet.ParquetFile(path, buffer_size=1 << 20)  # or a group of rows would be read at once
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    def batches(columns: list[str], start: int) -> Iterator[Any]:
        ends = list(itertools.accumulate(sizes))
        groups = [i for i, end in enumerate(ends) if end > start]
        skipped = start - (ends[groups[0]] - sizes[groups[0]] if groups else start)
        yield from _without(skipped, file.iter_batches(ROWS, row_groups=groups, columns=columns))

    return _of_table(path, field, file.schema_arrow, file.metadata.num_rows, batches)


def _open_arrow(path: str, field: str | None) -> VectorFile:
    """A file of Arrow's (Feather) or a stream, as Hugging Face's datasets keep it."""
    import pyarrow as pa

    try:
        file = pa.ipc.open_file(pa.OSFile(path))
        mapped = pa.ipc.open_file(pa.memory_map(path))  # to count rows without reading them
        schema, count = file.schema, sum(mapped.get_batch(i).num_rows for i in range(mapped.num_record_batches))
    except pa.ArrowInvalid:
        schema, count = pa.ipc.open_stream(pa.OSFile(path)).schema, None

    def batches(columns: list[str], start: int) -> Iterator[Any]:
        streamed = pa.ipc.open_stream(pa.OSFile(path)) if count is None else None
        for batch in _without(start, streamed or map(file.get_batch, range(file.num_record_batches))):
            for first in range(0, batch.num_rows, ROWS):
                yield batch.select(columns).slice(first, ROWS)

    return _of_table(path, field, schema, count, batches)


def _open_csv(path: str, field: str | None) -> VectorFile:
    import pyarrow as pa
    from pyarrow import csv

    tabs = path.removesuffix(".gz").endswith(".tsv")
    parsing = csv.ParseOptions(delimiter="\t" if tabs else ",", newlines_in_values=True)
    names = csv.open_csv(path, parse_options=parsing).schema.names
    number = r"[-+]?\d*\.?\d+(e[-+]?\d+)?"
    counted = names == [str(i) for i in range(len(names))]  # a header of pandas
    headless = not counted and all(re.fullmatch(number, name, re.IGNORECASE) for name in names)
    reading = csv.ReadOptions(autogenerate_column_names=headless)
    found = csv.open_csv(path, reading, parsing).schema
    # A column's type is guessed by its first rows, and 0 may be followed by 0.5; an id may begin with it.
    types = {f.name: pa.float64() for f in found if pa.types.is_integer(f.type) and re.search(r"\d$", f.name)}
    types |= {name: pa.string() for name in found.names if name in (*IDS, *TEXTS)}
    opened = functools.partial(csv.open_csv, path, reading, parsing)

    def batches(columns: list[str], start: int) -> Iterator[Any]:
        yield from _without(start, opened(csv.ConvertOptions(column_types=types, include_columns=columns)))

    return _of_table(path, field, opened(csv.ConvertOptions(column_types=types)).schema, None, batches)


def _without(skipped: int, batches: Iterable[Any]) -> Iterator[Any]:
    """Record batches but for the first rows."""
    for batch in batches:
        if skipped < batch.num_rows:
            yield batch.slice(skipped)
        skipped = max(skipped - batch.num_rows, 0)


def _of_table(
    path: str, field: str | None, schema: Any, count: int | None, batches: Callable[[list[str], int], Iterator[Any]]
) -> VectorFile:
    import pyarrow as pa

    def is_number(kind: Any) -> bool:
        return pa.types.is_floating(kind) or pa.types.is_integer(kind)

    candidates: dict[str, list[str]] = {}
    dimensions: dict[str, list[str]] = {}
    for column in schema:
        numbered = re.fullmatch(r"(.*?)(\d+)", column.name)
        kind = column.type.storage_type if isinstance(column.type, pa.BaseExtensionType) else column.type
        is_list = _is_list(kind) and not _is_text(kind.value_type)
        if is_list or (_is_text(kind) and column.name in (field, *VECTORS)):
            candidates[column.name] = [column.name]
        elif numbered and is_number(column.type):
            dimensions.setdefault(numbered[1], []).append(column.name)
    candidates |= {name: sorted(columns, key=_number) for name, columns in dimensions.items() if len(columns) > 1}
    vector, *others = pick(path, field, schema.names, list(candidates))
    chosen = candidates[str(vector)]
    rest = [name for name in schema.names if name not in {*others, *itertools.chain(*candidates.values())}]

    def read(start: int, rest: Sequence[str] = ()) -> Iterator[Rows]:
        for batch in batches([*chosen, *filter(None, others), *rest], start):
            batch.validate(full=True)  # of damaged offsets, reading would crash
            if len(chosen) == 1:
                vectors = _of_lists(path, batch.column(chosen[0]), start)
            else:
                vectors = np.stack([batch.column(name).to_numpy(zero_copy_only=False) for name in chosen], axis=1)
            start += batch.num_rows
            ids, texts = (None if name is None else batch.column(name).to_pylist() for name in others)
            yield Rows(vectors, ids, texts, described({name: batch.column(name).to_pylist() for name in rest}))

    return VectorFile(path, count, read, described=functools.partial(read, rest=rest))


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _number(name: str) -> int:
    return int((re.findall(r"\d+$", name) or [0])[0])


def _of_lists(path: str, column: Any, first: int) -> np.ndarray:
    """Vectors [n, E] of a column of lists, or of lists as text; row `first` of the file is its first."""
    from pyarrow import compute

    column = getattr(column, "storage", column)  # of Arrow's tensors
    if _is_text(column.type):
        return of_rows(path, [_of_text(text) for text in column.to_pylist()], first)
    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    if column.null_count or (lengths != lengths[0]).any():
        return of_rows(path, column.to_pylist(), first)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _of_text(text: str | None) -> Any:
    """A list of numbers that is written out: with commas, or as numpy prints it."""
    if not text:
        return None
    try:
        return np.array(text.strip(" \n[](){}").replace(",", " ").split(), np.float64)
    except ValueError:
        return text


def _open_lines(path: str, field: str | None) -> VectorFile:
    def lines() -> Iterator[bytes]:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            lines = itertools.chain([file.readline().removeprefix(codecs.BOM_UTF8)], file)
            yield from (line for line in lines if line.strip())

    count = None
    if not path.endswith(".gz"):
        with progress.stage(f"counting the rows of {path}"):
            count = sum(1 for _ in lines())
    return _of_records(path, field, count, lambda start: itertools.islice(lines(), start, None))


def _open_json(path: str, field: str | None) -> VectorFile:
    """A document; its rows stay in the file, mapped, until they are used."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        start = len(codecs.BOM_UTF8) if content[:3] == codecs.BOM_UTF8 else 0
        document = msgspec.json.decode(memoryview(content)[start:], type=dict[str, msgspec.Raw] | list[msgspec.Raw])
    except msgspec.DecodeError as error:
        if "trailing characters" in str(error):  # JSON lines by another name
            return _open_lines(path, field)
        raise ValueError(error) from error
    if isinstance(document, dict):
        lists = {name: raw for name, raw in document.items() if _begins(raw, b"[")}
        arrays = {name: msgspec.json.decode(raw, type=list[msgspec.Raw]) for name, raw in lists.items()}
        if set(arrays) == {"data"}:  # an OpenAI endpoint's answer
            document = arrays["data"]
        elif any(rows and _begins(rows[0], b"[") for rows in arrays.values()):
            return _of_columns(path, field, arrays)
        else:  # one vector
            document = [msgspec.Raw(content[start:])]
    return _of_records(path, field, len(document), lambda start: document[start:])


def _of_columns(path: str, field: str | None, arrays: dict[str, list[msgspec.Raw]]) -> VectorFile:
    candidates = [name for name, rows in arrays.items() if rows and _begins(rows[0], b"[")]
    vector, *others = pick(path, field, list(arrays), candidates)
    rows = arrays[str(vector)]
    rest = [name for name in arrays if name not in (*candidates, *others) and len(arrays[name]) == len(rows)]

    def read(start: int, rest: Sequence[str] = ()) -> Iterator[Rows]:
        for first in range(start, len(rows), ROWS):
            part = slice(first, first + ROWS)
            columns = {name: [*map(msgspec.json.decode, arrays[name][part])] for name in (*filter(None, others), *rest)}
            ids, texts = (None if name is None else columns.pop(name) for name in others)
            yield Rows(of_rows(path, [*map(msgspec.json.decode, rows[part])], first), ids, texts, described(columns))

    return VectorFile(path, len(rows), read, described=functools.partial(read, rest=rest))


def _begins(raw: msgspec.Raw, byte: bytes) -> bool:
    return memoryview(raw)[:1] == byte


def _of_records(
    path: str, field: str | None, count: int | None, records: Callable[[int], Iterable[bytes | msgspec.Raw]]
) -> VectorFile:
    """Rows that are JSON each: objects, or lists that are vectors."""

    def decoded(start: int) -> Iterator[Any]:
        for number, record in enumerate(records(start), start + 1):
            try:
                yield msgspec.json.decode(record)
            except msgspec.DecodeError as error:
                with contextlib.suppress(ValueError):
                    yield json.loads(bytes(record))  # which takes NaN
                    continue
                raise InputError(f"Row {number} of {path} is not JSON ({error}); remove or repair it.") from error

    first, *others = itertools.islice(decoded(0), ROWS)
    names: list[Any] = [None, None, None]
    if isinstance(first, dict):  # a row may lack what others have
        pairs = [pair for row in (first, *others) if isinstance(row, dict) for pair in row.items()]
        lists = [name for name, value in pairs if isinstance(value, list) and not isinstance((value or [""])[0], str)]
        names = pick(path, field, list(dict(pairs)), list(dict.fromkeys(lists)))
    elif not isinstance(first, list):
        raise InputError(f'{path} begins with neither an object nor a list; give rows such as {{"embedding": [...]}}.')

    def read(start: int, metadata: bool = False) -> Iterator[Rows]:
        rows = decoded(start)
        while part := list(itertools.islice(rows, ROWS)):
            columns = [[row.get(name) if isinstance(row, dict) else row for row in part] for name in names]
            ids, texts = (column if name else None for name, column in zip(names[1:], columns[1:], strict=True))
            rest = ({k: row[k] for k in row if k not in names} if isinstance(row, dict) else {} for row in part)
            yield Rows(of_rows(path, columns[0], start), ids, texts, [*map(plain, rest)] if metadata else None)
            start += len(part)

    return VectorFile(path, count, read, described=functools.partial(read, metadata=True))


_OPENERS: dict[str, Callable[[str, str | None], VectorFile]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".safetensors": _open_safetensors,
    ".parquet": _open_parquet,
    **dict.fromkeys((".arrow", ".feather"), _open_arrow),
    **dict.fromkeys((".csv", ".tsv"), _open_csv),
    **dict.fromkeys((".jsonl", ".ndjson"), _open_lines),
    ".json": _open_json,
}
