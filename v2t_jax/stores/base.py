"""What a vector store looks like to the rest of the package, whichever it is. Stores are only ever read."""

from dataclasses import dataclass
from typing import Literal

from v2t_jax.data.vector_file import VectorFile

Metric = Literal["cosine", "l2", "dot", "unknown"]


@dataclass(frozen=True)
class Store:
    """An opened collection of a vector store."""

    kind: str  # as a person would name it: "Chroma", "FAISS (IndexIVFPQ)", "pgvector (halfvec)"
    rows: VectorFile  # vectors, ids, texts and metadata, in an order that stays
    width: int
    metric: Metric = "unknown"
    approximate: str = ""  # how the vectors were compressed, where what is read is not what was put in
    collection: str = ""  # of several in one store

    @property
    def count(self) -> int | None:
        return self.rows.count
