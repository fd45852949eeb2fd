"""What a location is; hostile and broken stores, which end in one sentence with nothing run and nothing written."""

import json
import os
import pickle
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.helpers.store_rows import META, NAMES, TEXTS, E, hashes
from v2t_jax.errors import InputError
from v2t_jax.stores import open_store
from v2t_jax.stores.pickles import unpickled


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def qdrant(folder: Path, points: list[bytes]) -> str:
    """A local folder, without the library."""
    (folder / "collection" / "docs").mkdir(parents=True)
    vectors = {"size": E.shape[1], "distance": "Cosine"}
    (folder / "meta.json").write_text(json.dumps({"collections": {"docs": {"vectors": vectors}}}))
    with sqlite3.connect(folder / "collection" / "docs" / "storage.sqlite") as db:
        db.execute("CREATE TABLE points (id TEXT PRIMARY KEY, point BLOB)")
        db.executemany("INSERT INTO points VALUES (?, ?)", enumerate(points))
    db.close()
    return str(folder)


def milvus(folder: Path, file: str = "data/data_1.parquet", rows: int = 1000) -> str:
    home = folder / "collections" / "docs"
    fields = [{"name": "id", "dtype": "varchar", "is_primary": True}]
    fields += [{"name": "v", "dtype": "float_vector", "is_primary": False}]
    (home / "partitions" / "_default" / "data").mkdir(parents=True)
    (home / "schema.json").write_text(json.dumps({"fields": fields}))
    files = {"data_files": [file], "delta_files": []}
    (home / "manifest.json").write_text(json.dumps({"partitions": {"_default": files}, "index_specs": {}}))
    v = pa.FixedSizeListArray.from_arrays(pa.array(E[:rows].ravel()), E.shape[1])
    meta = [json.dumps(one | {"text": text}) for one, text in zip(META, TEXTS, strict=True)][:rows]
    table = pa.table({"_seq": pa.array(range(rows), pa.uint64()), "id": NAMES[:rows], "v": v, "$meta": meta})
    parquet.write_table(table, home / "partitions" / "_default" / "data" / "data_1.parquet")
    return str(folder)


def chroma(folder: Path, index: bytes) -> str:
    """One row, in the index, and no library."""
    (folder / "vectors").mkdir(parents=True)
    with sqlite3.connect(folder / "chroma.sqlite3") as db:
        db.executescript("""
            CREATE TABLE databases (id, name); INSERT INTO databases VALUES ('d', 'default_database');
            CREATE TABLE collections (id, name, dimension, database_id, config_json_str);
            INSERT INTO collections VALUES ('c', 'docs', 16, 'd', '{}');
            CREATE TABLE segments (id, scope, collection);
            INSERT INTO segments VALUES ('vectors', 'VECTOR', 'c'), ('meta', 'METADATA', 'c');
            CREATE TABLE embeddings (id INTEGER PRIMARY KEY, segment_id, embedding_id);
            INSERT INTO embeddings VALUES (1, 'meta', 'r0');
            CREATE TABLE embeddings_queue (seq_id, topic, id, vector, encoding);
            CREATE TABLE collection_metadata (collection_id, key, str_value);
            CREATE TABLE embedding_metadata (id, key, string_value);
            INSERT INTO embedding_metadata VALUES (1, 'chroma:document', 'a text');
        """)
    db.close()
    header = np.zeros(13, "<i4")
    header[0], header[5], header[7], header[9], header[11] = 1, 1, 80, 72, 8  # count; bytes: all, to the label, vector
    (folder / "vectors" / "header.bin").write_bytes(header.tobytes())
    (folder / "vectors" / "data_level0.bin").write_bytes(bytes(8) + E[0].tobytes() + np.int64(5).tobytes())
    (folder / "vectors" / "index_metadata.pickle").write_bytes(index)
    return str(folder)


def test_milvus_lite_is_read_without_its_library(tmp_path: Path) -> None:
    location = milvus(tmp_path / "m.db")
    before = hashes(Path(location))
    store = open_store(location)
    rows = store.rows.whole()
    assert (store.kind, store.count, store.width, store.collection) == ("Milvus Lite", 1000, 16, "docs")
    assert (rows.vectors == E).all() and (rows.ids, rows.texts, rows.metadata) == (NAMES, TEXTS, META)
    assert hashes(Path(location)) == before


def test_chroma_is_read_without_its_library(tmp_path: Path) -> None:
    store = open_store(chroma(tmp_path, pickle.dumps({"id_to_label": {"r0": 5}})))
    rows = store.rows.whole()
    assert (store.kind, store.metric, rows.ids, rows.texts) == ("Chroma", "l2", ["r0"], ["a text"])
    np.testing.assert_array_equal(rows.vectors, E[:1])


def test_chroma_before_version_1_pickled_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class is of chromadb, which isn't here."""
    name = "chromadb.segment.impl.vector.local_persistent_hnsw"
    parts = name.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    kind = type("PersistentData", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "PersistentData", kind, raising=False)
    state = kind()
    state.__dict__.update(dimensionality=16, id_to_label={"r0": 5})
    rows = open_store(chroma(tmp_path, pickle.dumps(state))).rows.whole()
    np.testing.assert_array_equal(rows.vectors, E[:1])


def test_hostile_pickles_run_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    bomb = pickle.dumps({"id_to_label": {"r0": Bomb(trace)}})
    indirect = b"c__builtin__\neval\n(V__import__('os').system('touch {}')\ntR.".replace(b"{}", str(trace).encode())
    for number, content in enumerate((bomb, indirect)):
        for location in (qdrant(tmp_path / f"q{number}", [content]), chroma(tmp_path / f"c{number}", content)):
            before = hashes(Path(location))
            with pytest.raises(InputError, match="a pickle that refers to .*(system|eval).*nothing of it was run"):
                open_store(location)
            assert hashes(Path(location)) == before
    assert not trace.exists()
    pickle.loads(bomb)  # the bomb is one
    assert trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([1.0] * 100)[:50],
        b"\x80\x04\x8d" + (1 << 60).to_bytes(8, "little") + b"x.",  # a string of an exabyte
        b"\x80\x04\x96" + (1 << 60).to_bytes(8, "little") + b"x.",  # and a bytearray
        b"\x80\x04Nr\xff\xff\xff\x7f.",  # a place in the memory for 2 billion objects: harmless here
        pickle.dumps(5),
    ],
    ids=range(7),
)
def test_damaged_pickles_end_in_one_sentence(content: bytes, tmp_path: Path) -> None:
    for location in (qdrant(tmp_path / "q", [content]), chroma(tmp_path / "c", content)):
        with pytest.raises(InputError, match="damaged pickle|can't be read"):
            open_store(location)


def test_a_pickle_of_plain_values_is_read() -> None:
    values = {"a": [1, 2.5, None, True], "b": ("x", b"y"), "c": {1, 2}}
    assert unpickled(pickle.dumps(values), "file") == values


def test_what_leads_out_of_a_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.parquet").write_bytes(b"PAR1")
    for location in (
        milvus(tmp_path / "a.db", "../../../../../secret.parquet"),
        milvus(tmp_path / "b.db", "/etc/passwd"),
    ):
        with pytest.raises(InputError, match="refers to a file outside of it"):
            open_store(location)
    location = Path(milvus(tmp_path / "c.db"))
    (location / "collections" / "within").symlink_to(location / "collections" / "docs")
    with pytest.raises(InputError, match=r"holds 2 collections \(docs, within\)"):
        open_store(str(location))
    (location / "collections" / "within").unlink()
    (location / "collections" / "docs" / "link").symlink_to(tmp_path / "secret.parquet")
    with pytest.raises(InputError, match="refers to a file outside of it"):
        open_store(str(location))


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder, but none of Chroma, Qdrant"):
        open_store(str(tmp_path))
    with pytest.raises(InputError, match="holds no vectors in docs"):
        open_store(milvus(tmp_path / "m.db", rows=0))
    with pytest.raises(InputError, match="holds no vectors in docs"):
        open_store(qdrant(tmp_path / "q", []))
    with sqlite3.connect(tmp_path / "plain.db") as db:
        db.execute("CREATE TABLE docs (embedding BLOB)")
    db.close()
    with pytest.raises(InputError, match="is an SQLite file without a table of sqlite-vec"):
        open_store(str(tmp_path / "plain.db"))
    np.save(tmp_path / "e.npy", E)
    assert open_store(str(tmp_path / "e.npy")).kind == "vector file"
    with pytest.raises(InputError, match="holds no collections; leave --collection out"):
        open_store(str(tmp_path / "e.npy"), "docs")
    with pytest.raises(InputError, match="holds a user, a key or a query"):
        open_store("http://me:secret@localhost:6333")


@pytest.mark.parametrize("module, extra", [("duckdb",) * 2, ("faiss",) * 2, ("lancedb",) * 2, ("psycopg", "pgvector")])
def test_a_missing_library_is_named(module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "d").write_bytes(b"\0" * 8 + b"DUCK" + b"\0" * 8)
    (tmp_path / "i.faiss").write_bytes(b"IxF2")
    (tmp_path / "lance" / "docs.lance").mkdir(parents=True)
    places = {"duckdb": tmp_path / "d", "faiss": tmp_path / "i.faiss", "lancedb": tmp_path / "lance"}
    with pytest.raises(InputError, match=rf'needs {module}; run pip install "v2t_jax\[{extra}\]"'):
        open_store(str(places.get(module, "postgresql://localhost/db")))


@pytest.mark.parametrize(
    "does, words",
    [
        ("import os; os.kill(os.getpid(), 11)", r"can't be read \(FAISS crashed on it, status -11\); check it"),
        ("raise RuntimeError('Index type 0x1 not recognized')", r"can't be read \(Index type 0x1 not recognized\)"),
        ("bytearray(64 << 30)", r"can't be read \(MemoryError\)"),
    ],
)
def test_what_crashes_faiss_ends_in_a_sentence(
    does: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faiss.py").write_text(f"IO_FLAG_MMAP_IFC = 0\ndef read_index(path, flags):\n    {does}\n")
    monkeypatch.setitem(sys.modules, "faiss", types.ModuleType("faiss"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "i.faiss").write_bytes(b"IxF2")
    with pytest.raises(InputError, match=words):
        open_store(str(tmp_path / "i.faiss"))


def test_a_log_of_sqlite_is_read_on_a_copy(tmp_path: Path) -> None:
    """A program that was killed leaves rows in its write-ahead log."""
    location = Path(qdrant(tmp_path / "q", []))
    code = """if 1:
        import os, pickle, sqlite3, sys
        db = sqlite3.connect(sys.argv[1])
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("INSERT INTO points VALUES ('a', ?)", (pickle.dumps(5),))
        db.commit()
        os._exit(0)"""
    subprocess.run([sys.executable, "-c", code, location / "collection" / "docs" / "storage.sqlite"], check=True)
    before = hashes(location)
    assert any(name.endswith("-wal") for name in before)
    with pytest.raises(InputError, match="can't be read"):  # the row, which is no point
        open_store(str(location))
    assert hashes(location) == before
