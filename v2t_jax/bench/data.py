"""Times the input pipeline: a data set on disk, batches on the device.

Texts made of the packaged corpus are built into a data set by `v2t data build`'s own code; then every batch is read,
put on the device and waited for. The files may be in the operating system's cache.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from v2t_jax.bench import num_cores
from v2t_jax.config import BuildSettings
from v2t_jax.data.batches import Batches, Batching
from v2t_jax.data.build import build
from v2t_jax.data.columns import Column, ColumnWriter, open_column
from v2t_jax.data.dataset import TokenDataset
from v2t_jax.data.readers import open_source
from v2t_jax.embedders.load import load_tokenizer
from v2t_jax.errors import InputError


@dataclass(frozen=True)
class Data:
    """Time a built data set's way from disk to device, without vectors and with them."""

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
    """whose tokenizer is used"""
    folder: str | None = None
    """where the data set is built, or found from an earlier run; by default a temporary folder"""
    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        if min(self.num_texts, self.batch_size, self.bucket_width) < 1 or self.max_length < 4:
            raise InputError("num_texts, batch_size and bucket_width must be at least 1, max_length at least 4.")
        with tempfile.TemporaryDirectory() as temporary:
            report = self.timed(Path(self.folder or temporary))
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

    def timed(self, folder: Path) -> dict[str, Any]:
        """Builds (or finds) the data set and times it."""
        source = folder / "texts.txt"
        if not source.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_texts(source, self.num_texts)
        began = time.perf_counter()
        tokenizer = load_tokenizer(self.embedder)
        dataset = build([str(source)], folder / "built", tokenizer, BuildSettings(), processes=num_cores())
        seconds = time.perf_counter() - began
        lengths = tuple(sorted(range(self.max_length, 3, -self.bucket_width)))
        batching = Batching(self.batch_size, self.max_length, lengths)
        results = [measure(dataset, batching, self.steps, ())]
        if self.vector_width:
            results.append(measure(dataset, batching, self.steps, (write_vectors(dataset, self.vector_width),)))
        return {
            "cores": num_cores(),
            "texts": dataset.manifest["counts"]["rows"],
            "build_texts_per_second": round(self.num_texts / seconds),
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "vector_width": self.vector_width,
            "results": results,
        }


def write_texts(file: Path, count: int) -> None:
    """The packaged texts again and again, each time with another number inside, so that none is a duplicate."""
    texts = list(open_source("wordnet"))
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            # In the middle: with the same beginning, a text would leak a held-out one by eight words in a row.
            words = texts[i % len(texts)].split()
            out.write(" ".join([*words[: len(words) // 2], str(i // len(texts)), *words[len(words) // 2 :]]) + "\n")


def write_vectors(dataset: TokenDataset, width: int) -> Column:
    """A column "bench" of random float16 vectors."""
    writer, rng = ColumnWriter(dataset, "bench", "float16", (width,), {"seed": 0}), np.random.default_rng(0)
    for piece in writer.missing():
        rows = writer.rows(piece)
        writer.write(piece, rng.standard_normal((rows.stop - rows.start, width), np.float32))
    writer.finish()
    return open_column(dataset, "bench")


def measure(dataset: TokenDataset, batching: Batching, steps: int, columns: tuple[Column, ...]) -> dict[str, Any]:
    """Examples a second from disk to the device over an epoch or `steps`, the first batch's wait included."""
    batches = Batches([dataset], batching, columns=columns)
    examples = positions = tokens = 0
    began = time.perf_counter()
    for step in range(steps or batches.steps_per_epoch):
        ids = batches(step)
        jax.block_until_ready(jax.device_put((ids, batches.columns(step))))
        examples, positions, tokens = examples + len(ids), positions + ids.size, tokens + int((ids != 0).sum())
    seconds = time.perf_counter() - began
    batches.close()
    return {
        "columns": [column.name for column in columns],
        "examples": examples,
        "seconds": round(seconds, 3),
        "examples_per_second": round(examples / seconds),
        "padding_share": round(1 - tokens / positions, 4),
    }
