"""Times the input pipeline: a data set on disk, batches on the device.

Texts made of the packaged corpus are built into a data set by `v2t data build`'s own code; then every batch is read,
put on the device and waited for. The files may be in the operating system's cache.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from v2t_jax.bench.command import Measurement
from v2t_jax.bench.measure import Row, num_cores, row_of, turn
from v2t_jax.config import BuildSettings
from v2t_jax.data.batches import Batches, Batching
from v2t_jax.data.build import build
from v2t_jax.data.columns import Column, ColumnWriter, open_column
from v2t_jax.data.dataset import TokenDataset
from v2t_jax.data.readers import open_source
from v2t_jax.embedders.load import load_tokenizer
from v2t_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Data(Measurement):
    """Time a built data set's way from disk to device, without vectors and with them."""

    num_texts: int = 400_000
    batch_size: int = 1024
    max_length: int = 32  # tokens of a row, its end token included
    bucket_width: int = 2  # tokens between two row lengths
    vector_width: int = 768  # of the float16 vector beside each text; 0 leaves this part out
    steps: int = 0  # batches to time; 0 times an epoch
    embedder: str = "all-MiniLM-L6-v2"  # whose tokenizer is used
    folder: str | None = (
        None  # where the data set is built, or found from an earlier run; by default a temporary folder
    )

    def rows(self) -> Iterator[Row]:
        if min(self.num_texts, self.batch_size, self.bucket_width) < 1 or self.max_length < 4:
            raise InputError("num_texts, batch_size and bucket_width must be at least 1, max_length at least 4.")
        with tempfile.TemporaryDirectory() as temporary:
            dataset, row = self.built(Path(self.folder or temporary))
            yield row
            yield self.read(dataset)
            if self.vector_width:
                yield self.read(dataset, write_vectors(dataset, self.vector_width))

    def built(self, folder: Path) -> tuple[TokenDataset, Row]:
        """Builds the data set, or finds it; once, since that takes long."""
        source, tokenizer = folder / "texts.txt", load_tokenizer(self.embedder)
        if not source.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_texts(source, self.num_texts)
        found: list[TokenDataset] = []
        target, cores = folder / "built", num_cores()
        took = turn(lambda: found.append(build([str(source)], target, tokenizer, BuildSettings(), cores)))
        return found[0], row_of(f"building {len(found[0])} texts", [took], self.num_texts)

    def read(self, dataset: TokenDataset, *columns: Column) -> Row:
        """From disk to the device over an epoch or `steps`, the first batch's wait included."""
        lengths = tuple(sorted(range(self.max_length, 3, -self.bucket_width)))
        batches = Batches([dataset], Batching(self.batch_size, self.max_length, lengths), columns=columns)
        sizes: dict[int, tuple[int, int, int]] = {}

        def run() -> None:
            for step in range(self.steps or batches.steps_per_epoch):
                ids = batches(step)
                jax.block_until_ready(jax.device_put((ids, batches.columns(step))))
                sizes[step] = len(ids), ids.size, int(np.count_nonzero(ids))

        turns = [turn(run) for _ in range(self.repeats)]
        batches.close()
        rows, positions, tokens = (sum(size) for size in zip(*sizes.values(), strict=True))
        with_vectors = f"with float16 vectors of {self.vector_width}" if columns else "without vectors"
        name = f"disk to device, {rows} texts {with_vectors}, padding {1 - tokens / positions:.1%}"
        return row_of(name, turns, rows, tokens)


def write_texts(file: Path, count: int) -> None:
    """The packaged texts again and again, each time with another number inside, so that none is a duplicate."""
    texts = [text.split() for text in open_source("wordnet")]
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            # In the middle: with the same beginning, a text would leak a held-out one by eight words in a row.
            words = texts[i % len(texts)]
            middle = len(words) // 2
            print(*words[:middle], i // len(texts), *words[middle:], file=out)


def write_vectors(dataset: TokenDataset, width: int) -> Column:
    """A column "bench" of random float16 vectors."""
    writer, rng = ColumnWriter(dataset, "bench", "float16", (width,), {"seed": 0}), np.random.default_rng(0)
    for piece in writer.missing():
        rows = writer.rows(piece)
        writer.write(piece, rng.standard_normal((rows.stop - rows.start, width), np.float32))
    writer.finish()
    return open_column(dataset, "bench")
