"""Finds the vectors of a built data set's texts in a file that somebody else wrote, in any order, among any others.

The data set keeps neither characters nor ids of its texts: two texts are the same if their model ids are, as far as the
data set has them. Each text gets a 64-bit key, and so does each row of the file:

    the file holds its texts     a hash of the text's model ids
    --texts SOURCE, by row       the number of the first record in SOURCE with these model ids
    --texts SOURCE, by id        a hash of that record's id

Nothing is in memory but keys and row numbers.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from v2t_jax import progress
from v2t_jax.data import columns
from v2t_jax.data.dataset import TokenDataset
from v2t_jax.data.readers import Source, as_text, open_source
from v2t_jax.data.vector_file import Rows, VectorFile, whole_numbers
from v2t_jax.data.vectors import open_vectors
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.errors import InputError

SHOWN = 80  # characters of a text in a message

_Keyed = Iterable[tuple[np.ndarray, np.ndarray]]  # keys [n], and what each stands for [n]; uint64


class Match(NamedTuple):
    """Where the vectors of a data set's N texts are."""

    rows: np.ndarray  # int64 [N], the row of the file with each text's vector
    num_rows: int  # of the file
    width: int  # of its vectors
    sha256: str  # of all vectors and of `rows`


def match(dataset: TokenDataset, vectors: str, texts: str | None = None, width: int | None = None) -> Match:
    """Reads a file of vectors (`open_vectors`) once, checks it, and finds the first row for each text of a data set.

    Args:
        texts: source of the file's texts (`open_source`), matched by id where both have ids, else by row. Without it,
            the file must hold them.
        width: of the embedder's vectors, if it is known.
    """
    file = open_vectors(vectors)
    head = next(file.batches(1), None)
    if head is None:
        raise InputError(f"{vectors} holds no vectors: give a file with a row for each text.")
    if whole_numbers(head.vectors):
        raise InputError(
            f"{vectors} holds {head.vectors.dtype} numbers, as quantized vectors are: give the embedder's own, in "
            "float32 or float16."
        )
    if width not in (None, head.vectors.shape[1]):
        raise InputError(
            f"The vectors of {vectors} are {head.vectors.shape[1]} wide, but the embedder's {width}: give the embedder "
            "that made them."
        )
    vocabulary, most = dataset.vocabulary(), dataset.manifest["made_of"]["settings"]["max_tokens"]
    encode, keys, records = functools.partial(_text_keys, vocabulary, most), _row_keys(dataset), None
    if texts is not None:
        source = open_source(texts)
        by_id = head.ids is not None and next(source.records(), (None,))[0] is not None
        keys, records = _source_keys(dataset, keys, source, texts, encode, by_id)
        of = (lambda batch, _: _id_keys(batch.ids)) if by_id else lambda _, numbers: numbers
        records = None if by_id else records
    elif head.texts is not None:
        by_id, of = False, lambda batch, _: encode(batch.texts, vectors)
    else:
        raise InputError(f"{vectors} holds no texts beside its vectors: name their source, texts=SOURCE.")
    read = _Reading(file, head.vectors.shape[1])
    rows, found, repeats = _first(keys, read.keyed(of))
    if records not in (None, read.count):
        raise InputError(
            f"{texts} holds {records:,} texts, but {vectors} {read.count:,} vectors: give a text for each vector, in "
            "their order, or ids in both."
        )
    if by_id and repeats:
        raise InputError(
            f"{vectors} has several vectors of one id: give each id once, or none where rows are in order."
        )
    _check_all(dataset, found, f"{vectors}, by the ids of {texts}," if by_id else vectors)
    if (bad := np.isin(rows, read.bad)).any():
        raise InputError(
            f"Vector {rows[bad].min() + 1:,} of {vectors} is zero, or holds NaN or numbers beyond float16: repair it, "
            f"or build {dataset.folder} without its text."
        )
    read.digest.update(rows.tobytes())
    return Match(rows.astype(np.int64), read.count, read.width, read.digest.hexdigest())


class _Reading:
    """One pass over a file of vectors."""

    def __init__(self, file: VectorFile, width: int) -> None:
        self.file, self.width = file, width
        self.count, self.digest, self.bad = 0, hashlib.sha256(), np.zeros(0, np.uint64)

    def keyed(self, of: Callable[[Rows, np.ndarray], np.ndarray]) -> _Keyed:
        """Keys and numbers of the rows; `of(batch, numbers)` gives the keys."""
        with progress.bar(self.file.count, "matching vectors and texts", unit="vectors") as update:
            for batch in self.file.batches(columns.PIECE_ROWS):
                numbers = np.arange(self.count, self.count + len(batch.vectors), dtype=np.uint64)
                with np.errstate(over="ignore"):
                    kept = batch.vectors.astype(np.float16)
                self.bad = np.append(self.bad, numbers[~(np.isfinite(kept).all(axis=1) & kept.any(axis=1))])
                self.digest.update(batch.vectors.tobytes())
                self.count += len(numbers)
                yield of(batch, numbers), numbers
                update(self.count)


def _source_keys(
    dataset: TokenDataset,
    keys: np.ndarray,
    source: Source,
    name: str,
    encode: Callable[[Sequence[str], str], np.ndarray],
    by_id: bool,
) -> tuple[np.ndarray, int]:
    """The keys of a data set's texts by their place in a source, and how many records that has."""
    count = 0

    def records() -> _Keyed:
        nonlocal count
        with progress.bar(None, "finding the texts", unit="texts") as update:
            all_records = source.records()
            while batch := list(itertools.islice(all_records, columns.PIECE_ROWS)):
                numbers = np.arange(count, count + len(batch), dtype=np.uint64)
                count += len(batch)
                yield encode([text for _, text in batch], name), _id_keys(i for i, _ in batch) if by_id else numbers
                update(count)

    labels, found, _ = _first(keys, records())
    _check_all(dataset, found, name)
    order = np.lexsort((keys, labels))
    same = (np.diff(labels[order]) == 0) & (np.diff(keys[order]) != 0)
    if same.any():
        one, other = (_shown(dataset, int(i)) for i in order[np.argmax(same) :][:2])
        raise InputError(f"Two texts of {name} have the same id, {one!r} and {other!r}: give each its own.")
    return labels, count


def _first(keys: np.ndarray, stream: _Keyed) -> tuple[np.ndarray, np.ndarray, int]:
    """For each of N keys what the first equal one in a stream stands for, if there is one; and how many repeat."""
    order = np.argsort(keys, kind="stable")
    ordered, labels, found, repeats = keys[order], np.zeros(len(keys), np.uint64), np.zeros(len(keys), bool), 0
    for theirs, standing_for in stream:
        start, end = (np.searchsorted(ordered, theirs, side) for side in ("left", "right"))
        sizes = end - start
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows, at = np.unique(order[np.repeat(start, sizes) + within], return_index=True)
        new = ~found[rows]
        labels[rows[new]] = np.repeat(standing_for, sizes)[at[new]]
        found[rows] = True
        repeats += len(within) - int(new.sum())
    return labels, found, repeats


def _row_keys(dataset: TokenDataset) -> np.ndarray:
    keys, size = np.empty(len(dataset), np.uint64), columns.PIECE_ROWS
    with progress.bar(len(dataset), "hashing the data set", unit="texts") as update:
        for row in range(0, len(dataset), size):
            ends = np.asarray(dataset.offsets[row : row + size + 1])
            flat, ends = dataset.tokens[ends[0] : ends[-1]].astype(np.int32).tobytes(), (ends - ends[0]) * 4
            keys[row : row + size] = [_hash(flat[a:b]) for a, b in itertools.pairwise(ends.tolist())]
            update(min(row + size, len(dataset)))
    return keys


def _text_keys(vocabulary: Vocabulary, most: int, texts: Sequence[str | None], where: str) -> np.ndarray:
    rows = vocabulary.encode([as_text(text or "", where) for text in texts])
    return np.array([_hash(row[:most].tobytes()) for row in rows], np.uint64)


def _id_keys(ids: Iterable[Any]) -> np.ndarray:
    """By their spelling: what is a number in one file may be a string in the other."""
    return np.array([_hash(str(i).encode("utf-8", "replace")) for i in ids], np.uint64)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _check_all(dataset: TokenDataset, found: np.ndarray, where: str) -> None:
    if not found.all():
        first = _shown(dataset, int(np.argmin(found)))
        raise InputError(
            f"{where} lacks {(~found).sum():,} of {len(found):,} texts of {dataset.folder}, such as {first!r}: give a "
            "file with all of them, or build a data set of those it has."
        )


def _shown(dataset: TokenDataset, row: int) -> str:
    ids = np.asarray(dataset.tokens[dataset.offsets[row] : dataset.offsets[row + 1]])
    text = dataset.vocabulary().decode(ids[None])[0]
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
