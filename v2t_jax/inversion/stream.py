"""Recovers a file of vectors batch by batch, into a file if need be: what is written stays, a stopped job goes on.

OUT.jsonl       an object a vector, in the order of the input
OUT.parquet     the same as a table; until all is done, OUT.parquet.jsonl
....job         beside either, while it is incomplete: what it is being made of
"""

import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from v2t_jax import progress
from v2t_jax.data.dataset import resumable, write_json
from v2t_jax.data.vector_file import Rows, VectorFile, is_text
from v2t_jax.embedders.base import dequantize, is_signed
from v2t_jax.errors import InputError
from v2t_jax.inversion.api import InversionResult, embed_decoded, invert_batches
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.vectors import as_targets, warn_of_foreign_vectors, warn_of_long_texts

WRITTEN = ("text", "cosine", "step", "runner_up", "confidence", "reference", "exact_match")  # of each result
JUDGED = 64  # results by which it is told whether the texts are too long
PARQUET_ROWS = 10_000  # that are put into a table at a time


def texts_as_vectors(inverter: InversionPipeline, texts: list[str]) -> VectorFile:
    """Texts in place of a file of vectors: they are embedded as they are needed."""

    sha256 = hashlib.sha256("\n".join(texts).encode()).hexdigest()

    def read(start: int) -> Iterator[Rows]:
        for first in range(start, len(texts), 256):
            part = texts[first : first + 256]
            yield Rows(embed_decoded(inverter, part), None, part)

    return VectorFile(f"{len(texts)} texts ({sha256[:12]})", len(texts), read)


def recover_rows(
    inverter: InversionPipeline,
    source: VectorFile,
    ranges: np.ndarray | None = None,
    start: int = 0,
    **options: Any,
) -> Iterator[tuple[dict[str, Any], InversionResult | None]]:
    """Every row from `start` on, {"row", and "id" and "original" text if it has them}, with its result.

    Texts beside the vectors become the results' references. A row that can't be an embedding has no result but "error".

    Args:
        ranges: of int8 vectors [2, E].
        options: of `invert_embeddings`.
    """
    held: deque[tuple[Rows, np.ndarray, dict[int, str]]] = deque()
    row, first_results = source.first + start, list[InversionResult]()

    def targets(size: int) -> Iterator[np.ndarray]:
        judged, signed = False, None
        for rows in source.batches(size, start):
            if signed is None:
                signed = is_signed(rows.vectors)
            vectors = rows.vectors if ranges is None else dequantize(rows.vectors, ranges, signed)
            e, faults = as_targets(vectors, inverter.config.embedding_width)
            good = e[[i for i in range(len(e)) if i not in faults]]
            held.append((rows, good, faults))
            if len(good):
                if not judged:
                    warn_of_foreign_vectors(inverter, good)
                judged = True
                yield good

    def described(rows: Rows, faults: dict[int, str], found: list[InversionResult]) -> Iterator[Any]:
        nonlocal row
        results = iter(found)
        for i in range(len(rows.vectors)):
            text = rows.texts and rows.texts[i]
            beside = {"id": rows.ids and rows.ids[i], "original": text if is_text(text) else None}
            record = {"row": row} | {name: value for name, value in beside.items() if value is not None}
            row += 1
            if i in faults:
                yield record | {"error": faults[i]}, None
                continue
            one = compared(inverter, next(results), text)
            if len(first_results) < JUDGED:
                first_results.append(one)
                if len(first_results) == JUDGED:
                    warn_of_long_texts(inverter, first_results)
            yield record, one

    for found in invert_batches(inverter, targets, source.count, start=start, **options):
        while held:  # batches of which nothing was good come with the next one
            rows, good, faults = held.popleft()
            yield from described(rows, faults, found if len(good) else [])
    while held:
        rows, _, faults = held.popleft()
        yield from described(rows, faults, [])
    if len(first_results) < JUDGED:
        warn_of_long_texts(inverter, first_results)


def compared(inverter: InversionPipeline, found: InversionResult, text: Any) -> InversionResult:
    """A result with its text's normal form as reference, if the text is known."""
    if not is_text(text):
        return found
    reference = inverter.vocabulary.normalize([text], len(text.encode()) + 2)[0]
    return dataclasses.replace(found, reference=reference, exact_match=found.text == reference)


def as_json(record: dict[str, Any], found: InversionResult | None) -> str:
    """A row's line, without the trace."""
    values = {} if found is None else {k: v for k, v in found.to_dict().items() if k in WRITTEN}
    return json.dumps(record | values, ensure_ascii=False, default=str)


def check_output(output: Path) -> None:
    """Refuses a file that results can't be written to, before any work is done."""
    if output.suffix not in (".jsonl", ".parquet"):
        raise InputError(
            f"The output {str(output)!r} is of no known kind; give a name that ends in .jsonl or .parquet."
        )


def recover_file(
    inverter: InversionPipeline, source: VectorFile, output: Path, ranges: np.ndarray | None = None, **options: Any
) -> int:
    """`recover_rows` into a file, .jsonl or .parquet; returns how many rows it holds.

    What is recovered is on disk before the next batch begins. Called again after it was stopped, it goes on.

    Raises:
        InputError: an output that exists, or that is being made of something else.
    """
    check_output(output)
    lines = output if output.suffix == ".jsonl" else output.with_name(f"{output.name}.jsonl")
    job = lines.with_name(f"{lines.name}.job")
    given = Path(source.path).absolute()
    made_of: dict[str, Any] = {"model": [inverter.name, *inverter.sha256]}
    made_of |= {"embedder": inverter.embedder.identity.to_dict(), "field": source.field}
    made_of |= {"input": [str(given), given.stat().st_size, given.stat().st_mtime] if given.exists() else source.path}
    made_of |= {"first": source.first, "ranges": None if ranges is None else ranges.tolist()}
    made_of |= {name: value for name, value in options.items() if name != "batch_size"}
    with resumable(f"Recovering {source.path}", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        written = [file for file in (output, lines) if file.exists() and file.stat().st_size]
        if written and not job.exists():  # an empty file is of a run that was stopped before its first row
            raise InputError(f"{written[0]} exists; give another name, or delete it.")
        with open(lines, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"Another process is writing {lines}; wait for it, or give another name.") from error
            done = _whole_lines(file)
            if done and json.loads(job.read_bytes()) != json.loads(json.dumps(made_of)):
                raise InputError(
                    f"{output} is being made of something else (see {job}); give another name or delete both."
                )
            write_json(job, made_of)
            if done:
                progress.note(f"{done:,} rows of {lines} are there already; going on")
            for record, one in recover_rows(inverter, source, ranges, done, **options):
                file.write(f"{as_json(record, one)}\n".encode())
                file.flush()
                done += 1
            os.fsync(file.fileno())
        if output != lines:
            _as_parquet(lines, output)
        job.unlink()
        if output != lines:
            lines.unlink()
    return done


def _whole_lines(file: BinaryIO) -> int:
    """How many lines were written; what a kill has left of another one is cut off."""
    file.seek(0)
    count = end = 0
    for line in file:
        if line.endswith(b"\n"):
            count, end = count + 1, end + len(line)
    file.truncate(end)
    return count


def _as_parquet(lines: Path, output: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    types = dict.fromkeys(("id", "original", "text", "reference", "error"), pa.string()) | {"row": pa.int64()}
    types |= dict.fromkeys(("cosine", "runner_up", "confidence"), pa.float64())
    types |= {"step": pa.int32(), "exact_match": pa.bool_()}
    part = output.with_name(f"{output.name}.part")
    with lines.open("rb") as file, parquet.ParquetWriter(part, schema := pa.schema(types)) as writer:
        while rows := [json.loads(line) for line in itertools.islice(file, PARQUET_ROWS)]:
            typed = [{k: str(v) if k in ("id", "original") else v for k, v in row.items()} for row in rows]
            writer.write(pa.RecordBatch.from_pylist(typed, schema))
    part.replace(output)
