"""Indexes of FAISS (.faiss, .index), by the library, mapped into memory where FAISS can do that.

Flat and HNSW indexes hold the vectors themselves; of product and scalar quantizers they are decoded. Inverted lists are
read one after the other. Kinds whose vectors FAISS can't give back are refused before it is asked: it would abort.
Texts aren't in an index, but LangChain keeps them beside it, in a pickle, of which only plain records are read.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from v2t_jax.data.vector_file import Rows
from v2t_jax.errors import InputError
from v2t_jax.stores.access import ROWS, beside, faults_named, library, opened
from v2t_jax.stores.base import Metric, Store
from v2t_jax.stores.pickles import unpickled

_EXACT = ("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat")
_DECODED = {
    **dict.fromkeys(("IndexPQ", "IndexIVFPQ", "IndexHNSWPQ"), "product quantization"),
    **dict.fromkeys(("IndexScalarQuantizer", "IndexIVFScalarQuantizer", "IndexHNSWSQ"), "scalar quantization"),
}
_METRICS: dict[int, Metric] = {0: "dot", 1: "l2"}
_LANGCHAIN = [
    *("langchain_community.docstore.in_memory.InMemoryDocstore", "langchain.docstore.in_memory.InMemoryDocstore"),
    *("langchain_core.documents.base.Document", "langchain.schema.document.Document", "langchain.schema.Document"),
]


def open_faiss(path: Path) -> Store:
    faiss = library("faiss", "faiss")
    ids = changed = None
    with faults_named(str(path), RuntimeError):
        whole = index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if isinstance(index, faiss.IndexIDMap):
            ids, index = faiss.vector_to_array(index.id_map), faiss.downcast_index(index.index)
        if isinstance(index, faiss.IndexRefine):  # which keeps better vectors beside the quantized ones
            index = faiss.downcast_index(index.refine_index)
        if isinstance(index, faiss.IndexPreTransform):
            changed, index = index, faiss.downcast_index(index.index)
        name = type(index).__name__
    if name not in _EXACT and name not in _DECODED:
        raise InputError(f"{path} is a FAISS index of kind {name}, which can't give its vectors back; give a flat one.")
    records = _langchain(path.with_suffix(".pkl"))

    def pieces(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers and vectors."""
        if not name.startswith("IndexIVF"):
            for first in range(start, whole.ntotal, ROWS):  # named here, the parts' owner lives as long as they do
                size = min(ROWS, whole.ntotal - first)
                yield np.arange(first, first + size), index.reconstruct_n(first, size)
            return
        lists = index.invlists
        for one in range(index.nlist):
            size = lists.list_size(one)
            skipped, start = min(start, size), max(start - size, 0)
            for first in range(skipped, size, ROWS):
                part = range(first, min(first + ROWS, size))
                vectors = np.empty((len(part), index.d), np.float32)
                for row, offset in enumerate(part):
                    index.reconstruct_from_offset(one, offset, faiss.swig_ptr(vectors[row:]))
                yield faiss.rev_swig_ptr(lists.get_ids(one), size)[part.start : part.stop].copy(), vectors

    def read(start: int) -> Iterator[Rows]:
        for numbers, vectors in pieces(start):
            if changed is not None:
                chain, vectors = vectors, np.empty((len(vectors), changed.d), np.float32)
                changed.reverse_chain(len(chain), faiss.swig_ptr(chain), faiss.swig_ptr(vectors))
            found = (None, None) if records is None else beside(records.get(number, {}) for number in numbers.tolist())
            yield Rows(vectors, (numbers if ids is None else ids[numbers]).tolist(), *found)

    lossy = [_DECODED[name]] if name in _DECODED else []
    if changed is not None:
        steps = (faiss.downcast_VectorTransform(changed.chain.at(i)) for i in range(changed.chain.size()))
        lossy += [f"transformed by {type(step).__name__}" for step in steps]
    about = {"metric": _METRICS.get(index.metric_type, "unknown"), "approximate": ", ".join(lossy)}
    return opened(f"FAISS ({name})", str(path), ("", ""), whole.ntotal, read, [RuntimeError], **about)


def _langchain(path: Path) -> dict[int, dict[str, Any]] | None:
    """The records of LangChain's docstore, by the rows of the index."""
    if not path.exists():
        return None
    store, keys = unpickled(path.read_bytes(), str(path), _LANGCHAIN)
    texts = store.values["_dict"]
    return {row: texts[key].values for row, key in keys.items() if key in texts}
