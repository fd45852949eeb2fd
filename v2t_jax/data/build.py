"""Builds a data set (`dataset`) from sources of any size: tokenized once, shuffled, without duplicates and leaks.

Texts are placed by the hash that also decides the split (`split.split_hash`), whose range is cut into parts.
1. *Chunks*: every few megabytes of the sources go to a worker process, which tokenizes them and writes
   chunk-N.arrow into DIR/work, sorted into parts: part 0 is held out, part 1 + p is for training.
2. *Parts*: a worker collects a part from all chunks, sorts it by hash, which shuffles it and puts equal texts side by
   side, drops duplicates and texts that leak a held-out one, and writes part-N.npz beside them.
3. The parts one after the other are the data set; the manifest, written last, makes the folder one.

The files depend on the sources and the settings alone and appear whole or not at all: the bytes are the same for any
number of processes, and a build that was killed goes on where it was.
"""

import functools
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.config import BuildSettings
from v2t_jax.data.dataset import FORMAT, TokenDataset, claim, npy_header, resumable, tokenizer_sha256, write_json
from v2t_jax.data.readers import Source, open_source
from v2t_jax.data.split import HeldOutFilter, normalize_for_split, split_hash
from v2t_jax.data.vocabulary import Vocabulary, read_tokenizer
from v2t_jax.errors import InputError, check_whole
from v2t_jax.interop.files import sha256_of, write_file

CHUNK_BYTES = 8 << 20  # of text that are tokenized at once
PART_BYTES = 128 << 20  # of text, about, that are sorted at once

_SCHEMA = pa.schema([("hash", pa.uint64()), ("text", pa.string()), ("ids", pa.large_list(pa.int32()))])


@dataclass(frozen=True)
class _Job:
    """What a worker process needs to know; it goes with every task."""

    work: Path
    settings: BuildSettings
    num_parts: int  # of training texts

    def chunk(self, index: int) -> Path:
        return self.work / f"chunk-{index:06d}.arrow"

    def part(self, index: int) -> Path:
        return self.work / f"part-{index:05d}.npz"


def build(
    sources: Sequence[str], folder: Path, tokenizer: Tokenizer, settings: BuildSettings, processes: int = 1
) -> TokenDataset:
    """Builds a data set, or goes on where an earlier call was cut off; of one that is finished, checks every byte."""
    if not sources:
        raise InputError("There is nothing to build from: name at least one source of text.")
    check_whole("processes", processes, 1)
    opened = [open_source(name) for name in sources]
    with resumable("The build", folder):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: give a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.iterdir() if not path.name.startswith(".made_of.json.")]
        if others and "made_of.json" not in others:
            raise InputError(f"{folder} holds something else ({others[0]}): give a new or an empty folder.")
        made_of = {
            "format": FORMAT,
            "sources": _fingerprints(opened),
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "settings": asdict(settings),
        }
        claim(folder / "made_of.json", made_of, folder)
        if (folder / "manifest.json").is_file():
            with progress.stage(f"checking {folder}"):
                return TokenDataset.open(folder, whole=True)
        job = _Job(folder / "work", settings, -(-sum(source.size for source in opened) // PART_BYTES))
        layout = {"format": FORMAT, "chunk_bytes": CHUNK_BYTES, "num_parts": job.num_parts}
        claim(job.work / "layout.json", layout, folder)
        write_file(job.work / "tokenizer.json", [tokenizer.to_str().encode()])
        _full.cache_clear()
        _held_out_filter.cache_clear()
        with _pool(processes) as run:
            chunks = _make_chunks(job, opened, run)
            counts, vocabulary, held_out = _read_chunks(job, chunks)
            files = {"vocabulary.npy": _write_array(folder / "vocabulary.npy", vocabulary.vocab_map.astype("<i4"))}
            _make_parts(job, chunks, run)
        files |= _join_parts(folder, job, np.dtype("<u2" if vocabulary.size <= 2**16 else "<u4"), counts)
        files["tokenizer.json"] = write_file(folder / "tokenizer.json", [vocabulary.tokenizer.to_str().encode()])
        lines = (json.dumps({"text": text}).encode() + b"\n" for text in held_out)
        files["held_out.jsonl"] = write_file(folder / "held_out.jsonl", lines)
        described = {"vocabulary_size": vocabulary.size, "counts": counts, "files": files}
        write_json(folder / "manifest.json", {"format": FORMAT, "made_of": made_of, **described})
        shutil.rmtree(job.work, ignore_errors=True)
        for left in folder.glob(".*.*"):  # by a process that was killed while it wrote
            left.unlink(missing_ok=True)
    return TokenDataset.open(folder)


def _fingerprints(sources: Sequence[Source]) -> list[list[dict[str, Any]]]:
    """Name, size and sha256 of every file."""
    paths = {path for source in sources for path in source.files}
    known: dict[Path, dict[str, Any]] = {}
    with progress.bar(len(paths), "hashing the sources", unit="files") as update:
        for done, path in enumerate(paths, 1):
            known[path] = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of([path])}
            update(done)
    return [[known[path] for path in source.files] for source in sources]


def _write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    return write_file(path, [npy_header(array.shape, array.dtype), array.tobytes()])


Run = Callable[[Callable[..., None], Iterable[tuple[Any, ...]]], Iterator[None]]


@contextmanager
def _pool(processes: int) -> Iterator[Run]:
    """Gives `run(function, tasks)`, which calls the function with each task's arguments and yields after each."""
    if processes == 1:
        yield lambda function, tasks: (function(*task) for task in tasks)  # type: ignore[func-returns-value]
        return
    # Not forked: JAX may be running in this process.
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_start_worker)

    def run(function: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> Iterator[None]:
        pending: deque[Future[None]] = deque()
        for task in tasks:
            pending.append(executor.submit(function, *task))
            if len(pending) == 2 * processes:  # what waits takes space
                yield pending.popleft().result()
        yield from (future.result() for future in pending)

    try:
        yield run
    except BrokenProcessPool as error:
        raise InputError(
            "A worker process was killed (did the memory run out?): run the same command again with fewer --processes."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a parent that is killed leaves no orphans
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _make_chunks(job: _Job, sources: Sequence[Source], run: Run) -> int:
    """Makes the chunks that aren't there; returns the number of all."""
    total, count, texts = sum(source.size for source in sources), 0, 0

    def every() -> Iterator[list[str]]:
        chunk, size = list[str](), 0
        for text in itertools.chain(*sources):
            chunk.append(text)
            size += len(text)
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        yield chunk

    def missing() -> Iterator[tuple[_Job, int, Path]]:
        nonlocal count, texts
        for index, chunk in enumerate(every()):
            count, texts = index + 1, texts + len(chunk)
            if not job.chunk(index).is_file():
                # Not through the pipe: if a worker is killed while megabytes are on their way, Python waits for ever.
                file = job.work / f".texts-{index:06d}.json"
                file.write_text(json.dumps(chunk), encoding="utf-8")
                yield job, index, file

    with progress.bar(total // 1024, "tokenizing", unit="KB") as update:
        for _ in run(_write_chunk, missing()):
            update(min(sum(source.position for source in sources), total) // 1024, texts=texts)
    return count


@functools.lru_cache(maxsize=1)
def _full(job: _Job) -> Vocabulary:
    return Vocabulary.full(read_tokenizer(job.work / "tokenizer.json"))


def _write_chunk(job: _Job, index: int, handed_over: Path) -> None:
    """Tokenizes the texts of a file, writes them to the chunk's and deletes the first."""
    texts = json.loads(handed_over.read_text(encoding="utf-8"))
    pairs = [(text, normalized) for text in texts if (normalized := normalize_for_split(text))]
    hashes = [split_hash(normalized) for _, normalized in pairs]
    held_out = [h < job.settings.held_out_share * 2**64 for h in hashes]
    part = np.where(held_out, 0, [1 + (h * job.num_parts >> 64) for h in hashes])
    rows, most = _full(job).encode([text for text, _ in pairs]), job.settings.max_tokens
    counts = {"texts": len(texts), "blank": len(texts) - len(pairs), "cut": sum(len(row) > most for row in rows)}
    # Of a training text, only the leak filter reads more than the ids.
    kept = [text if out else normalized for (text, normalized), out in zip(pairs, held_out, strict=True)]
    columns = [hashes, kept, [row[:most] for row in rows]]
    batch = pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)
    trained = batch.filter(pa.array(part > 0))["ids"].flatten().to_numpy()
    frequency = np.bincount(trained[trained >= 0], minlength=_full(job).size).astype("<i8")
    schema = _SCHEMA.with_metadata({"counts": json.dumps(counts), "frequency": zlib.compress(frequency.tobytes(), 1)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        for p in range(1 + job.num_parts):
            file.write_batch(batch.take(pa.array(np.flatnonzero(part == p))))
    write_file(job.chunk(index), [memoryview(sink.getvalue())])
    handed_over.unlink()


def _collect(job: _Job, chunks: int, part: int) -> tuple[pa.Table, int]:
    """A part of all chunks, sorted by hash, the first of equal texts alone; and how many others there were."""
    batches = []
    for i in range(chunks):
        with pa.memory_map(str(job.chunk(i))) as mapped:
            batches.append(pa.ipc.open_file(mapped).get_batch(part).replace_schema_metadata())
    table = pa.Table.from_batches(batches, _SCHEMA).combine_chunks()
    first = np.unique(table["hash"].to_numpy(), return_index=True)[1]
    return table.take(first), len(table) - len(first)


def _read_chunks(job: _Job, chunks: int) -> tuple[dict[str, int], Vocabulary, list[str]]:
    """What the chunks have counted, the vocabulary that follows from it, and the held-out texts."""
    vocabulary = _full(job)
    counts, frequency = dict.fromkeys(("texts", "blank", "cut"), 0), np.zeros(vocabulary.size, np.int64)
    for i in range(chunks):
        with pa.memory_map(str(job.chunk(i))) as mapped:
            found = pa.ipc.open_file(mapped).schema.metadata
        for name, count in json.loads(found[b"counts"]).items():
            counts[name] += count
        frequency += np.frombuffer(zlib.decompress(found[b"frequency"]), "<i8")
    held_out, duplicates = _collect(job, chunks, 0)
    if counts["texts"] == counts["blank"]:
        raise InputError("The sources hold no text: give at least one text of letters or digits.")
    if not len(held_out):
        raise InputError(
            f"None of {counts['texts']} texts falls into the held-out share of {job.settings.held_out_share}: use "
            "more, or a larger share in a new folder."
        )
    if job.settings.vocabulary_size:
        vocabulary = vocabulary.pruned(frequency, job.settings.vocabulary_size)
    counts |= {"held_out": len(held_out), "duplicates": duplicates}
    return counts, vocabulary, held_out["text"].to_pylist()


def _make_parts(job: _Job, chunks: int, run: Run) -> None:
    missing = [(job, i, chunks) for i in range(job.num_parts) if not job.part(i).is_file()]
    before = job.num_parts - len(missing)
    with progress.bar(job.num_parts, "sorting and filtering", unit="parts", start=before) as update:
        for done, _ in enumerate(run(_write_part, missing), before + 1):
            update(done)


@functools.lru_cache(maxsize=1)
def _held_out_filter(job: _Job, chunks: int) -> HeldOutFilter:
    texts, _ = _collect(job, chunks, 0)
    return HeldOutFilter([normalize_for_split(text) for text in texts["text"].to_pylist()])


def _write_part(job: _Job, index: int, chunks: int) -> None:
    """Keeps a part's texts that are good for training."""
    table, duplicates = _collect(job, chunks, 1 + index)
    leaks = _held_out_filter(job, chunks).leaking(table["text"].to_pylist())
    vocab_map = np.load(job.work.parent / "vocabulary.npy", allow_pickle=False)
    model_id = Vocabulary(_full(job).tokenizer, vocab_map).model_ids(_full(job).vocab_map)
    lists = table["ids"].combine_chunks()
    offsets, tokens = lists.offsets.to_numpy(), np.append(model_id, -1)[lists.values.to_numpy()]  # -1, no token, stays
    lengths, missing = np.diff(offsets), np.concatenate([[0], np.cumsum(tokens < 0)])  # a running count
    unknown = (np.diff(missing[offsets]) > 0) | (lengths == 0)
    kept = ~leaks & ~unknown
    counts = {"duplicates": duplicates, "given_away": leaks.sum(), "unknown": (unknown & ~leaks).sum()}
    buffer = io.BytesIO()
    np.savez(buffer, tokens=tokens[np.repeat(kept, lengths)], lengths=lengths[kept], **counts)
    write_file(job.part(index), [buffer.getbuffer()])


def _join_parts(folder: Path, job: _Job, dtype: np.dtype, counts: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Writes the tokens and offsets of all parts, and adds what was counted on the way."""

    def each(name: str) -> Iterator[np.ndarray]:
        for i in range(job.num_parts):
            with np.load(job.part(i), allow_pickle=False) as arrays:
                yield arrays[name]

    for name in ("duplicates", "given_away", "unknown"):
        counts[name] = counts.get(name, 0) + sum(map(int, each(name)))
    offsets = np.cumsum(np.concatenate([[0], *each("lengths")]), dtype="<i8")
    counts["rows"] = len(offsets) - 1
    if not counts["rows"]:
        raise InputError(f"No text is left for training ({json.dumps(counts)}): use more text, in a new folder.")
    with progress.stage("writing the data set"):
        tokens = (part.astype(dtype).tobytes() for part in each("tokens"))
        header = npy_header((int(offsets[-1]),), dtype)
        return {
            "tokens.npy": write_file(folder / "tokens.npy", itertools.chain([header], tokens)),
            "offsets.npy": _write_array(folder / "offsets.npy", offsets),
        }
