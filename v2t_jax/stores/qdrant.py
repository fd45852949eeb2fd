"""Collections of Qdrant: a server, by its REST interface, or the folder of the Python client's local mode.

A server is asked for points in the order of their ids, with the key in QDRANT_API_KEY. It keeps the vectors themselves
beside quantized ones, and gives those. In a folder every point is a pickle in SQLite, of which only plain records are
read. Neither needs qdrant-client, which would unpickle whatever is there, and lock the folder.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from v2t_jax.data.vector_file import Rows
from v2t_jax.errors import InputError
from v2t_jax.stores.access import ROWS, beside, chosen, faults_named, inside, opened, vectors_of
from v2t_jax.stores.base import Metric, Store
from v2t_jax.stores.pickles import unpickled
from v2t_jax.stores.sqlite_files import connect

_METRICS: dict[str, Metric] = {"Cosine": "cosine", "Euclid": "l2", "Dot": "dot"}
_CLASSES = [f"qdrant_client.http.models.models.{name}" for name in ("PointStruct", "SparseVector")]
_SKIPPED = 10_000  # ids at a time of points that aren't wanted


def open_qdrant(path: Path, collection: str = "") -> Store:
    """A folder."""
    described = json.loads((path / "meta.json").read_bytes())["collections"]
    kept = [file.parent.name for file in sorted(path.glob("collection/*/storage.sqlite"))]
    dense = {name: _dense(described[name].get("vectors")) for name in kept if name in described}
    name, field = chosen(str(path), {name: [*vectors] for name, vectors in dense.items()}, collection)
    file = inside(path, "collection", name, "storage.sqlite")
    db = connect(file)
    (count,) = db.execute("SELECT count(*) FROM points").fetchone()

    def read(start: int) -> Iterator[Rows]:
        cursor = db.execute("SELECT point FROM points ORDER BY rowid LIMIT -1 OFFSET ?", (start,))
        while part := cursor.fetchmany(ROWS):
            points = [unpickled(content, str(file), _CLASSES).values for (content,) in part]
            yield _rows(str(path), points, field, start, dense[name][field]["size"])
            start += len(part)

    return opened("Qdrant (folder)", str(path), (name, field), count, read, **_about(dense[name][field]))


def open_qdrant_server(location: str, collection: str = "") -> Store:
    """http://HOST:6333."""
    import httpx2

    url = urlsplit(location)
    if url.username or url.password or url.query:
        raise InputError("The server's address holds a user, a key or a query; leave it out, and set QDRANT_API_KEY.")
    path = location.rstrip("/")
    key = os.environ.get("QDRANT_API_KEY")
    client = httpx2.Client(base_url=path, headers={"api-key": key} if key else {}, timeout=60)

    def ask(what: str, **body: Any) -> Any:
        answer = client.post(what, json=body) if body else client.get(what)
        if answer.status_code in (401, 403):
            raise InputError(f"{path} refuses access; set QDRANT_API_KEY to a key that may read.")
        answer.raise_for_status()
        return answer.json()["result"]

    faults = (httpx2.HTTPError, httpx2.InvalidURL)
    with faults_named(path, *faults):
        names = [one["name"] for one in ask("/collections")["collections"]]
        wanted = [name for name in names if not collection or name in (collection, collection.rpartition(":")[0])]
        described = {name: ask(f"/collections/{quote(name, '')}") for name in wanted or names}
        dense = {name: _dense(one["config"]["params"].get("vectors")) for name, one in described.items()}
        name, field = chosen(path, {name: [*vectors] for name, vectors in dense.items()}, collection)
        points = f"/collections/{quote(name, '')}/points"
        count = ask(f"{points}/count", exact=True)["count"]

    def read(start: int) -> Iterator[Rows]:
        row, at = 0, None
        while row == 0 or at is not None:
            wanted = row >= start
            what = {"with_payload": wanted, "with_vector": wanted and ([field] if field else True), "offset": at}
            found = ask(f"{points}/scroll", limit=ROWS if wanted else min(start - row, _SKIPPED), **what)
            if not found["points"]:
                return
            if wanted:
                yield _rows(path, found["points"], field, row, dense[name][field]["size"])
            row, at = row + len(found["points"]), found["next_page_offset"]

    about = _about(dense[name][field])
    return opened("Qdrant (server)", path, (name, field), count, read, faults, **about)


def _dense(vectors: Any) -> dict[str, dict[str, Any]]:
    """Settings of a collection's vectors by name; a vector without a name is the only one."""
    vectors = {"": vectors} if "size" in (vectors or {}) else vectors or {}
    return {name: one for name, one in vectors.items() if not one.get("multivector_config")}


def _rows(path: str, points: list[dict[str, Any]], field: str, first: int, width: int) -> Rows:
    vectors = [one.get("vector") for one in points]
    vectors = [one.get(field) if isinstance(one, dict) else one for one in vectors]
    records = [one.get("payload") or {} for one in points]
    return Rows(vectors_of(path, vectors, first, width), [one["id"] for one in points], *beside(records))


def _about(settings: dict[str, Any]) -> dict[str, Any]:
    datatype = settings.get("datatype") or "float32"
    return {"metric": _METRICS.get(settings["distance"], "unknown"), "approximate": datatype.removeprefix("float32")}
