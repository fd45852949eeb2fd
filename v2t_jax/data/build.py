"""Builds a data set (`dataset`) from sources of any size: tokenized once, shuffled, without duplicates and leaks.

Texts are placed by the hash that also decides the split (`split.split_hash`): a random number that depends on nothing
but the text. The range of hashes is cut into as many parts as memory asks for.

1. *Chunks*: the sources are read from beginning to end; every few megabytes go to a worker process, which tokenizes
   them and writes DIR/work/chunk-N.arrow, sorted into parts: part 0 is held out, part 1 + p is for training.
2. *Parts*: a worker collects a part from all chunks and sorts it by hash. That shuffles it and puts equal texts side by
   side, of which the first stays; those that leak a held-out text are dropped. It writes DIR/work/part-N.npz.
3. The parts one after the other are the data set; the manifest, written last, makes the folder one.

The files depend on the sources and the settings alone and appear whole or not at all. So the bytes are the same for any
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.data.dataset import FORMAT, TokenDataset, as_json, claim, npy_bytes, npy_header, tokenizer_sha256
from v2t_jax.data.readers import Source, open_source
from v2t_jax.data.split import HELD_OUT_SHARE, HeldOutFilter, normalize_for_split, split_hash
from v2t_jax.data.vocabulary import Vocabulary, commonest_pieces
from v2t_jax.errors import InputError
from v2t_jax.interop.files import sha256_of, write_file

CHUNK_BYTES = 8 << 20  # of text that are tokenized at once
PART_BYTES = 128 << 20  # of text, about, that are sorted at once
MOST_TOKENS = 2**16 - 1  # of a text

_SCHEMA = pa.schema([("hash", pa.uint64()), ("text", pa.string()), ("ids", pa.large_list(pa.int32()))])


@dataclass(frozen=True)
class BuildSettings:
    """What decides a built data set's content, beside sources and tokenizer."""

    vocabulary_size: int = 0  # commonest tokens to keep; 0 keeps all
    held_out_share: float = HELD_OUT_SHARE
    max_tokens: int = 512  # of a text; the rest is cut off

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MOST_TOKENS:
            raise InputError(f"max_tokens must be from 1 to {MOST_TOKENS}, not {self.max_tokens}.")
        if self.vocabulary_size < 0:
            raise InputError("vocabulary_size must not be negative; 0 keeps all tokens.")
        if not 0 < self.held_out_share < 1:
            raise InputError(f"held_out_share must lie in (0, 1), not {self.held_out_share}: a run is scored on some.")


@dataclass(frozen=True)
class _Job:
    """What a worker process needs to know."""

    work: Path
    tokenizer: str  # as JSON
    settings: BuildSettings
    num_parts: int  # of training texts

    @property
    def vocab_map(self) -> Path:
        return self.work.parent / "vocabulary.npy"

    def chunk(self, index: int) -> Path:
        return self.work / f"chunk-{index:06d}.arrow"

    def part(self, index: int) -> Path:
        return self.work / f"part-{index:05d}.npz"

    @functools.cached_property
    def full(self) -> Vocabulary:
        """The vocabulary of the ids in chunks: every token of the tokenizer."""
        return Vocabulary.full(Tokenizer.from_str(self.tokenizer))


def build(
    sources: Sequence[str], folder: Path, tokenizer: Tokenizer, settings: BuildSettings, processes: int = 1
) -> TokenDataset:
    """Builds a data set, or goes on where an earlier call was cut off; of one that is finished, checks every byte.

    Raises:
        InputError: a source can't be read, the folder holds something else or the disk is full; what is done stays.
    """
    if not sources:
        raise InputError("There is nothing to build from: name at least one source of text.")
    if processes < 1:
        raise InputError(f"processes must be at least 1, not {processes}.")
    opened = [open_source(name) for name in sources]
    try:
        return _build(opened, folder, tokenizer, settings, processes)
    except OSError as error:
        raise InputError(
            f"The build stopped at {error.filename or folder} ({error.strerror or error}); fix that or free space, "
            "then run the same command to go on."
        ) from error


def _build(
    sources: Sequence[Source], folder: Path, tokenizer: Tokenizer, settings: BuildSettings, processes: int
) -> TokenDataset:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".made_of.json.")]
    if others and "made_of.json" not in others:
        raise InputError(f"{folder} holds something else ({others[0]}): give a new or an empty folder.")
    made_of = {
        "format": FORMAT,
        "sources": _fingerprints(sources),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "settings": asdict(settings),
    }
    claim(folder / "made_of.json", made_of, folder)
    if (folder / "manifest.json").is_file():
        dataset = TokenDataset.open(folder)
        dataset.check()
        return dataset
    work = folder / "work"
    num_parts = -(-sum(source.size for source in sources) // PART_BYTES)
    claim(work / "layout.json", {"format": FORMAT, "chunk_bytes": CHUNK_BYTES, "num_parts": num_parts}, folder)
    job = _Job(work, tokenizer.to_str(), settings, num_parts)
    with _pool(job, processes) as run:
        chunks = _make_chunks(job, sources, run)
        counts, vocabulary, held_out = _read_chunks(job, chunks, tokenizer)
        files = {"vocabulary.npy": write_file(job.vocab_map, npy_bytes(vocabulary.vocab_map.astype("<i4")))}
        _make_parts(job, chunks, run)
    files |= _join_parts(folder, job, np.dtype("<u2" if vocabulary.size <= 2**16 else "<u4"), counts)
    files["tokenizer.json"] = write_file(folder / "tokenizer.json", [vocabulary.tokenizer.to_str().encode()])
    lines = (json.dumps({"text": text}).encode() + b"\n" for text in held_out)
    files["held_out.jsonl"] = write_file(folder / "held_out.jsonl", lines)
    described = {"vocabulary_size": vocabulary.size, "counts": counts, "files": files}
    write_file(folder / "manifest.json", [as_json({"format": FORMAT, "made_of": made_of, **described})])
    shutil.rmtree(work, ignore_errors=True)
    for left in folder.glob(".*.*"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    return TokenDataset.open(folder)


def _fingerprints(sources: Sequence[Source]) -> list[list[dict[str, Any]]]:
    """Name, size and sha256 of every file."""
    sizes = {path: path.stat().st_size for source in sources for path in source.files}
    known: dict[Path, dict[str, Any]] = {}
    with progress.bar(sum(sizes.values()) // 1024, "hashing the sources", unit="KB") as update:
        done = 0
        for path, size in sizes.items():
            known[path] = {"name": path.name, "bytes": size, "sha256": sha256_of([path])}
            done += size
            update(done // 1024)
    return [[known[path] for path in source.files] for source in sources]


_job: _Job  # a worker's


def _start(job: _Job) -> None:
    """Tells this process its job."""
    global _job
    _job = job
    _held_out_filter.cache_clear()


def _start_worker(job: _Job) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a parent that is killed leaves no orphans
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _start(job)


Run = Callable[[Callable[..., None], Iterable[tuple[Any, ...]]], Iterator[None]]


@contextmanager
def _pool(job: _Job, processes: int) -> Iterator[Run]:
    """Gives `run(function, tasks)`: it calls the function with each task's arguments and yields when one is done."""
    if processes == 1:
        _start(job)
        yield lambda function, tasks: (function(*task) for task in tasks)  # type: ignore[func-returns-value]
        return
    # Not forked: JAX may be running in this process.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=(job,))

    def run(function: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> Iterator[None]:
        pending: set[Future[None]] = set()
        for task in tasks:
            pending.add(executor.submit(function, *task))
            while len(pending) >= 2 * processes:  # what waits, waits in memory
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)

    try:
        yield run
    except BrokenProcessPool as error:
        raise InputError(
            "A worker process was killed (did the memory run out?): run the same command again with fewer --processes."
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _make_chunks(job: _Job, sources: Sequence[Source], run: Run) -> int:
    """Makes the chunks that aren't there, and says how many there are."""
    total, count, texts = sum(source.size for source in sources), 0, 0
    read = [0] * len(sources)  # bytes of each

    def every() -> Iterator[list[str]]:
        chunk, size = list[str](), 0
        for i, source in enumerate(sources):
            for text in source.read(functools.partial(read.__setitem__, i)):
                chunk.append(text)
                size += len(text)
                if size >= CHUNK_BYTES:
                    yield chunk
                    chunk, size = [], 0
        yield chunk

    def missing() -> Iterator[tuple[int, Path]]:
        nonlocal count, texts
        for index, chunk in enumerate(every()):
            count, texts = index + 1, texts + len(chunk)
            if not job.chunk(index).is_file():
                # Not through the pipe: if a worker is killed while megabytes are on their way, Python waits for ever.
                file = job.work / f".texts-{index:06d}.json"
                file.write_text(json.dumps(chunk), encoding="utf-8")
                yield index, file

    with progress.bar(total // 1024, "tokenizing", unit="KB") as update:
        for _ in run(_write_chunk, missing()):
            update(min(sum(read), total) // 1024, texts=texts)
    return count


def _write_chunk(index: int, handed_over: Path) -> None:
    """Tokenizes the texts of a file, writes them to the chunk's and deletes the first."""
    texts = json.loads(handed_over.read_text(encoding="utf-8"))
    normalized = [normalize_for_split(text) for text in texts]
    kept = [i for i, text in enumerate(normalized) if text]
    hashes = [split_hash(normalized[i]) for i in kept]
    held_out = np.array([h < _job.settings.held_out_share * 2**64 for h in hashes], bool)
    part = np.where(held_out, 0, [1 + (h * _job.num_parts >> 64) for h in hashes])
    rows, most = _job.full.encode([texts[i] for i in kept]), _job.settings.max_tokens
    counts = {"texts": len(texts), "blank": len(texts) - len(kept), "cut": sum(len(row) > most for row in rows)}
    rows = [row[:most] for row in rows]
    trained = np.concatenate([np.zeros(0, np.int32), *(rows[i] for i in np.flatnonzero(~held_out))])
    frequency = np.bincount(trained[trained >= 0], minlength=_job.full.size).astype("<i8")
    schema = _SCHEMA.with_metadata({"counts": json.dumps(counts), "frequency": zlib.compress(frequency.tobytes(), 1)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        for p in range(1 + _job.num_parts):
            mine = np.flatnonzero(part == p)
            of = texts if p == 0 else normalized  # of a training text, only the leak filter reads more than the ids
            offsets = np.cumsum([0, *(len(rows[i]) for i in mine)])
            flat = np.concatenate([np.zeros(0, np.int32), *(rows[i] for i in mine)])
            columns = [
                pa.array([hashes[i] for i in mine], pa.uint64()),
                pa.array([of[kept[i]] for i in mine], pa.string()),
                pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat)),
            ]
            file.write_batch(pa.record_batch(columns, schema=schema))
    write_file(_job.chunk(index), [memoryview(sink.getvalue())])
    handed_over.unlink()


def _collect(job: _Job, chunks: int, part: int) -> tuple[pa.Table, int]:
    """A part of all chunks, sorted by hash, the first of equal texts alone; and how many others there were."""
    batches = []
    for i in range(chunks):
        with pa.memory_map(str(job.chunk(i))) as mapped:
            columns = pa.ipc.open_file(mapped).get_batch(part).columns
            batches.append(pa.record_batch(columns, schema=_SCHEMA))
    table = pa.Table.from_batches(batches, _SCHEMA).combine_chunks()
    first = np.unique(table["hash"].to_numpy(), return_index=True)[1]
    return table.take(first), len(table) - len(first)


def _read_chunks(job: _Job, chunks: int, tokenizer: Tokenizer) -> tuple[dict[str, int], Vocabulary, list[str]]:
    """What the chunks have counted, the vocabulary that follows from it, and the held-out texts."""
    counts, frequency = dict.fromkeys(("texts", "blank", "cut"), 0), np.zeros(job.full.size, np.int64)
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
        share = f"the held-out share of {job.settings.held_out_share}"
        raise InputError(
            f"None of {counts['texts']} texts falls into {share}: use more, or a larger share in a new folder."
        )
    vocabulary = job.full
    if job.settings.vocabulary_size:
        by_token_id = np.zeros(1 + vocabulary.vocab_map.max(), np.int64)
        by_token_id[vocabulary.vocab_map] = frequency
        kept = commonest_pieces(by_token_id, tokenizer, job.settings.vocabulary_size)
        vocabulary = Vocabulary.of_pieces(tokenizer, kept)
    counts |= {"held_out": len(held_out), "duplicates": duplicates}
    return counts, vocabulary, held_out["text"].to_pylist()


def _make_parts(job: _Job, chunks: int, run: Run) -> None:
    missing = [i for i in range(job.num_parts) if not job.part(i).is_file()]
    done = job.num_parts - len(missing)
    with progress.bar(job.num_parts, "sorting and filtering", unit="parts", start=done) as update:
        for _ in run(_write_part, ((i, chunks) for i in missing)):
            done += 1
            update(done)


@functools.lru_cache(maxsize=1)
def _held_out_filter(chunks: int) -> HeldOutFilter:
    texts, _ = _collect(_job, chunks, 0)
    return HeldOutFilter([normalize_for_split(text) for text in texts["text"].to_pylist()])


def _write_part(index: int, chunks: int) -> None:
    """Collects a part from all chunks and keeps the texts that are good for training."""
    table, duplicates = _collect(_job, chunks, 1 + index)
    leaks = _held_out_filter(chunks).leaking(table["text"].to_pylist())
    vocabulary = Vocabulary(_job.full.tokenizer, np.load(_job.vocab_map, allow_pickle=False))
    model_id = np.append(vocabulary.model_ids(_job.full.vocab_map), -1)  # -1, no token, stays that
    lists = table["ids"].combine_chunks()
    offsets = lists.offsets.to_numpy()
    tokens = model_id[lists.values.to_numpy()]
    lengths = np.diff(offsets)
    # A running count of missing tokens tells which texts have one.
    missing = np.concatenate([[0], np.cumsum(tokens < 0)])
    unknown = (missing[offsets[1:]] > missing[offsets[:-1]]) | (lengths == 0)
    kept = ~leaks & ~unknown
    counts = {"duplicates": duplicates, "given_away": leaks.sum(), "unknown": (unknown & ~leaks).sum()}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        allow_pickle=False,
        tokens=tokens[np.repeat(kept, lengths)],
        lengths=lengths[kept],
        **{name: np.array(count) for name, count in counts.items()},
    )
    write_file(_job.part(index), [buffer.getbuffer()])


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
        header = npy_header((int(offsets[-1]),), dtype)
        tokens = (part.astype(dtype).tobytes() for part in each("tokens"))
        return {
            "tokens.npy": write_file(folder / "tokens.npy", itertools.chain([header], tokens)),
            "offsets.npy": write_file(folder / "offsets.npy", npy_bytes(offsets)),
        }
