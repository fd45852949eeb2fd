"""Tables of a DuckDB file, by the library, read-only; columns FLOAT[n], FLOAT[] and DOUBLE[] are vectors.

Nothing outside of the file can be reached: external access is off before it is opened, and no extension is loaded.
Rows come in the order of insertion, through a cache that would else grow to most of the machine's memory.
"""

from collections.abc import Iterator
from pathlib import Path

from v2t_jax.data.vector_file import Rows
from v2t_jax.stores.access import ROWS, chosen, faults_named, library, opened
from v2t_jax.stores.arrow import rows_of
from v2t_jax.stores.base import Store

_COLUMNS = """
    SELECT table_name, column_name FROM duckdb_columns()
    WHERE NOT internal AND regexp_matches(data_type, '^(FLOAT|DOUBLE|U?TINYINT)\\[\\d*\\]$')
"""
_SETTINGS = {"enable_external_access": "false", "autoload_known_extensions": "false", "memory_limit": "256MB"}


def open_duckdb(path: Path, collection: str = "") -> Store:
    duckdb = library("duckdb", "duckdb")
    with faults_named(str(path), duckdb.Error):
        db = duckdb.connect(str(path), read_only=True, config=_SETTINGS)
        tables: dict[str, list[str]] = {}
        for table, column in db.execute(_COLUMNS).fetchall():
            tables.setdefault(table, []).append(column)
        name, field = chosen(str(path), tables, collection)
        quoted = '"{}"'.format(name.replace('"', '""'))
        (count,) = db.execute(f"SELECT count(*) FROM {quoted}").fetchone()

    def read(start: int) -> Iterator[Rows]:
        rows = db.cursor().sql(f"SELECT * FROM {quoted} OFFSET {start}")
        for batch in rows.to_arrow_reader(ROWS):
            yield rows_of(str(path), batch, field, start)
            start += batch.num_rows

    return opened("DuckDB", str(path), (name, field), count, read, [duckdb.Error])
