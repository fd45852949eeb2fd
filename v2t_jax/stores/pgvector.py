"""Tables of PostgreSQL with pgvector, by psycopg, in one read-only transaction with a cursor on the server.

Columns `vector` and `halfvec` are cast to real[]. Rows come by the primary key, or as they lie on disk where there is
none. User and password come from the environment (PGUSER, PGPASSWORD and the others of libpq) or from ~/.pgpass.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from v2t_jax.data.readers import IDS
from v2t_jax.data.vector_file import Rows
from v2t_jax.errors import InputError
from v2t_jax.stores.access import ROWS, beside, chosen, faults_named, library, opened, vectors_of
from v2t_jax.stores.base import Store

_TABLES = """
    SELECT CASE WHEN pg_table_is_visible(c.oid) THEN c.relname ELSE n.nspname || '.' || c.relname END,
           c.oid, n.nspname, c.relname, a.attname, t.typname, a.atttypmod
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_type t ON t.oid = a.atttypid
    WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition AND NOT a.attisdropped AND a.attnum > 0
    ORDER BY c.oid, a.attnum
"""
_KEY = """
    SELECT a.attname FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey)
    WHERE i.indrelid = %s AND i.indisprimary ORDER BY array_position(i.indkey::smallint[], a.attnum)
"""
# Read-only; and without a key as rows lie on disk, not from where another scan happens to be.
_OPTIONS = "-c default_transaction_read_only=on -c synchronize_seqscans=off -c max_parallel_workers_per_gather=0"


def open_pgvector(location: str, collection: str = "") -> Store:
    """postgresql://[HOST[:PORT]]/DATABASE."""
    psycopg = library("psycopg", "pgvector")
    try:
        given = psycopg.conninfo.conninfo_to_dict(location)
    except psycopg.Error:  # whose text has the address, and what secret may be in it
        raise InputError("The database's address is no URL; give postgresql://HOST:PORT/DATABASE.") from None
    if given.get("password") or given.get("sslpassword"):
        raise InputError("The database's address holds a password; leave it out, and set PGPASSWORD.")
    path = f"postgresql://{given.get('host', '')}/{given.get('dbname', '')}"

    def connect() -> Any:
        options = f"{given.get('options', '')} {_OPTIONS}"
        return psycopg.connect(location, options=options, application_name="v2t", connect_timeout=10)

    with faults_named(path, psycopg.Error), connect() as db:
        tables: dict[str, dict[str, tuple[str, int]]] = {}
        places = {}
        for table, oid, schema, own, column, *kind in db.execute(_TABLES):
            tables.setdefault(table, {})[column] = tuple(kind)
            places[table] = oid, psycopg.sql.Identifier(schema, own)
        dense = {
            table: [column for column, (kind, _) in columns.items() if kind in ("vector", "halfvec")]
            for table, columns in tables.items()
        }
        name, field = chosen(path, dense, collection)
        (kind, width), (oid, table) = tables[name][field], places[name]
        keys = [key for (key,) in db.execute(_KEY, (oid,))]
        (count,) = db.execute(psycopg.sql.SQL("SELECT count(*) FROM {}").format(table)).fetchone()
    others = [column for column, (kind, _) in tables[name].items() if kind not in ("vector", "halfvec", "sparsevec")]
    shown = keys[0] if len(keys) == 1 else next((one for one in IDS if one in others), None)
    order = psycopg.sql.SQL(" ORDER BY {}" if keys else "").format(*[_listed(psycopg, keys)] * bool(keys))
    columns = _listed(psycopg, others) + psycopg.sql.SQL(", " * bool(others))
    query = psycopg.sql.SQL("SELECT {}{}::real[] FROM {}{} OFFSET {}")

    def read(start: int) -> Iterator[Rows]:
        with connect() as db, db.cursor("v2t") as cursor:
            cursor.execute(query.format(columns, psycopg.sql.Identifier(field), table, order, start), binary=True)
            while part := cursor.fetchmany(ROWS):
                vectors = vectors_of(path, [row[-1] for row in part], start, max(width, 0))
                records = [dict(zip(others, row, strict=False)) for row in part]
                ids = None if shown is None else [record.pop(shown) for record in records]
                yield Rows(vectors.astype(np.float32), ids, *beside(records))
                start += len(part)

    about = {"approximate": "halfvec: float16" if kind == "halfvec" else ""}
    return opened(f"pgvector ({kind})", path, (name, field), count, read, [psycopg.Error], **about)


def _listed(psycopg: Any, names: list[str]) -> Any:
    return psycopg.sql.SQL(", ").join(map(psycopg.sql.Identifier, names))
