"""Plain files of vectors as stores: .npy, .npz, .safetensors, .parquet, .arrow, .csv, .jsonl, .json."""

from dataclasses import replace

from v2t_jax.data.vectors import open_vectors
from v2t_jax.errors import InputError
from v2t_jax.stores.base import Store


def open_file(name: str) -> Store:
    """FILE or FILE:FIELD, as `data/vectors.py` reads them."""
    rows = open_vectors(name)
    rows = replace(rows, read=rows.described or rows.read)
    first = next(rows.batches(1), None)
    if first is None:
        raise InputError(f"{rows.path} holds no vectors; give a file with some.")
    return Store("vector file", rows, first.vectors.shape[1], collection=rows.field or "")
