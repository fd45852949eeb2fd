"""Collections of a persistent Chroma folder, from its SQLite file and its HNSW files; chromadb isn't needed.

The library would write (migrations, compaction), load what an embedding function's configuration names, and bring 80
packages. Rows are those of the table `embeddings`, by number. A vector is in the log (`embeddings_queue`) as long as
that keeps it, else in `data_level0.bin` at the label that `index_metadata.pickle` has for its id: a pickle, of which
only plain values are read. Labels and ids stay in memory, vectors don't. For the cosine Chroma keeps unit vectors.
"""

import re
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from v2t_jax.data.vector_file import Rows
from v2t_jax.stores.access import ROWS, beside, chosen, inside, opened, vectors_of
from v2t_jax.stores.base import Metric, Store
from v2t_jax.stores.pickles import Record, unpickled
from v2t_jax.stores.sqlite_files import connect

_METRICS: dict[str, Metric] = {"cosine": "cosine", "l2": "l2", "ip": "dot"}
_OF_HNSW = ["chromadb.segment.impl.vector.local_persistent_hnsw.PersistentData"]  # before version 1
_HEADER = struct.Struct("<i6Q")  # version, offset, most, count, bytes of an element, of these before label and vector


def open_chroma(path: Path, collection: str = "") -> Store:
    db = connect(path / "chroma.sqlite3")
    db.row_factory = sqlite3.Row  # versions differ in their columns
    databases = {row["id"]: row["name"] for row in db.execute("SELECT id, name FROM databases")}
    found = {}
    for row in db.execute("SELECT * FROM collections"):
        database = databases[row["database_id"]]
        found[row["name"] if database == "default_database" else f"{database}/{row['name']}"] = dict(row)
    name, _ = chosen(str(path), dict.fromkeys(found, ["embedding"]), collection)
    key, width = found[name]["id"], found[name]["dimension"] or 0
    segments = {row["scope"]: row["id"] for row in db.execute("SELECT * FROM segments WHERE collection = ?", (key,))}
    mine = "FROM embeddings WHERE segment_id = ?"
    (count,) = db.execute(f"SELECT count(*) {mine}", (segments["METADATA"],)).fetchone()
    log = "FROM embeddings_queue WHERE topic LIKE '%/' || ? AND vector IS NOT NULL"
    logged = {one: number for one, number in db.execute(f"SELECT id, max(seq_id) {log} GROUP BY id", (key,))}
    folder = inside(path, segments["VECTOR"])
    indexed, at = _hnsw(folder, width) if (folder / "index_metadata.pickle").exists() else (np.zeros((0, width)), {})

    def vector(one: str) -> np.ndarray | None:
        if one not in logged:
            return np.array(indexed[at[one]]) if one in at else None
        of = db.execute("SELECT vector, encoding FROM embeddings_queue WHERE seq_id = ?", (logged[one],)).fetchone()
        return np.frombuffer(of["vector"], "<i4" if of["encoding"] == "INT32" else "<f4")

    def read(start: int) -> Iterator[Rows]:
        ids = f"SELECT id, embedding_id {mine} ORDER BY id LIMIT -1 OFFSET ?"
        cursor = db.execute(ids, (segments["METADATA"], start))
        while part := cursor.fetchmany(ROWS):
            shown = [row["embedding_id"] for row in part]
            records = _records(db, [row["id"] for row in part])
            yield Rows(vectors_of(str(path), [*map(vector, shown)], start, width), shown, *beside(records))
            start += len(part)

    metric = _METRICS.get(_space(db, found[name]), "unknown")
    return opened("Chroma", str(path), (name, ""), count, read, metric=metric)


def _hnsw(folder: Path, width: int) -> tuple[np.ndarray, dict[str, int]]:
    """Vectors [n, E], mapped, and the row of each id."""
    _, _, _, count, size, end, begin = _HEADER.unpack_from((folder / "header.bin").read_bytes())
    if end - begin != 4 * width or size != end + 8:
        raise ValueError("the header of its HNSW index doesn't fit its vectors")
    kept = folder / "index_metadata.pickle"
    state = unpickled(kept.read_bytes(), str(kept), _OF_HNSW)
    labels = (state.values if isinstance(state, Record) else state)["id_to_label"]
    if not count or not labels:
        return np.zeros((0, width)), {}
    elements = np.memmap(folder / "data_level0.bin", np.uint8, "r", shape=(count, size))
    stored = np.ascontiguousarray(elements[:, end:]).view("<u8")[:, 0]
    order, wanted = np.argsort(stored), np.fromiter(labels.values(), np.uint64, len(labels))
    rows = order[np.searchsorted(stored, wanted, sorter=order).clip(max=count - 1)]
    if (stored[rows] != wanted).any():
        raise ValueError("its HNSW index lacks vectors that its metadata names")
    return elements[:, begin:end].view("<f4"), dict(zip(labels, rows.tolist(), strict=True))


def _records(db: sqlite3.Connection, numbers: list[int]) -> list[dict[str, Any]]:
    """Documents and metadata of rows."""
    records: dict[int, dict[str, Any]] = {number: {} for number in numbers}
    tables = db.execute(
        "SELECT name FROM sqlite_master WHERE name IN ('embedding_metadata', 'embedding_metadata_array')"
    )
    for (table,) in tables.fetchall():
        for row in db.execute(f"SELECT * FROM {table} WHERE id IN ({','.join(map(str, numbers))})"):
            values = {name: row[name] for name in row.keys() if name.endswith("_value") and row[name] is not None}  # noqa: SIM118 (no dict)
            value = next((bool(value) if name == "bool_value" else value for name, value in values.items()), None)
            name = "document" if row["key"] == "chroma:document" else row["key"]
            if table == "embedding_metadata":
                records[row["id"]][name] = value
            else:
                records[row["id"]].setdefault(name, []).append(value)
    return list(records.values())


def _space(db: sqlite3.Connection, collection: dict[str, Any]) -> str:
    """The distance, which versions keep at different places."""
    given = db.execute(
        "SELECT str_value FROM collection_metadata WHERE collection_id = ? AND key = 'hnsw:space'", (collection["id"],)
    ).fetchone()
    described = (collection.get("schema_str") or "").partition('"#embedding"')[2] or collection.get("config_json_str")
    found = re.search(r'"space"\s*:\s*"(\w+)"', described or "")
    return given[0] if given else found[1] if found else "l2"
