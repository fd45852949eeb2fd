"""Sources of any size into a built data set (`blocks`): tokenized once, shuffled, without duplicates and leaks.

Everything goes by a text's hash, the one that decides the split (`sources.split_hash`): a random number that depends
on nothing but the text. The hashes' range is cut into as many parts as there will be shards.

1. *Chunks*: the sources are read from beginning to end; every few megabytes go to a worker, which tokenizes them and
   writes chunk-N.arrow to DIR's folder `work`, its texts sorted into parts by their hashes.
2. *Shards*: a worker collects a part from all chunks and sorts it by hash. That shuffles it and puts equal texts side
   by side, of which the first stays; those that give a held-out text away are dropped (`sources.HeldOutFilter`).
3. The held-out texts (the lowest hashes) and the manifest, which makes the folder count.

What a chunk or a shard holds depends on the sources and the settings alone, and its file appears whole or not at all.
So it doesn't matter which process of which host makes it, nor how often they were killed: the bytes are the same.
Several hosts work in one shared folder; each makes every so-manieth file and waits for those of the others.
"""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.data import shards
from v2t_jax.data.blocks import (
    FORMAT,
    LENGTH_DTYPE,
    StoredTexts,
    as_json,
    check_file,
    claim,
    tokenizer_sha256,
    write_file,
)
from v2t_jax.data.readers import Source, Watch, open_source
from v2t_jax.data.shards import Job
from v2t_jax.data.sources import HELD_OUT_SHARE
from v2t_jax.data.vocabulary import Vocabulary, commonest_pieces
from v2t_jax.errors import InputError
from v2t_jax.parallel.processes import Share

POLL_SECONDS = 0.2  # between two looks for another host's files


@dataclass(frozen=True)
class BuildSettings:
    """What decides a built data set's content, beside sources and tokenizer."""

    vocabulary_size: int = 0  # commonest pieces to keep; 0 keeps all
    held_out_share: float = HELD_OUT_SHARE
    max_tokens: int = 512  # of a text; what is behind them is cut off
    chunk_bytes: int = 8 << 20  # of text that are tokenized at once
    shard_bytes: int = 128 << 20  # of text in a shard, more or less

    def __post_init__(self) -> None:
        for name in ("max_tokens", "chunk_bytes", "shard_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_tokens > np.iinfo(LENGTH_DTYPE).max:
            raise InputError(f"max_tokens must be at most {np.iinfo(LENGTH_DTYPE).max}, not {self.max_tokens}.")
        if self.vocabulary_size < 0:
            raise InputError("vocabulary_size must not be negative; 0 keeps all pieces.")
        if not 0 < self.held_out_share < 1:
            raise InputError(f"held_out_share must lie in (0, 1), not {self.held_out_share}: a run is scored on some.")


@dataclass(frozen=True)
class Workers:
    """Who does the work; nothing of it shows in the result."""

    processes: int = 1
    share: Share = Share()
    timeout: float = 3600.0  # seconds without a new file from another host after which it is given up

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise InputError(f"processes must be at least 1, not {self.processes}.")
        if not self.timeout > 0:
            raise InputError(f"timeout must be a number of seconds above 0, not {self.timeout}.")


def build(
    sources: Sequence[str], folder: Path, tokenizer: Tokenizer, settings: BuildSettings, workers: Workers
) -> StoredTexts:
    """Builds a data set, or goes on where an earlier call was cut off; of one that is finished, checks every byte.

    Raises:
        InputError: a source can't be read, the folder holds something else or the disk is full; what is done stays.
    """
    if not sources:
        raise InputError("There is nothing to build from: name at least one source of text.")
    opened = [open_source(name) for name in sources]
    try:
        return _build(opened, folder, tokenizer, settings, workers)
    except OSError as error:
        if workers.share.index and isinstance(error, FileNotFoundError) and (folder / "manifest.json").is_file():
            return StoredTexts(folder)  # the other hosts needed nothing more of this one, and have cleared up
        raise InputError(
            f"The build stopped at {error.filename or folder} ({error.strerror or error}); mend that, or free space, "
            "then run the same command to go on."
        ) from error


def _build(
    sources: Sequence[Source], folder: Path, tokenizer: Tokenizer, settings: BuildSettings, workers: Workers
) -> StoredTexts:
    _check_folder(folder)
    made_of = {
        "format": FORMAT,
        "sources": _fingerprints(sources),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "settings": asdict(settings),
    }
    claim(folder / "made_of.json", made_of, folder)
    if (folder / "manifest.json").is_file():
        return _check(folder)
    num_shards = -(-sum(source.size for source in sources) // settings.shard_bytes)
    job = Job(folder, tokenizer.to_str(), settings.held_out_share, settings.max_tokens, num_shards)
    with _pool(job, workers.processes) as run:
        chunks = _make_chunks(job, sources, settings.chunk_bytes, workers, run)
        counts, pieces = shards.read_counts(job, chunks)
        held_out, duplicates = shards.read_part(job, chunks, 0)
        if counts["texts"] == counts["blank"]:
            raise InputError("The sources hold no text: give at least one text of letters or digits.")
        if not len(held_out):
            raise InputError(
                f"Of {counts['texts']} texts none falls into the held-out share of {settings.held_out_share}: use more "
                "text or a larger share, in a new folder."
            )
        vocabulary = job.every_piece
        if settings.vocabulary_size:
            by_token_id = np.zeros(1 + vocabulary.vocab_map.max(), np.int64)
            by_token_id[vocabulary.vocab_map] = pieces
            kept = commonest_pieces(by_token_id, tokenizer, settings.vocabulary_size)
            vocabulary = Vocabulary.of_pieces(tokenizer, kept)
        buffer = io.BytesIO()
        np.save(buffer, vocabulary.vocab_map)
        entries = {"pieces.npy": write_file(folder / "pieces.npy", buffer.getvalue())}
        entries["tokenizer.json"] = write_file(folder / "tokenizer.json", vocabulary.tokenizer.to_str().encode())
        token_dtype = "uint16" if vocabulary.size <= 2**16 else "int32"
        _make_shards(job, chunks, token_dtype, workers, run)
    if workers.share.index > 0:
        _wait([folder / "manifest.json"], workers, lambda _: 0, folder / "manifest.json")
        return StoredTexts(folder)

    made = [json.loads(job.shard(i).read_text()) for i in range(num_shards)]
    counts |= {name: sum(shard.pop(name) for shard in made) for name in ("duplicates", "given_away", "unknown")}
    counts["duplicates"] += duplicates
    counts |= {"held_out": len(held_out), "rows": sum(shard["rows"] for shard in made)}
    if not counts["rows"]:
        raise InputError(f"No text is left for training ({json.dumps(counts)}): use more text, in a new folder.")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in held_out["text"].to_pylist())
    entries["held_out.jsonl"] = write_file(folder / "held_out.jsonl", lines.encode())
    described = {"vocabulary_size": vocabulary.size, "token_dtype": token_dtype, "counts": counts}
    described["longest"] = max(shard.pop("longest") for shard in made)
    manifest = {"format": FORMAT, "made_of": made_of, **described, **entries, "shards": made}
    write_file(folder / "manifest.json", as_json(manifest))
    shutil.rmtree(folder / "work", ignore_errors=True)
    for left in folder.rglob(".*.*"):  # by those who were killed while they wrote
        left.unlink(missing_ok=True)
    return StoredTexts(folder)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".made_of.json.")]
    if others and "made_of.json" not in others:
        raise InputError(f"{folder} holds something else ({others[0]}): give a new or an empty folder.")


def _fingerprints(sources: Sequence[Source]) -> list[list[dict[str, Any]]]:
    """Name, size and sha256 of every file."""
    sizes = {path: path.stat().st_size for source in sources for path in source.files}
    known: dict[Path, dict[str, Any]] = {}
    with progress.bar(sum(sizes.values()) // 1024, "hashing the sources", unit="KB") as update:
        done = 0
        for path, size in sizes.items():
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            known[path] = {"name": path.name, "bytes": size, "sha256": sha256}
            done += size
            update(done // 1024)
    return [[known[path] for path in source.files] for source in sources]


def _check(folder: Path) -> StoredTexts:
    """A finished data set, every file of it compared with its sha256."""
    stored = StoredTexts(folder)
    entries = stored.manifest["shards"]
    with progress.bar(len(entries), f"checking {folder}", unit="shards") as update:
        for i, entry in enumerate(entries):
            for family in ("tokens", "lengths"):
                check_file(folder / family / f"{i:05d}.array_record", entry[family], whole=True)
            update(i + 1)
    return stored


def _run_here(function: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> Iterator[None]:
    """What `_pool` gives for one process: this one."""
    for task in tasks:
        function(*task)
        yield


Run = Callable[[Callable[..., None], Iterable[tuple[Any, ...]]], Iterator[None]]


@contextmanager
def _pool(job: Job, processes: int) -> Iterator[Run]:
    """Gives `run(function, tasks)`: it calls the function with each task's arguments and yields when one is done."""
    if processes == 1:
        shards.start(job)
        yield _run_here
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


def _start_worker(job: Job) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a parent that is killed leaves no orphans
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    shards.start(job)


def _make_chunks(job: Job, sources: Sequence[Source], chunk_bytes: int, workers: Workers, run: Run) -> int:
    """Makes this host's chunks that aren't there, waits for the others', and says how many there are."""
    total, read, count, texts = sum(source.size for source in sources), 0, 0, 0

    def position(before: int) -> Watch:
        def watch(done: int) -> None:
            nonlocal read
            read = before + done

        return watch

    def tasks() -> Iterator[tuple[int, list[str]]]:
        nonlocal count, texts
        chunk: list[str] = []
        before, size = 0, 0
        for source in sources:
            for text in source.read(position(before)):
                chunk.append(text)
                size += len(text)
                if size >= chunk_bytes:
                    yield count, chunk
                    count, texts, chunk, size = count + 1, texts + len(chunk), [], 0
            before += source.size
        yield count, chunk
        count, texts = count + 1, texts + len(chunk)

    def missing() -> Iterator[tuple[int, Path]]:
        for index, chunk in tasks():
            if workers.share.has(index) and not job.chunk(index).is_file():
                yield index, shards.hand_over(job, index, chunk)

    with progress.bar(total // 1024, "tokenizing", unit="KB") as update:
        for _ in run(shards.write_chunk, missing()):
            update(min(read, total) // 1024, texts=texts)
    _wait([job.chunk(i) for i in range(count)], workers, workers.share.host_of, job.folder / "manifest.json")
    return count


def _make_shards(job: Job, chunks: int, token_dtype: str, workers: Workers, run: Run) -> None:
    mine = [i for i in range(job.num_shards) if workers.share.has(i)]
    missing = [i for i in mine if not job.shard(i).is_file()]
    done = len(mine) - len(missing)
    with progress.bar(len(mine), "writing shards", unit="shards", start=done) as update:
        for _ in run(shards.write_shard, ((i, chunks, token_dtype) for i in missing)):
            done += 1
            update(done)
    if workers.share.index == 0:
        files = [job.shard(i) for i in range(job.num_shards)]
        _wait(files, workers, workers.share.host_of, job.folder / "manifest.json")


def _wait(files: Sequence[Path], workers: Workers, host_of: Callable[[int], int], finished: Path) -> None:
    """Until other hosts' files are there.

    Args:
        finished: what is written last of all.
    Raises:
        FileNotFoundError: that is there, and the files are deleted.
        InputError: for too long no further one has appeared.
    """
    lacking = [i for i, file in enumerate(files) if not file.is_file()]
    since = time.monotonic()
    if not lacking:
        return
    with progress.stage(f"waiting for {', '.join(sorted({f'host {host_of(i)}' for i in lacking}))}"):
        while lacking:
            time.sleep(POLL_SECONDS)
            if finished.is_file() and finished not in files:
                raise FileNotFoundError(errno.ENOENT, "cleared away", str(files[lacking[0]]))
            still = [i for i in lacking if not files[i].is_file()]
            if len(still) < len(lacking):
                since = time.monotonic()
            elif time.monotonic() - since > workers.timeout:
                raise InputError(
                    f"Host {host_of(still[0])} of {workers.share.count} has not made {files[still[0]]} in "
                    f"{workers.timeout:.0f} seconds: start it, or run alone "
                    "(--distributed.coordinator none) to do its part here."
                )
            lacking = still
