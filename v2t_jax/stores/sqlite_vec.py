"""Tables of sqlite-vec (`vec0`), read from the ordinary tables in which the extension keeps them.

The extension isn't loaded, which many builds of Python couldn't. A chunk of 1,024 vectors is a blob, its rows' numbers
another; texts and metadata lie by number or by chunk. Rows come chunk by chunk.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from v2t_jax.data.vector_file import Rows
from v2t_jax.errors import InputError
from v2t_jax.stores.access import beside, chosen, opened
from v2t_jax.stores.base import Metric, Store
from v2t_jax.stores.sqlite_files import connect

_METRICS: dict[str, Metric] = {"cosine": "cosine", "l2": "l2"}
_APPROXIMATE = {"float": "", "int8": "int8 numbers, of an unknown scale", "bit": "binary: only the signs"}


def open_sqlite_vec(path: Path, collection: str = "") -> Store:
    db = connect(path)
    made = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND sql LIKE '%using vec0%'")
    tables = {name: _columns(sql) for name, sql in made}
    if not tables:
        raise InputError(f"{path} is an SQLite file without a table of sqlite-vec; give one that has.")
    name, field = chosen(str(path), {table: [*columns["vector"]] for table, columns in tables.items()}, collection)
    columns = tables[name]
    element, width, metric = columns["vector"][field]
    place = list(columns["vector"]).index(field)
    size = {"float": 4 * width, "int8": width, "bit": width // 8}[element]

    def q(sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return db.execute(sql.replace("$", name.replace('"', '""')), values).fetchall()

    def read(start: int) -> Iterator[Rows]:
        partitions = "".join(f", partition{i:02}" for i in range(len(columns["partition"])))
        for (chunk,) in q('SELECT chunk_id FROM "$_chunks" ORDER BY chunk_id'):
            held = q(f'SELECT validity, rowids{partitions} FROM "$_chunks" WHERE chunk_id = ?', chunk)
            ((validity, rowids, *keys),) = held
            valid = np.flatnonzero(np.unpackbits(np.frombuffer(validity, np.uint8), bitorder="little"))
            start, skipped = max(start - len(valid), 0), min(start, len(valid))
            valid = valid[skipped:]
            if not len(valid):
                continue
            numbers = np.frombuffer(rowids, "<i8")[valid].tolist()
            ((blob,),) = q(f'SELECT vectors FROM "$_vector_chunks{place:02}" WHERE rowid = ?', chunk)
            vectors = np.frombuffer(blob, np.uint8).reshape(-1, size)[valid]
            records = [dict(zip(columns["partition"], keys, strict=True)) for _ in numbers]
            for i, (one, kind) in enumerate(columns["metadata"].items()):
                for record, value in zip(records, _values(q, i, kind, chunk, valid, numbers), strict=True):
                    record[one] = value
            within = f"WHERE rowid IN ({','.join(map(str, numbers))})"
            if columns["auxiliary"]:
                values = {row: rest for row, *rest in q(f'SELECT * FROM "$_auxiliary" {within}')}
                for record, number in zip(records, numbers, strict=True):
                    record |= zip(columns["auxiliary"], values.get(number, ()), strict=False)
            ids = dict(q(f'SELECT rowid, id FROM "$_rowids" {within}'))
            shown = [number if ids.get(number) is None else ids[number] for number in numbers]
            yield Rows(_decoded(vectors, element), shown, *beside(records))

    count = q('SELECT count(*) FROM "$_rowids"')[0][0]
    about: dict[str, Any] = {"metric": _METRICS.get(metric, "unknown"), "approximate": _APPROXIMATE[element]}
    return opened(f"sqlite-vec ({element})", str(path), (name, field), count, read, **about)


def _columns(sql: str) -> dict[str, dict[str, Any]]:
    """Names of the vectors (with type, width and metric), metadata, partition keys and auxiliary columns."""
    found: dict[str, dict[str, Any]] = {"vector": {}, "metadata": {}, "partition": {}, "auxiliary": {}}
    for given in sql[sql.index("(") + 1 : sql.rindex(")")].split(","):
        words = given.split()
        vector = re.match(r"\s*(\w+)\s+(float|f32|int8|i8|bit)\s*\[\s*(\d+)\s*\]", given)
        metric = re.search(r"distance_metric\s*=\s*(\w+)", given)
        if vector:
            element = {"f32": "float", "i8": "int8"}.get(vector[2], vector[2])
            found["vector"][vector[1]] = (
                element,
                int(vector[3]),
                metric[1].lower() if metric else "" if element == "bit" else "l2",
            )
        elif given.strip().startswith("+"):
            found["auxiliary"][words[0].removeprefix("+") or words[1]] = ""
        elif re.search(r"partition\s+key", given, re.IGNORECASE):
            found["partition"][words[0]] = ""
        elif "=" not in given and not re.search(r"primary\s+key", given, re.IGNORECASE):
            found["metadata"][words[0]] = words[1].lower()
    return found


def _decoded(vectors: np.ndarray, element: str) -> np.ndarray:
    if element == "bit":
        return np.unpackbits(vectors, axis=1, bitorder="little") * np.float32(2) - 1
    return np.ascontiguousarray(vectors).view("<f4" if element == "float" else "i1").astype(np.float32)


def _values(q: Any, column: int, kind: str, chunk: int, valid: np.ndarray, numbers: list[int]) -> list[Any]:
    """A metadata column's values in a chunk: numbers, bits, or texts, of which long ones lie apart."""
    ((data,),) = q(f'SELECT data FROM "$_metadatachunks{column:02}" WHERE rowid = ?', chunk)
    if kind.startswith("bool"):
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[valid].astype(bool).tolist()
    if not kind.startswith("text"):
        return np.frombuffer(data, "<f8" if kind.startswith(("float", "double")) else "<i8")[valid].tolist()
    within = f"WHERE rowid IN ({','.join(map(str, numbers))})"
    long = dict(q(f'SELECT rowid, data FROM "$_metadatatext{column:02}" {within}'))
    views = np.frombuffer(data, [("size", "<i4"), ("text", "S12")])[valid]
    texts = [bytes(view["text"])[: view["size"]].decode("utf-8", "replace") for view in views]
    return [long.get(number, text) for number, text in zip(numbers, texts, strict=True)]
