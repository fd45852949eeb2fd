"""How fast a built data set becomes batches on the device: v2t bench data

WordNet's texts, over and over with a number in front, are built into a data set by `v2t data build`'s own code; then
every batch is read through `StoredBatches`, put on the device and waited for. The files may be in the operating
system's cache: on the disk of a training machine, a run reads them at a few megabytes a second.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from v2t_jax.bench import num_cores
from v2t_jax.data.batches import Batching
from v2t_jax.data.blocks import ColumnWriter, StoredTexts
from v2t_jax.data.build import BuildSettings, Workers, build
from v2t_jax.data.dataset import StoredBatches
from v2t_jax.data.readers import open_source
from v2t_jax.embedders.load import load_tokenizer
from v2t_jax.errors import InputError


@dataclass(frozen=True)
class Data:
    """Times a built data set's way from disk to device, without vectors and with."""

    num_texts: int = 400_000
    batch_size: int = 1024
    max_length: int = 32
    """tokens of a row, its end token included"""
    bucket_width: int = 2
    """tokens between two row lengths"""
    vector_width: int = 768
    """of the float16 vector beside each text; 0 leaves this part out"""
    steps: int = 0
    """batches to time; 0 times an epoch"""
    embedder: str = "all-MiniLM-L6-v2"
    """whose pieces the texts are cut into"""
    folder: str | None = None
    """where the data set is built, or lies since the last time; by default in a folder that is removed"""
    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(self.folder or temporary)
            folder.mkdir(parents=True, exist_ok=True)
            report = timed(self, folder)
        if self.json:
            print(json.dumps(report))
            return
        print(
            f"{report['cores']} cores, {report['texts']:,} texts, batches of {report['batch_size']} x "
            f"{report['max_length']} tokens at most; built at {report['build_texts_per_second']:,} texts/s"
        )
        for result in report["results"]:
            what = f"with float16 vectors of {report['vector_width']}" if result["columns"] else "without vectors"
            print(
                f"{what}: {result['examples_per_second']:,} examples/s from disk to device "
                f"({result['examples']:,} in {result['seconds']} s), padding {result['padding_share']:.1%}"
            )


def write_texts(file: Path, count: int) -> None:
    """WordNet's texts again and again, each time after another number, so that none is a duplicate."""
    texts = list(open_source("wordnet").read(lambda _: None))
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            # Not at the end: what gives a held-out text away, its words in a row, would be everywhere.
            words = texts[i % len(texts)].split()
            out.write(" ".join([*words[: len(words) // 2], str(i // len(texts)), *words[len(words) // 2 :]]) + "\n")


def write_vectors(stored: StoredTexts, width: int) -> None:
    """Random vectors under the name "bench"."""
    writer = ColumnWriter(stored, "bench", "float16", (width,), {"seed": 0})
    rng = np.random.default_rng(0)

    def blocks(shard: int) -> Iterator[np.ndarray]:
        for rows in stored.block_rows[stored.first_block[shard] : stored.first_block[shard + 1]]:
            yield rng.standard_normal((rows, width), np.float32)

    for shard in writer.missing():
        writer.write(shard, blocks(shard))
    writer.finish()


def measure(stored: StoredTexts, batching: Batching, steps: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """Examples a second from disk to the device over an epoch or `steps`, the first batch's wait included."""
    batches = StoredBatches(stored, batching, [stored.column(name) for name in columns])
    steps = steps or batches.steps_per_epoch
    examples = positions = tokens = 0
    began = time.perf_counter()
    for step in range(steps):
        ids = batches(step)
        jax.block_until_ready(jax.device_put((ids, batches.columns(step))))
        examples, positions, tokens = examples + len(ids), positions + ids.size, tokens + int((ids != 0).sum())
    seconds = time.perf_counter() - began
    batches.close()
    return {
        "columns": list(columns),
        "examples": examples,
        "seconds": round(seconds, 3),
        "examples_per_second": round(examples / seconds),
        "padding_share": round(1 - tokens / positions, 4),
    }


def timed(options: Data, folder: Path) -> dict[str, Any]:
    """Builds (or finds) the data set and times it.

    Raises:
        InputError: an option is out of range.
    """
    if min(options.num_texts, options.bucket_width) < 1 or options.max_length < 4:
        raise InputError("num_texts and bucket_width must be at least 1, max_length at least 4.")
    source = folder / "texts.txt"
    if not source.is_file():
        write_texts(source, options.num_texts)
    began = time.perf_counter()
    settings = BuildSettings(chunk_bytes=2 << 20, shard_bytes=8 << 20)
    tokenizer = load_tokenizer(options.embedder)
    stored = build([str(source)], folder / "built", tokenizer, settings, Workers(processes=num_cores()))
    seconds = time.perf_counter() - began
    lengths = tuple(sorted({*range(options.max_length, 3, -options.bucket_width)}))
    batching = Batching(options.batch_size, options.max_length, lengths)
    results = [measure(stored, batching, options.steps, ())]
    if options.vector_width:
        write_vectors(stored, options.vector_width)
        results.append(measure(stored, batching, options.steps, ("bench",)))
    return {
        "cores": num_cores(),
        "texts": stored.manifest["counts"]["rows"],
        "build_texts_per_second": round(options.num_texts / seconds),
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "vector_width": options.vector_width,
        "results": results,
    }
