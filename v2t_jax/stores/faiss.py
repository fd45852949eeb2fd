"""Indexes of FAISS (.faiss, .index), by the library, in a process of its own: a damaged index can crash FAISS.

Flat and HNSW indexes hold the vectors themselves; of product and scalar quantizers they are decoded. Inverted lists are
read one after the other. Kinds whose vectors FAISS can't give back are refused.
Texts aren't in an index, but LangChain keeps them beside it, in a pickle, of which only plain records are read.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from v2t_jax.data.vector_file import Rows
from v2t_jax.errors import InputError
from v2t_jax.stores.access import ROWS, beside, library, opened
from v2t_jax.stores.base import Metric, Store
from v2t_jax.stores.pickles import unpickled

_EXACT = ("IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexIVFFlat", "IndexHNSWFlat")
_DECODED = {
    **dict.fromkeys(("IndexPQ", "IndexIVFPQ", "IndexHNSWPQ"), "product quantization"),
    **dict.fromkeys(("IndexScalarQuantizer", "IndexIVFScalarQuantizer", "IndexHNSWSQ"), "scalar quantization"),
}
MEMORY = 8 << 30  # bytes of addresses that the other process may have, beside twice the file's size
_METRICS: dict[int, Metric] = {0: "dot", 1: "l2"}
_LANGCHAIN = [
    *("langchain_community.docstore.in_memory.InMemoryDocstore", "langchain.docstore.in_memory.InMemoryDocstore"),
    *("langchain_core.documents.base.Document", "langchain.schema.document.Document", "langchain.schema.Document"),
]


def open_faiss(path: Path) -> Store:
    library("faiss", "faiss")
    records = _langchain(path.with_suffix(".pkl"))
    with closing(_pieces(path, 0)) as pieces:
        about, _ = next(pieces)
    kind, count = about.pop("kind"), about.pop("count")

    def read(start: int) -> Iterator[Rows]:
        pieces = _pieces(path, start)
        next(pieces)
        for _, (numbers, ids, vectors) in pieces:
            found = (None, None) if records is None else beside(records.get(number, {}) for number in numbers.tolist())
            yield Rows(vectors, ids.tolist(), *found)

    return opened(f"FAISS ({kind})", str(path), ("", ""), count, read, **about)


def _pieces(path: Path, start: int) -> Generator[tuple[dict[str, Any], list[np.ndarray]]]:
    """What the index is, then its numbers [n], ids [n] and vectors [n, E], from another process.

    Raises:
        InputError: it is of a kind whose vectors can't be given back.
        OSError: FAISS can't read it, or crashed.
    """
    command = [sys.executable, "-m", "v2t_jax.stores.faiss", str(path), str(start)]
    # In a session of its own: Ctrl-C is for the program that reads, which ends this one.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as child:
        try:
            assert child.stdout is not None
            while line := child.stdout.readline():
                said = json.loads(line)
                if "refused" in said:
                    raise InputError(said["refused"])
                if "fault" in said:
                    raise OSError(said["fault"])
                kinds = [(np.dtype(name), shape) for name, shape in said.pop("arrays")]
                contents = [child.stdout.read(kind.itemsize * math.prod(shape)) for kind, shape in kinds]
                made = zip(contents, kinds, strict=True)
                yield said, [np.frombuffer(content, kind).reshape(shape) for content, (kind, shape) in made]
            if child.wait():
                raise OSError(f"FAISS crashed on it, status {child.returncode}")
        finally:
            child.kill()


def _serve(path: str, start: int) -> None:
    """The other process: writes a line of JSON for each piece, which tells its arrays' types and shapes, then these."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # FAISS prints
    with suppress(ImportError):  # which isn't on every system
        import resource

        most = 2 * os.path.getsize(path) + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def put(said: dict[str, Any], *arrays: np.ndarray) -> None:
        kinds = [(array.dtype.str, array.shape) for array in arrays]
        out.write(json.dumps(said | {"arrays": kinds}).encode() + b"\n")
        out.writelines(array.tobytes() for array in arrays)
        out.flush()

    try:
        about, pieces = _index(path)
        put(about)
        for piece in pieces(start):
            put({}, *piece)
    except InputError as error:
        put({"refused": str(error)})
    except (RuntimeError, MemoryError, OSError, AssertionError) as error:
        put({"fault": " ".join(str(error).split()) or type(error).__name__})


def _index(path: str) -> tuple[dict[str, Any], Callable[[int], Iterator[tuple[np.ndarray, ...]]]]:
    """What an index is, and what gives its numbers, ids and vectors from row `start` on."""
    faiss = library("faiss", "faiss")

    ids = changed = None
    whole = index = faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    if isinstance(index, faiss.IndexIDMap):
        ids, index = faiss.vector_to_array(index.id_map), faiss.downcast_index(index.index)
    if isinstance(index, faiss.IndexRefine):  # which keeps better vectors beside the quantized ones
        index = faiss.downcast_index(index.refine_index)
    if isinstance(index, faiss.IndexPreTransform):
        changed, index = index, faiss.downcast_index(index.index)
    name = type(index).__name__
    if name not in _EXACT and name not in _DECODED:
        raise InputError(f"{path} is a FAISS index of kind {name}, which can't give its vectors back; give a flat one.")

    def decoded(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
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

    def pieces(start: int) -> Iterator[tuple[np.ndarray, ...]]:
        for numbers, vectors in decoded(start):
            if changed is not None:
                chain, vectors = vectors, np.empty((len(vectors), changed.d), np.float32)
                changed.reverse_chain(len(chain), faiss.swig_ptr(chain), faiss.swig_ptr(vectors))
            yield numbers, numbers if ids is None else ids[numbers], vectors

    lossy = [_DECODED[name]] if name in _DECODED else []
    if changed is not None:
        steps = (faiss.downcast_VectorTransform(changed.chain.at(i)) for i in range(changed.chain.size()))
        lossy += [f"transformed by {type(step).__name__}" for step in steps]
    metric = _METRICS.get(index.metric_type, "unknown")
    about = {"kind": name, "count": whole.ntotal, "metric": metric, "approximate": ", ".join(lossy)}
    return about, pieces


def _langchain(path: Path) -> dict[int, dict[str, Any]] | None:
    """The records of LangChain's docstore, by the rows of the index."""
    if not path.exists():
        return None
    store, keys = unpickled(path.read_bytes(), str(path), _LANGCHAIN)
    texts = store.values["_dict"]
    return {row: texts[key].values for row, key in keys.items() if key in texts}


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
