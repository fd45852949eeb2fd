"""The commands invert, embed, eval, calibrate and demo. The comment or docstring at an option is its help text."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from v2t_jax import progress
from v2t_jax.config import ApiConfig, DistributedConfig, is_endpoint
from v2t_jax.errors import InputError, check_texts
from v2t_jax.inversion.trace import show_trace

PACKAGED_MODEL = "minilm-wordnet"
# One batch, enough to show progress, done in two minutes on a laptop's two cores.
DEMO_TEXTS, DEMO_SHOWN, DEMO_STEPS, DEMO_BEAM, DEMO_BUDGET = 24, 3, 2, 4, 660
TABLE_ONLY = ("token_f1_sem", "cosine_sem")  # the fields of a report's row that `eval --json` leaves out


def open_embedder(name: str | None, api: ApiConfig) -> Any:
    """An endpoint's embedder for a URL; other names pass through, to `v2t_jax.load` and `load_embedder`."""
    if is_endpoint(name):
        from v2t_jax.embedders.black_box import HttpEmbedder

        return HttpEmbedder(name, api)
    if api != ApiConfig():
        raise InputError("The --api options are for endpoints; pass one's base URL, as in --embedder https://HOST/v1.")
    return name


def endpoint_options(name: str | None, api: ApiConfig) -> list[str]:
    """What gives an endpoint to another command; other embedders are found by what a model's folder says."""
    return ["--embedder", str(name), "--api.model", api.model] if is_endpoint(name) else []


def print_table(table: Table) -> None:
    """To stdout, in lines as long as need be: in a narrow terminal, or a pipe out of one, no figure is cut."""
    console = Console()
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=999), table).maximum)
    console.print(table)


@dataclass(frozen=True)
class Invert:
    """Recover texts from their embeddings, and show how each guess was corrected."""

    text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """a text to embed and then recover; can be repeated"""
    input: str | None = None  # file of texts, one per line, to embed and then recover; - is stdin
    embeddings: str | None = None
    """file of vectors, FILE or FILE:FIELD; .npy, .npz, .safetensors, .parquet, .arrow, .csv, .jsonl, .json; or a vector
    store: Chroma, Qdrant, LanceDB, FAISS, DuckDB, sqlite-vec, Milvus Lite, pgvector, by its file, folder or URL"""
    collection: str = ""  # of a vector store's several, NAME or NAME:FIELD
    ranges: str | None = None  # of int8 vectors: the file that v2t embed wrote beside them
    output: str | None = None
    """.jsonl or .parquet file to write, batch by batch; a stopped run goes on there. - prints JSON lines"""
    model: str = PACKAGED_MODEL  # name of a packaged model, or a model folder
    embedder: str | None = None  # the model's embedder, if it has moved: a folder, or an endpoint's base URL
    num_steps: int | None = None  # correction steps, by default 8, or 2 before edits; 0 returns the best first guess
    sequence_beam_width: int = 4  # hypotheses kept between steps
    search: Literal["corrector", "edits", "both"] | None = None
    """what proposes better texts; both: one, then the other; by default both, if the model has a ranker"""
    budget: int = 2000  # with edits: their rounds end at this many calls of the embedder for a text
    mode: Literal["best", "upstream"] = "best"  # best: the closest text ever seen; upstream: as vec2text selects
    batch_size: int | None = None  # vectors at a time; the default fits a small machine
    json: bool = False  # print a JSON document instead of a table
    api: ApiConfig = ApiConfig()
    distributed: DistributedConfig = DistributedConfig()

    def run(self) -> None:
        import jax

        from v2t_jax.data.readers import read_lines
        from v2t_jax.data.vector_file import Rows
        from v2t_jax.embedders.base import dequantize
        from v2t_jax.inversion import api, pipeline, stream, vectors
        from v2t_jax.parallel.processes import is_main
        from v2t_jax.stores import open_store

        if sum([bool(self.text), self.input is not None, self.embeddings is not None]) != 1:
            raise InputError("Pass one of --text TEXT, --input FILE and --embeddings FILE.")
        if self.output is not None and self.json:
            raise InputError("--json prints, and --output writes; pass one of them (--output - prints lines of JSON).")
        if self.output not in (None, "-"):
            stream.check_output(Path(self.output))
        if self.ranges is not None and self.embeddings is None:
            raise InputError("--ranges belongs to the int8 vectors of --embeddings; leave it out.")
        texts = list(self.text) if self.input is None else list(read_lines(self.input))
        check_texts(texts)
        store = None if self.embeddings is None else open_store(self.embeddings, self.collection)
        if store is not None and store.approximate:
            progress.note(f"{store.kind} holds approximate vectors: {store.approximate}")
        source = None if store is None else store.rows
        model = pipeline.load(self.model, open_embedder(self.embedder, self.api))
        width = model.config.embedding_width
        ranges = None if self.ranges is None else vectors.read_ranges(self.ranges, width)
        names = ("num_steps", "sequence_beam_width", "search", "budget", "mode", "batch_size")
        options = {name: getattr(self, name) for name in names}
        if source is not None:
            progress.note(f"{model.name} recovers texts of up to {model.config.max_length - 1} tokens")
        if self.output is not None:
            source = source or stream.texts_as_vectors(model, api.comparable(model, texts))
            if (count := jax.process_count()) > 1:
                source = source.share(jax.process_index(), count)
            if self.output == "-":
                for record, one in stream.recover_rows(model, source, ranges, **options):
                    print(stream.as_json(record, one), flush=True)
                return
            path = Path(self.output)
            if count > 1:  # each to its own
                path = path.with_stem(f"{path.stem}.{jax.process_index()}-of-{count}")
            print(f"{stream.recover_file(model, source, path, ranges, **options):,} rows -> {path}")
            return
        rows: Rows | None = None
        if source is None:
            found = api.invert_on_all_hosts(api.invert_strings, model, texts, **options)
        else:
            rows = source.whole()
            e = vectors.check_vectors(rows.vectors if ranges is None else dequantize(rows.vectors, ranges), width)
            found = api.invert_on_all_hosts(api.invert_embeddings, model, e, **options)
            found = [stream.compared(model, one, rows.texts and rows.texts[i]) for i, one in enumerate(found)]
            vectors.warn_of_long_texts(model, found)
        ids = None if rows is None else rows.ids
        if is_main() and self.json:
            records = [({} if ids is None else {"id": ids[i]}) | one.to_dict() for i, one in enumerate(found)]
            print(json.dumps(records, ensure_ascii=False, indent=1, default=str))
        elif is_main():
            for i, one in enumerate(found):
                show_trace(one, f"{i + 1} of {len(found)}" + (f": {ids[i]}" if ids else ""))


@dataclass(frozen=True)
class Embed:
    """Embed the lines of a text file; writes a .npy file [lines, E], or [lines, E / 8] for --precision binary."""

    input: str  # text file with one text per line, which may be a .gz file or a pipe, or - for stdin
    output: str  # the .npy file to write, or - for stdout
    embedder: str = "all-MiniLM-L6-v2"
    """a name that `v2t embedders` lists, a folder, NAME@FOLDER, ORG/NAME on the hub, or an endpoint's base URL"""
    dimensions: int | None = None  # keep only the first (Matryoshka), normalized again if the embedder normalizes
    precision: Literal["float32", "int8", "binary"] = "float32"  # int8 by dimensions' ranges here, binary by sign
    prefix: str | None = None  # prepended to every line; by default the embedder's own prefix for documents
    prompt: str | None = None  # the embedder's prompt of this name instead: query, document, or one that its folder has
    batch_size: int = 64  # texts per batch or request
    api: ApiConfig = ApiConfig()

    def run(self) -> None:
        import numpy as np

        from v2t_jax.data.readers import read_lines
        from v2t_jax.embedders.base import quantize, ranges_of
        from v2t_jax.embedders.load import load_embedder

        embedder = open_embedder(self.embedder, self.api)
        options: dict[str, Any] = {"dimensions": self.dimensions, "prefix": self.prefix, "prompt": self.prompt}
        if not isinstance(embedder, str) and any(value is not None for value in options.values()):
            advice = "pass --api.dimensions to an endpoint, and put prefixes into the file."
            raise InputError(f"--dimensions, --prefix and --prompt are for embedders that run here; {advice}")
        if self.precision == "int8" and self.output == "-":
            raise InputError("--precision int8 writes the ranges beside the vectors; name a file with --output.")
        lines = list(read_lines(self.input))
        with replaced(self.output, self.input) as file:  # opened before hours of embedding
            if isinstance(embedder, str):
                embedder = load_embedder(embedder, **options)
                prefixed = [embedder.config.prefix + line for line in lines]
                if cut := sum(bool(row.overflowing) for row in embedder.tokenizer.encode_batch(prefixed)):
                    longest = embedder.config.max_length
                    progress.note(f"{cut} of {len(lines)} texts are cut to {longest} tokens, {embedder.name}'s maximum")
            vectors = embedder.embed(lines, self.batch_size)
            if self.precision == "int8":
                output = Path(self.output)
                ranges = output.with_name(output.name.removesuffix(".npy") + ".ranges.npy")
                np.save(ranges, ranges_of(vectors))
                progress.note(f"the dimensions' ranges, which v2t invert --ranges needs, are in {ranges}")
                if len(lines) < 100:
                    progress.note(f"int8 splits the range of each dimension, which {len(lines)} texts hardly show")
            vectors = quantize(vectors, self.precision)
            np.save(file, vectors)  # to a file, not a path: numpy would append .npy to that
        piped = self.output == "-"
        said = f"{len(lines)} vectors of width {vectors.shape[1]} -> {'stdout' if piped else self.output}"
        print(said, file=sys.stderr if piped else sys.stdout)


@contextlib.contextmanager
def replaced(name: str, source: str) -> Iterator[BinaryIO]:
    """A file to write that replaces `name`, or what that links to, at the end of the block; never `source` itself.

    For "-" it goes to stdout then.
    """
    if name == "-":  # by way of a file, because numpy asks for the position in what it writes to
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout.buffer)
        return
    output = Path(name).resolve()
    if not name or (output.exists() and not output.is_file()):
        raise InputError(f"The output {name!r} is a folder or a device; give the name of a .npy file, or - for stdout.")
    if output.exists() and source != "-" and output.samefile(source):
        raise InputError(f"The output {name!r} is the input itself, which would be lost; give another name.")
    part = output.with_name(f"{output.name}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Eval:
    """Score a model on held-out texts, for several numbers of correction steps and beam widths."""

    model: str = PACKAGED_MODEL  # name of a packaged model, or a model folder
    embedder: str | None = None  # the model's embedder, if it has moved: a folder, or an endpoint's base URL
    split: str = "held_out"  # held_out or train
    num_steps: tuple[int, ...] | None = None  # correction steps; by default 0, and as many as v2t invert takes
    sequence_beam_width: tuple[int, ...] = (4,)  # hypotheses kept between steps
    search: Literal["corrector", "edits", "both"] | None = None
    """what proposes better texts; both: one, then the other; by default both, if the model has a ranker"""
    budget: tuple[int, ...] = (2000,)  # with edits: calls of the embedder for a text at which their rounds end
    limit: int | None = 200  # maximum number of texts
    source: str = "wordnet"  # source of the texts, as in a recipe's data.sources
    plot: str | None = None  # .png, .pdf or .svg file to write, with exact match and BLEU by the embedder's calls
    json: bool = False  # print a JSON document instead of a table
    api: ApiConfig = ApiConfig()
    distributed: DistributedConfig = DistributedConfig()

    def run(self) -> None:
        from v2t_jax.eval.evaluate import check_grid, check_plot_file, evaluate, evaluation_texts, plot, table
        from v2t_jax.inversion.pipeline import load
        from v2t_jax.parallel.processes import is_main

        check_grid((0,) if self.num_steps is None else self.num_steps, self.sequence_beam_width, self.budget)
        if self.plot is not None:
            check_plot_file(Path(self.plot))
        inverter = load(self.model, open_embedder(self.embedder, self.api))
        texts = evaluation_texts(inverter, self.split, self.limit, self.source)
        grid = self.num_steps, self.sequence_beam_width
        report = evaluate(inverter, texts, *grid, self.split, self.search, self.budget)
        if not is_main():
            return
        if self.plot is not None:
            plot(report, Path(self.plot))
        if self.json:
            rows = [{name: row[name] for name in row if name not in TABLE_ONLY} for row in report["rows"]]
            print(json.dumps(report | {"rows": rows}, ensure_ascii=False, indent=1))
        else:
            print_table(table(report))


@dataclass(frozen=True)
class Calibrate:
    """Learn how likely a model's texts are exact, from held-out texts, and store that in the model's folder."""

    model: Annotated[str, tyro.conf.Positional]  # the model's folder
    embedder: str | None = None  # the model's embedder, if it has moved: a folder, or an endpoint's base URL
    limit: int = 200  # maximum number of texts
    source: str = "wordnet"  # source of the texts, as in a recipe's data.sources
    noise: tuple[float, ...] = (0.0, 0.003, 0.01, 0.03)
    """on the embeddings, as shares of their length; the texts take these in turn; int8 vectors are off by about 0.01"""
    budget: int = 2000  # calls of the embedder for a text at which rounds of edits end
    plot: str | None = None  # .png, .pdf or .svg file to write, with the share of exact texts by the probability given
    api: ApiConfig = ApiConfig()

    def run(self) -> None:
        from v2t_jax.eval import calibrate
        from v2t_jax.eval.evaluate import check_plot_file, evaluation_texts
        from v2t_jax.inversion.pipeline import load

        folder = Path(self.model)
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"There is no model folder {self.model!r} to write to; give that of a model here.")
        if self.plot is not None:
            check_plot_file(Path(self.plot))
        inverter = load(self.model, open_embedder(self.embedder, self.api))
        texts = evaluation_texts(inverter, limit=self.limit, source=self.source)
        weights, report = calibrate.calibrate(inverter, texts, self.noise, budget=self.budget)
        calibrate.store(folder, weights, report)
        if self.plot is not None:
            calibrate.plot_reliability(report, Path(self.plot))
        print(json.dumps(report, indent=1))


@dataclass(frozen=True)
class Demo:
    """Recover held-out sentences from their embeddings step by step; print a table and write a plot."""

    text: str | None = None  # recover this sentence instead
    plot: str = "demo.png"  # .png, .pdf or .svg file to write

    def run(self) -> None:
        from v2t_jax.eval.evaluate import check_plot_file, evaluation_texts, plot, report, table
        from v2t_jax.inversion.api import invert_strings
        from v2t_jax.inversion.pipeline import load

        own = [] if self.text is None else [self.text]
        check_texts(own)
        check_plot_file(Path(self.plot))
        inverter = load()
        texts = own or evaluation_texts(inverter, limit=DEMO_TEXTS)
        options: dict[str, Any] = {"num_steps": DEMO_STEPS, "sequence_beam_width": DEMO_BEAM, "batch_size": DEMO_TEXTS}
        found = invert_strings(inverter, texts, search="both", budget=DEMO_BUDGET, **options)
        # Those that are exact first, the longest of them; then the closest.
        order = [(one.exact_match, len(one.text) if one.exact_match else one.cosine, i) for i, one in enumerate(found)]
        for *_, i in sorted(order, reverse=True)[:DEMO_SHOWN]:
            show_trace(found[i], f"text {i + 1} of {len(found)}")
        every = range(len(found[0].trace))
        scores = report(inverter, found, every, DEMO_BEAM, "your own" if own else "held_out", DEMO_STEPS)
        print_table(table(scores))
        plot(scores, Path(self.plot))
        if len(found) > DEMO_SHOWN:
            print(f"The {DEMO_SHOWN} longest exact ones are shown, or closest; the table is over all {len(found)}.")
        print(f'The plot is in {self.plot}. Try a sentence of your own: make demo TEXT="..."')
