"""v2t data: data sets that are too large to be read anew by every run."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from v2t_jax.cli.invert import open_embedder
from v2t_jax.config import ApiConfig, DistributedConfig
from v2t_jax.errors import InputError


@dataclass(frozen=True)
class Build:
    """Tokenize texts once, into a folder that recipes name as data.sources; run again, it goes on or checks every byte.

    Sources are files (.txt, .jsonl, .tsv, each also .gz, and .parquet), folders or globs of such, tfds:NAME:FIELD, or
    wordnet: MSMARCO's collection.tsv, DPR's psgs_w100.tsv and BEIR's corpus.jsonl are read as they are."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """files, folders or globs"""
    output: str
    """the folder to write"""
    embedder: str | None = None
    """the embedder whose pieces the texts are cut into: a name that `v2t embedders` lists, or a folder"""
    tokenizer: str | None = None
    """instead of it, a tokenizer.json"""
    vocabulary_size: int = 0
    """commonest pieces of the training texts to keep; texts with others are dropped; 0 keeps all"""
    held_out_share: float = 0.02
    """share of the texts kept from training; with millions of texts, 0.001 is enough"""
    max_tokens: int = 512
    """tokens of a text that are kept"""
    processes: int | None = None
    """at work; by default one for each core"""
    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        from v2t_jax.bench import num_cores
        from v2t_jax.data.build import BuildSettings, build
        from v2t_jax.data.vocabulary import read_tokenizer
        from v2t_jax.embedders.load import load_tokenizer

        if (self.embedder is None) == (self.tokenizer is None):
            raise InputError("Give either --embedder NAME or --tokenizer FILE: it decides the pieces.")
        settings = BuildSettings(self.vocabulary_size, self.held_out_share, self.max_tokens)
        processes = num_cores() if self.processes is None else self.processes
        if self.embedder is not None:
            tokenizer = load_tokenizer(self.embedder)
        else:
            tokenizer = read_tokenizer(Path(os.path.expanduser(str(self.tokenizer))))
        folder = Path(os.path.abspath(os.path.expanduser(self.output)))
        counts = build(self.sources, folder, tokenizer, settings, processes).manifest["counts"]
        if self.json:
            print(json.dumps({"folder": str(folder), **counts}))
            return
        dropped = sum(counts[name] for name in ("blank", "duplicates", "given_away", "unknown"))
        print(
            f"{folder}: {counts['rows']:,} texts for training, {counts['held_out']:,} held out, {dropped:,} of "
            f"{counts['texts']:,} dropped ({counts['blank']:,} blank, {counts['duplicates']:,} duplicates, "
            f"{counts['given_away']:,} that leak a held-out text, {counts['unknown']:,} with unknown tokens)\n"
            f"In a recipe: DataConfig(sources=({str(folder)!r},), held_out={str(folder)!r})"
        )


@dataclass(frozen=True)
class EmbedColumn:
    """Embed a built data set's texts once, as a column that recipes name as data.embeddings; run again, it goes on."""

    folder: tyro.conf.Positional[str]
    """the data set, by v2t data build"""
    name: str
    """of the column"""
    max_length: int
    """the recipe's model.max_length: of longer texts, the beginnings are embedded"""
    embedder: str = "all-MiniLM-L6-v2"
    """a name that `v2t embedders` lists, a folder, or an endpoint's base URL"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the arithmetic, as the recipe's embedder_dtype"""
    batch_size: int = 256
    """texts at a time, or in one request"""
    api: ApiConfig = field(default_factory=ApiConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def run(self) -> None:
        from v2t_jax.data.dataset import TokenDataset
        from v2t_jax.embedders.load import load_embedder
        from v2t_jax.parallel.processes import find_share
        from v2t_jax.train.precompute import embed_column

        dataset, share = TokenDataset.open(Path(os.path.expanduser(self.folder))), find_share(self.distributed)
        embedder = open_embedder(self.embedder, self.api)
        if isinstance(embedder, str):
            embedder = load_embedder(embedder, self.dtype)
        options: dict[str, Any] = {"max_length": self.max_length, "batch_size": self.batch_size, "share": share}
        done = embed_column(dataset, self.name, embedder, **options)
        _say(done, f'in a recipe: DataConfig(..., embeddings="{self.name}")')


@dataclass(frozen=True)
class Hypotheses:
    """Have inverters guess a built data set's texts once, as columns that recipes name as data.hypotheses."""

    folder: tyro.conf.Positional[str]
    """the data set, by v2t data build"""
    name: str
    """of the column; that of the guesses' embeddings is NAME.embedding"""
    model: tuple[str, ...]
    """a model that was trained on this data set; or one for each fold, in their order: each guesses the texts that it
    was trained without"""
    embedder: str | None = None
    """where the models' embedder lies, if not where it did; or an endpoint's base URL"""
    embeddings: str | None = None
    """column to read the texts' embeddings from; by default they are made on the fly"""
    batch_size: int = 256
    """texts at a time"""
    api: ApiConfig = field(default_factory=ApiConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def run(self) -> None:
        from v2t_jax.data.dataset import TokenDataset
        from v2t_jax.parallel.processes import find_share
        from v2t_jax.train.precompute import hypothesis_columns

        done = hypothesis_columns(
            TokenDataset.open(Path(os.path.expanduser(self.folder))),
            self.name,
            self.model,
            open_embedder(self.embedder, self.api),
            embeddings=self.embeddings,
            batch_size=self.batch_size,
            share=find_share(self.distributed),
        )
        _say(done, f'in a recipe: DataConfig(..., hypotheses="{self.name}")')


def _say(done: bool, how: str) -> None:
    print(f"The column is finished; {how}" if done else "This host's part is done; the others' isn't yet.")


@dataclass(frozen=True)
class Tfds:
    """Write a source as a TFDS data set (ArrayRecord, a field "text"), for programs that read those."""

    source: tyro.conf.Positional[str]
    """what v2t data build takes as one source"""
    output: str
    """TFDS's data directory"""
    name: str
    """of the data set"""

    def run(self) -> None:
        from v2t_jax.data.tfds import prepare_tfds

        folder = prepare_tfds(self.source, Path(os.path.expanduser(self.output)), self.name)
        print(f"{folder} is written; as a source it is tfds:{folder}:text")


@dataclass(frozen=True)
class Data:
    """Data sets at scale: build, embed, hypotheses, tfds."""

    command: Annotated[
        Annotated[Build, tyro.conf.subcommand("build", prefix_name=False)]
        | Annotated[EmbedColumn, tyro.conf.subcommand("embed", prefix_name=False)]
        | Annotated[Hypotheses, tyro.conf.subcommand("hypotheses", prefix_name=False)]
        | Annotated[Tfds, tyro.conf.subcommand("tfds", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        self.command.run()
