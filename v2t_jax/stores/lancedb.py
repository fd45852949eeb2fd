"""Tables of LanceDB, by the library: the latest version is scanned, in the order of its fragments.

Versions never change, so nothing is written. Rows are asked for some at a time, which costs a scan no more.
"""

from collections.abc import Iterator
from pathlib import Path

from v2t_jax.data.vector_file import Rows
from v2t_jax.stores.access import ROWS, chosen, faults_named, library, opened
from v2t_jax.stores.arrow import is_vectors, rows_of
from v2t_jax.stores.base import Store

_FAULTS = (Exception,)  # a panic of its Rust code is of no public kind


def open_lancedb(path: Path, collection: str = "") -> Store:
    """A folder of tables NAME.lance, or one of these."""
    lancedb = library("lancedb", "lancedb")
    folder = path.parent if path.suffix == ".lance" else path
    tables, fields = {}, {}
    with faults_named(str(path), *_FAULTS):
        db = lancedb.connect(str(folder))
        for found in [path] if path.suffix == ".lance" else sorted(folder.glob("*.lance")):
            tables[found.stem] = db.open_table(found.stem)
            fields[found.stem] = [column.name for column in tables[found.stem].schema if is_vectors(column.type)]
        name, field = chosen(str(path), fields, collection)
        table, count = tables[name], tables[name].count_rows()

    def read(start: int) -> Iterator[Rows]:
        for first in range(start, count, ROWS):  # a scan without limit would read ahead as far as memory goes
            for batch in table.search().limit(ROWS).offset(first).to_arrow().to_batches():
                yield rows_of(str(path), batch, field, first)

    return opened("LanceDB", str(path), (name, field), count, read, _FAULTS)
