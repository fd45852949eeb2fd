"""The two kinds of work that `build` hands out: a chunk of texts is tokenized, and a shard is made from all chunks.

A chunk's file holds its texts in parts, by their hashes: part 0 those that are held out, part 1 + s those of shard s.
Functions here run in worker processes; `start` tells them the job.
"""

import functools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from v2t_jax.data.blocks import LENGTH_DTYPE, ROWS, as_json, write_file, write_records
from v2t_jax.data.sources import HeldOutFilter, normalize_for_split, split_hash
from v2t_jax.data.vocabulary import Vocabulary

_SCHEMA = pa.schema([("hash", pa.uint64()), ("text", pa.string()), ("ids", pa.large_list(pa.int32()))])


@dataclass(frozen=True)
class Job:
    """What the workers need to know."""

    folder: Path
    tokenizer: str  # as JSON
    held_out_share: float
    max_tokens: int
    num_shards: int

    def chunk(self, index: int) -> Path:
        return self.folder / "work" / f"chunk-{index:06d}.arrow"

    def shard(self, index: int) -> Path:
        """What there is to know of a shard; written when its files are."""
        return self.folder / "work" / f"shard-{index:05d}.json"

    @functools.cached_property
    def every_piece(self) -> Vocabulary:
        """The vocabulary of the ids in chunks: it has a number for each piece of the tokenizer."""
        return Vocabulary.full(Tokenizer.from_str(self.tokenizer))


_job: Job  # a worker's


def start(job: Job) -> None:
    """Tells this process the job."""
    global _job
    _job = job
    _protected.cache_clear()


def hand_over(job: Job, index: int, texts: Sequence[str]) -> Path:
    """Writes a chunk's texts for a worker.

    Not through the pipe to it: when a worker is killed with megabytes on their way, Python waits for ever.
    """
    file = job.folder / "work" / f".texts-{index:06d}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(texts), encoding="utf-8")
    return file


def write_chunk(index: int, handed_over: Path) -> None:
    """Tokenizes the texts of a file, writes them to the chunk's and deletes the first."""
    texts = json.loads(handed_over.read_text(encoding="utf-8"))
    normalized = [normalize_for_split(text) for text in texts]
    kept = [i for i, text in enumerate(normalized) if text]
    hashes = [split_hash(normalized[i]) for i in kept]
    held_out = np.array([h < _job.held_out_share * 2**64 for h in hashes], bool)
    part = np.where(held_out, 0, [1 + (h * _job.num_shards >> 64) for h in hashes])
    rows = _job.every_piece.encode([texts[i] for i in kept])
    counts = {"texts": len(texts), "blank": len(texts) - len(kept)}
    counts["cut"] = sum(len(row) > _job.max_tokens for row in rows)
    rows = [row[: _job.max_tokens] for row in rows]
    trained = np.concatenate([np.zeros(0, np.int32), *(rows[i] for i in np.flatnonzero(~held_out))])
    pieces = np.bincount(trained[trained >= 0], minlength=_job.every_piece.size).astype("<i8")
    schema = _SCHEMA.with_metadata({"counts": json.dumps(counts), "pieces": zlib.compress(pieces.tobytes(), 1)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        for p in range(1 + _job.num_shards):
            mine = np.flatnonzero(part == p)
            of = texts if p == 0 else normalized  # nobody will read a training text again but `HeldOutFilter`
            offsets = np.cumsum([0, *(len(rows[i]) for i in mine)])
            flat = np.concatenate([np.zeros(0, np.int32), *(rows[i] for i in mine)])
            columns = [
                pa.array([hashes[i] for i in mine], pa.uint64()),
                pa.array([of[kept[i]] for i in mine], pa.string()),
                pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat)),
            ]
            file.write_batch(pa.record_batch(columns, schema=schema))
    write_file(_job.chunk(index), sink.getvalue())
    handed_over.unlink()


def read_counts(job: Job, chunks: int) -> tuple[dict[str, int], np.ndarray]:
    """What the chunks have counted: texts by name, and how often each piece stands in training texts."""
    totals, pieces = dict.fromkeys(("texts", "blank", "cut"), 0), np.zeros(job.every_piece.size, np.int64)
    for i in range(chunks):
        with pa.memory_map(str(job.chunk(i))) as mapped:
            found = pa.ipc.open_file(mapped).schema.metadata
        for name, count in json.loads(found[b"counts"]).items():
            totals[name] += count
        pieces += np.frombuffer(zlib.decompress(found[b"pieces"]), "<i8")
    return totals, pieces


def read_part(job: Job, chunks: int, part: int) -> tuple[pa.Table, int]:
    """A part of all chunks, sorted by hash, the first of equal texts alone; and how many others there were."""
    batches = []
    for i in range(chunks):
        with pa.memory_map(str(job.chunk(i))) as mapped:
            columns = pa.ipc.open_file(mapped).get_batch(part).columns
            batches.append(pa.record_batch(columns, schema=_SCHEMA))
    table = pa.Table.from_batches(batches, _SCHEMA).combine_chunks()
    first = np.unique(table["hash"].to_numpy(), return_index=True)[1]
    return table.take(first), len(table) - len(first)


@functools.lru_cache(maxsize=1)
def _protected(chunks: int) -> HeldOutFilter:
    texts, _ = read_part(_job, chunks, 0)
    return HeldOutFilter([normalize_for_split(text) for text in texts["text"].to_pylist()])


def write_shard(index: int, chunks: int, token_dtype: str) -> None:
    """Collects a shard from all chunks and writes its files, and then what there is to know of it."""
    table, duplicates = read_part(_job, chunks, 1 + index)
    given_away = _protected(chunks).given_away_by(table["text"].to_pylist())
    pieces = np.load(_job.folder / "pieces.npy", allow_pickle=False)
    vocabulary = Vocabulary(Tokenizer.from_str(_job.tokenizer), pieces)
    model_id = np.append(vocabulary.model_ids(_job.every_piece.vocab_map), -1)  # -1, no piece, stays that
    lists = table["ids"].combine_chunks()
    offsets = lists.offsets.to_numpy()
    tokens = model_id[lists.values.to_numpy()]
    lengths = np.diff(offsets)
    # A running count of missing pieces tells which texts have one.
    missing = np.concatenate([[0], np.cumsum(tokens < 0)])
    unknown = (missing[offsets[1:]] > missing[offsets[:-1]]) | (lengths == 0)
    kept = ~given_away & ~unknown
    tokens, lengths = tokens[np.repeat(kept, lengths)].astype(token_dtype), lengths[kept]
    ends = np.concatenate([[0], np.cumsum(lengths)])

    def blocks() -> Iterator[tuple[int, int]]:
        for first in range(0, len(lengths), ROWS):
            yield first, min(first + ROWS, len(lengths))

    folder, name = _job.folder, f"{index:05d}.array_record"
    described = {
        "rows": len(lengths),
        "longest": int(lengths.max(initial=0)),
        "duplicates": duplicates,
        "given_away": int(given_away.sum()),
        "unknown": int((unknown & ~given_away).sum()),
        "tokens": write_records(
            folder / "tokens" / name, index, (tokens[ends[a] : ends[b]].tobytes() for a, b in blocks())
        ),
        "lengths": write_records(
            folder / "lengths" / name, index, (lengths[a:b].astype(LENGTH_DTYPE).tobytes() for a, b in blocks())
        ),
    }
    write_file(_job.shard(index), as_json(described))
