"""Collections of Milvus Lite 3, whose folder NAME.db holds Parquet files: they are read with pyarrow alone.

Rows are those of the data files that the manifest names, then those of the log (`wal`) of a program that didn't end
well. Of rows with one key the one with the largest number (`_seq`) counts, unless a deletion has a larger one; so keys
and numbers are read first, and stay in memory. The library isn't needed, which would lock, recover and clean up.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v2t_jax.data.vector_file import Rows
from v2t_jax.stores.access import ROWS, chosen, inside, opened
from v2t_jax.stores.arrow import rows_of
from v2t_jax.stores.base import Metric, Store

_METRICS: dict[str, Metric] = {"COSINE": "cosine", "L2": "l2", "IP": "dot"}


def open_milvus(path: Path, collection: str = "") -> Store:
    found = sorted(path.glob("collections/*/schema.json"))
    schemas = {file.parent.name: json.loads(inside(file).read_bytes())["fields"] for file in found}
    dense = {
        name: [one["name"] for one in schema if one["dtype"] == "float_vector"] for name, schema in schemas.items()
    }
    name, field = chosen(str(path), dense, collection)
    folder = path / "collections" / name
    manifest = json.loads((folder / "manifest.json").read_bytes())
    metric = manifest.get("index_specs", {}).get(field, {}).get("metric_type")
    active = manifest.get("active_wal_number") or 0
    key = next(one["name"] for one in schemas[name] if one["is_primary"])
    files = {
        kind: [
            inside(folder, "partitions", partition, file)
            for partition, kept in sorted(manifest["partitions"].items())
            for file in kept[f"{kind}_files"]
        ]
        # Those before the active one were written out to the files above.
        + [log for log in sorted(folder.glob(f"wal/wal_{kind}_*.arrow")) if int(log.stem[-6:]) >= active]
        for kind in ("data", "delta")
    }
    latest: dict[Any, int] = {}
    for batch in _batches(files["data"] + files["delta"], [key, "_seq"]):
        for one, number in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            latest[one] = max(number, latest.get(one, 0))
    count = sum(map(len, _alive(files["data"], key, latest, [key, "_seq"])))

    def read(start: int) -> Iterator[Rows]:
        row = 0
        for batch in _alive(files["data"], key, latest):
            if len(part := batch.slice(max(start - row, 0))):
                yield rows_of(str(path), part, field, max(start, row), key, "$meta")
            row += len(batch)

    return opened("Milvus Lite", str(path), (name, field), count, read, metric=_METRICS.get(metric, "unknown"))


def _batches(files: list[Path], columns: list[str] | None = None) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    for file in files:
        if file.suffix == ".parquet":
            yield from parquet.ParquetFile(file, buffer_size=1 << 20).iter_batches(ROWS, columns=columns)
            continue
        stream = pa.ipc.open_stream(pa.OSFile(str(file)))
        while True:
            try:
                batch = stream.read_next_batch()
            except (StopIteration, pa.ArrowInvalid, OSError):  # its program was stopped within a batch
                break
            batch.validate(full=True)
            yield batch.select(columns) if columns else batch


def _alive(files: list[Path], key: str, latest: dict[Any, int], columns: list[str] | None = None) -> Iterator[Any]:
    """Batches without the rows that were replaced or deleted, and those that were in the log and in a file."""
    import pyarrow as pa

    for batch in _batches(files, columns):
        keys, numbers = batch.column(key).to_pylist(), batch.column("_seq").to_pylist()
        kept = [latest.get(one) == number for one, number in zip(keys, numbers, strict=True)]
        names = [name for name in batch.schema.names if name not in ("_seq", "_partition")]
        yield batch.select(names).filter(pa.array(kept))
