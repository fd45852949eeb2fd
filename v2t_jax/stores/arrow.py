"""Rows of Arrow batches, which DuckDB, LanceDB and Milvus Lite give."""

import json
from typing import Any

import numpy as np

from v2t_jax.data.readers import IDS
from v2t_jax.data.vector_file import Rows
from v2t_jax.stores.access import beside, vectors_of


def is_vectors(kind: Any) -> bool:
    """Whether a column's type is a list of numbers."""
    import pyarrow as pa

    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def rows_of(path: str, batch: Any, field: str, first: int, key: str | None = None, inner: str = "") -> Rows:
    """Rows of a batch; `first` is the number of its first, `key` the column of ids, `inner` one of JSON objects."""
    import pyarrow as pa

    batch.validate(full=True)  # of damaged offsets, reading would crash
    column = batch.column(field)
    fixed = pa.types.is_fixed_size_list(column.type)
    if fixed and not column.null_count:
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    else:
        vectors = vectors_of(path, column.to_pylist(), first, column.type.list_size if fixed else 0)
    names = [name for name in batch.schema.names if not is_vectors(batch.schema.field(name).type)]
    key = key or next((name for name in IDS if name in names), None)
    ids = None if key is None else batch.column(key).to_pylist()
    records = batch.select([name for name in names if name != key]).to_pylist()
    for record in records:
        record |= json.loads(record.pop(inner, None) or "{}")
    return Rows(np.array(vectors), ids, *beside(records))
