"""Finds out what a location is, and opens it."""

from collections.abc import Callable
from pathlib import Path

from v2t_jax.errors import InputError
from v2t_jax.stores.access import check_links, faults_named
from v2t_jax.stores.base import Store
from v2t_jax.stores.chroma import open_chroma
from v2t_jax.stores.duckdb import open_duckdb
from v2t_jax.stores.faiss import open_faiss
from v2t_jax.stores.files import open_file
from v2t_jax.stores.lancedb import open_lancedb
from v2t_jax.stores.milvus import open_milvus
from v2t_jax.stores.pgvector import open_pgvector
from v2t_jax.stores.qdrant import open_qdrant, open_qdrant_server
from v2t_jax.stores.sqlite_vec import open_sqlite_vec

_SERVERS = {"postgresql://": open_pgvector, "postgres://": open_pgvector}
_SERVERS |= {"http://": open_qdrant_server, "https://": open_qdrant_server}
# What only such a folder has in it.
_FOLDERS: dict[str, Callable[[Path, str], Store]] = {
    "chroma.sqlite3": open_chroma,
    "meta.json": open_qdrant,
    "collections/*/manifest.json": open_milvus,
    "*.lance": open_lancedb,
}


def open_store(location: str, collection: str = "") -> Store:
    """A store by its location: a file, a folder or a URL; `collection` is the one of several, as NAME or NAME:FIELD.

    Raises:
        InputError: no store that is known, several collections and none named, damage, a lock, a library that lacks.
    """
    for scheme, server in _SERVERS.items():
        if location.lower().startswith(scheme):
            return server(location, collection)
    path = Path(location)
    if path.is_dir():
        check_links(path)
    if path.exists() and (opener := _opener(path)):
        with faults_named(location):
            return opener(path, collection)
    if collection:
        raise InputError(f"{location} holds no collections; leave --collection out, or name vectors as FILE:FIELD.")
    path = path / "index.faiss" if path.is_dir() else path
    if path.is_file() and path.suffix in (".faiss", ".index"):
        with faults_named(location):
            return open_faiss(path)
    if Path(location).is_dir():
        kinds = "Chroma, Qdrant, LanceDB, Milvus Lite 3 or LangChain's FAISS"
        raise InputError(f"{location} is a folder, but none of {kinds}; give that of a store, or a file.")
    return open_file(location)


def _opener(path: Path) -> Callable[[Path, str], Store] | None:
    """What opens a store that can hold several collections."""
    if path.is_dir():
        found = (opener for sign, opener in _FOLDERS.items() if any(path.glob(sign)))
        return open_lancedb if path.suffix == ".lance" else next(found, None)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        begin = file.read(16)
    return open_sqlite_vec if begin == b"SQLite format 3\0" else open_duckdb if begin[8:12] == b"DUCK" else None
