"""What each command does: a dataclass of its options, documented for `--help`, and `run`."""

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from v2t_jax import progress
from v2t_jax.config import ApiConfig
from v2t_jax.errors import InputError, check_texts
from v2t_jax.trace import show_trace

PACKAGED_MODEL = "minilm-wordnet"
# Enough work for one batch to be seen moving, and little enough for two minutes on a laptop's two cores.
DEMO_TEXTS, DEMO_SHOWN, DEMO_STEPS, DEMO_BEAM = 24, 3, 8, 4
# The documented fields of a row of `eval --json`; the table for people has the other standard errors too.
JSON_ROW = (
    *("num_steps", "sequence_beam_width", "bleu", "bleu_sem", "token_f1", "exact_match", "exact_match_sem"),
    *("cosine", "texts_per_second"),
)


def open_embedder(name: str | None, api: ApiConfig) -> Any:
    """An endpoint by its base URL; other names are left to `v2t_jax.load` and `load_embedder`."""
    if name is not None and "://" in name:
        from v2t_jax.blackbox import HttpEmbedder

        return HttpEmbedder(name, api)
    if api != ApiConfig():
        raise InputError("The --api options need an endpoint: give its base URL, --embedder https://HOST/v1.")
    return name


@dataclass(frozen=True)
class Invert:
    """Recover texts from their embeddings; shows how each guess was corrected."""

    text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """a text to embed and then recover; may be given several times"""
    embeddings: str | None = None
    """a .npy file of vectors [n, E] to recover"""
    model: str = PACKAGED_MODEL
    """a packaged model's name, or a model folder"""
    embedder: str | None = None
    """where the model's embedder lies, if not where it did when the model was made; or an endpoint's base URL"""
    num_steps: int = 8
    """correction steps; 0 gives the nearest first guess"""
    sequence_beam_width: int = 4
    """hypotheses kept between steps"""
    mode: Literal["best", "upstream"] = "best"
    """best keeps the closest text ever seen; upstream selects as the original does"""
    batch_size: int | None = None
    """vectors at a time; by default what fits a small machine"""
    json: bool = False
    """print one JSON document and nothing else"""
    api: ApiConfig = field(default_factory=ApiConfig)

    def run(self) -> None:
        from v2t_jax.invert import invert_embeddings, invert_strings, read_vectors
        from v2t_jax.pretrained import load

        if bool(self.text) == (self.embeddings is not None):
            raise InputError("Give either --text TEXT or --embeddings FILE.npy.")
        check_texts(self.text)
        vectors = read_vectors(self.embeddings) if self.embeddings is not None else None
        inverter = load(self.model, open_embedder(self.embedder, self.api))
        options: dict[str, Any] = {
            "num_steps": self.num_steps,
            "sequence_beam_width": self.sequence_beam_width,
            "mode": self.mode,
            "batch_size": self.batch_size,
        }
        if vectors is None:
            found = invert_strings(inverter, list(self.text), **options)
        else:
            found = invert_embeddings(inverter, vectors, **options)
        if self.json:
            print(json.dumps([one.to_dict() for one in found], ensure_ascii=False, indent=1))
        else:
            for i, one in enumerate(found):
                show_trace(one, f"{i + 1} of {len(found)}")


@dataclass(frozen=True)
class Embed:
    """Embed the lines of a text file; writes a .npy file [lines, E], or [lines, E / 8] for --precision binary."""

    input: str
    """text file, a text a line"""
    output: str
    """the .npy file to write"""
    embedder: str = "all-MiniLM-L6-v2"
    """a name that `v2t embedders` lists, a folder, NAME@FOLDER, ORG/NAME on the hub, or an endpoint's base URL"""
    dimensions: int | None = None
    """keep the first ones only (Matryoshka), brought to length 1 again where the embedder does that"""
    precision: Literal["float32", "int8", "binary"] = "float32"
    """as a vector store keeps them: int8 by each dimension's range in this file, binary by its signs"""
    prefix: str | None = None
    """put before every line; by default the embedder's own for stored documents"""
    batch_size: int = 64
    """texts at a time, or in one request"""
    api: ApiConfig = field(default_factory=ApiConfig)

    def run(self) -> None:
        import numpy as np

        from v2t_jax.interop.sentence_transformers import load_embedder
        from v2t_jax.models.embedder import quantise

        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; give at least 1.")
        embedder = open_embedder(self.embedder, self.api)
        if not isinstance(embedder, str) and (self.dimensions is not None or self.prefix is not None):
            raise InputError(
                "--dimensions and --prefix are for embedders that run here: ask an endpoint for --api.dimensions, and "
                "put a prefix before the lines yourself."
            )
        try:
            content = Path(self.input).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise InputError(f"{self.input} can't be read ({error.strerror}); give a file, a text a line.") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.input} is not UTF-8 text ({error.reason}); convert it first.") from error
        if not content.strip():
            raise InputError(f"{self.input} is empty; give a text a line.")
        lines = content.removesuffix("\n").split("\n")  # splitlines() would also cut at form feeds and the like
        check_texts(lines, "Line")
        output = Path(self.output).resolve()  # what a link points to is replaced, not the link
        if not self.output or (output.exists() and not output.is_file()):
            raise InputError(f"The output {self.output!r} is a folder or a device; give the name of a .npy file.")
        part = output.with_name(f"{output.name}.part")
        try:
            with part.open("wb") as file:  # opened first: nobody embeds for an hour to learn that it can't be saved
                if isinstance(embedder, str):
                    embedder = load_embedder(embedder, dimensions=self.dimensions, prefix=self.prefix)
                    longest = embedder.config.max_length
                    prefixed = [embedder.config.prefix + line for line in lines]
                    cut = sum(bool(row.overflowing) for row in embedder.tokenizer.encode_batch(prefixed))
                    if cut:
                        progress.note(
                            f"{cut} of {len(lines)} texts are cut to the {longest} tokens that {embedder.name} takes"
                        )
                vectors = quantise(embedder.embed(lines, self.batch_size), self.precision)
                if self.precision == "int8" and len(lines) < 100:
                    progress.note(f"int8 cuts the range of each dimension; {len(lines)} texts say little about it")
                np.save(file, vectors)  # to a file, not a path: that would get .npy appended
            part.replace(output)
        except OSError as error:
            raise InputError(f"{self.output} can't be written ({error.strerror}); give another place.") from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
        print(f"{len(lines)} vectors of width {vectors.shape[1]} -> {self.output}")


@dataclass(frozen=True)
class Embedders:
    """List the embedders known by name: pooling, normalisation, prefix, licence, width and maximum length."""

    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        from rich.table import Table

        from v2t_jax.interop.embedders import KNOWN

        if self.json:
            hidden = ("packages", "raw")
            rows = [{"name": name, **dataclasses.asdict(known)} for name, known in KNOWN.items()]
            print(json.dumps([{k: v for k, v in row.items() if k not in hidden} for row in rows], indent=1))
            return
        table = Table(caption="Prefixes: before stored documents / before queries. v2t embeds texts as documents.")
        table.add_column("name", no_wrap=True)
        table.add_column("on the hub", no_wrap=True)
        for column in ("width", "tokens"):
            table.add_column(column, justify="right")
        for column in ("pooling", "L2", "licence"):
            table.add_column(column, no_wrap=True)
        table.add_column("prefixes", overflow="fold")
        for name, known in KNOWN.items():
            prefixes = " / ".join(escape(repr(p)) if p else "-" for p in (known.document_prefix, known.query_prefix))
            sizes = (str(known.width), str(known.max_length))
            unit = "yes" if known.normalise else "no"
            table.add_row(name, known.hub, *sizes, known.pooling, unit, known.licence, prefixes)
        # Wider than most terminals, whose lines then wrap: names and prefixes that are cut short would be of no use.
        Console(width=max(Console().width, 180)).print(table)


@dataclass(frozen=True)
class Evaluate:
    """Score a model on held-out texts, over correction steps and beam widths."""

    model: str = PACKAGED_MODEL
    """a packaged model's name, or a model folder"""
    embedder: str | None = None
    """where the model's embedder lies, if not where it did when the model was made; or an endpoint's base URL"""
    split: str = "held_out"
    """held_out or train"""
    num_steps: tuple[int, ...] = (0, 1, 8)
    sequence_beam_width: tuple[int, ...] = (1, 4)
    limit: int | None = 500
    """texts at most"""
    source: str = "wordnet"
    """where the texts come from, as data.sources of a recipe"""
    plot: str | None = None
    """write cosine and BLEU against steps to this PNG file"""
    json: bool = False
    """print one JSON document and nothing else"""
    api: ApiConfig = field(default_factory=ApiConfig)

    def run(self) -> None:
        from v2t_jax.eval.evaluate import (
            check_grid,
            check_plot_file,
            evaluate,
            evaluation_texts,
            plot,
            table,
        )
        from v2t_jax.pretrained import load

        check_grid(self.num_steps, self.sequence_beam_width)
        if self.plot is not None:
            check_plot_file(Path(self.plot))
        inverter = load(self.model, open_embedder(self.embedder, self.api))
        texts = evaluation_texts(inverter, self.split, self.limit, self.source)
        report = evaluate(inverter, texts, self.num_steps, self.sequence_beam_width, self.split)
        if self.plot is not None:
            plot(report, Path(self.plot))
        if self.json:
            rows = [{name: row[name] for name in JSON_ROW} for row in report["rows"]]
            print(json.dumps(report | {"rows": rows}, ensure_ascii=False, indent=1))
        else:
            Console().print(table(report))


@dataclass(frozen=True)
class Convert:
    """Convert models: v2t convert --from vec2text --inverter DIR --corrector DIR --t5 DIR --embedder DIR OUT, and back:
    v2t convert --to vec2text MODEL OUT."""

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """the folder to write; with --to, the model and the folder to write"""
    source: Annotated[Literal["vec2text"] | None, tyro.conf.arg(name="from")] = None
    """vec2text: the original's checkpoints, in PyTorch"""
    target: Annotated[Literal["vec2text"] | None, tyro.conf.arg(name="to")] = None
    """vec2text: folders inverter and corrector that the original loads"""
    inverter: str | None = None
    """folder or hub name of the original's inverter"""
    corrector: str | None = None
    """the same of its corrector; without one, the model makes first guesses only"""
    t5: str | None = None
    """folder or hub name of the T5 that both were trained from; by default what the inverter's config.json names"""
    embedder: str | None = None
    """the embedder that they invert: a name that `v2t embedders` lists, a folder, or an endpoint's base URL"""
    api: ApiConfig = field(default_factory=ApiConfig)

    def run(self) -> None:
        from v2t_jax.convert import from_vec2text, to_vec2text

        if (self.source is None) == (self.target is None):
            raise InputError("Give either --from vec2text or --to vec2text.")
        if self.source is not None:
            if len(self.paths) != 1:
                raise InputError("With --from, give one path: the model folder to write.")
            if self.inverter is None or self.embedder is None:
                raise InputError("With --from vec2text, --inverter and --embedder are needed.")
            embedder = open_embedder(self.embedder, self.api)
            from_vec2text(Path(self.paths[0]), self.inverter, self.corrector, self.t5, embedder)
            print(f"The model is in {self.paths[0]}; try: v2t invert --model {self.paths[0]} --embeddings vectors.npy")
            return
        if len(self.paths) != 2:
            raise InputError("With --to, give two paths: the model folder, and the folder to write.")
        if self.inverter or self.corrector or self.t5:
            raise InputError("--inverter, --corrector and --t5 belong to --from; with --to, give the model folder.")
        to_vec2text(self.paths[0], Path(self.paths[1]), open_embedder(self.embedder, self.api))
        print(f"The checkpoints are in {self.paths[1]}/inverter and {self.paths[1]}/corrector.")


@dataclass(frozen=True)
class Demo:
    """Recover held-out sentences from their embeddings, step by step, with a table and a plot."""

    text: str | None = None
    """recover this sentence instead"""
    plot: str = "demo.png"
    """where the plot goes"""

    def run(self) -> None:
        from v2t_jax.eval.evaluate import check_plot_file, evaluation_texts, plot, table
        from v2t_jax.eval.evaluate import report as make_report
        from v2t_jax.invert import invert_strings
        from v2t_jax.pretrained import load

        check_texts([] if self.text is None else [self.text])
        check_plot_file(Path(self.plot))
        inverter = load()
        texts = [self.text] if self.text is not None else evaluation_texts(inverter, limit=DEMO_TEXTS)
        found = invert_strings(inverter, texts, num_steps=DEMO_STEPS, sequence_beam_width=DEMO_BEAM)
        best_first = sorted(range(len(found)), key=lambda i: -found[i].cosine)
        for i in best_first[:DEMO_SHOWN]:
            show_trace(found[i], f"text {i + 1} of {len(found)}")
        report = make_report(
            inverter, found, range(DEMO_STEPS + 1), DEMO_BEAM, "held_out" if self.text is None else "your own"
        )
        Console().print(table(report))
        plot(report, Path(self.plot))
        if len(found) > DEMO_SHOWN:
            print(f"Shown are the {DEMO_SHOWN} recovered best; the table is over all {len(found)}.")
        print(f'The plot is in {self.plot}. Recover a sentence of your own: make demo TEXT="..."')


@dataclass(frozen=True)
class Push:
    """Send a model to the Hugging Face hub. Without --upload it only says what would be sent."""

    model: tyro.conf.Positional[str]
    """a model folder, or a packaged model's name"""
    repository: tyro.conf.Positional[str]
    """where to: owner/name"""
    embedder: str | None = None
    """where the model's embedder lies, if not where it did when the model was made"""
    public: bool = False
    """let everybody read a repository that this makes"""
    upload: bool = False
    """do it"""

    def run(self) -> None:
        from v2t_jax.interop.hub import push
        from v2t_jax.pretrained import load, locate_model

        embedder = load(self.model, self.embedder).embedder.name  # refuses what is damaged or lacks its embedder
        if os.path.isdir(embedder):
            progress.note(f"The model names the folder {embedder} as its embedder: others have to give --embedder.")
        sent = push(locate_model(self.model), self.repository, private=not self.public, dry_run=not self.upload)
        for name, size in sent.files:
            print(f"{size / 1e6:10.3f} MB  {name}")
        print(f"{sent.size / 1e6:10.3f} MB  in all")
        if sent.url is not None:
            print(f"The model is at {sent.url}; try: v2t invert --model {self.repository} --text ...")
        else:
            kind = "public" if self.public else "private"
            print(f"Nothing was sent. With --upload it goes to {self.repository}, {kind} if it doesn't exist yet.")


@dataclass(frozen=True)
class Env:
    """Versions, devices and packaged assets: what a bug report needs."""

    def run(self) -> None:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        import jax

        from v2t_jax.compile_cache import enable_compilation_cache
        from v2t_jax.data.sources import WORDNET
        from v2t_jax.interop.sentence_transformers import KNOWN, locate
        from v2t_jax.pretrained import packaged_models

        print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
        names = "v2t_jax jax jaxlib flax optax orbax-checkpoint transformers tokenizers safetensors numpy sacrebleu"
        for name in (*names.split(), "tensorflow-datasets", "tyro", "rich"):
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name} is not installed")
        try:
            print(f"devices: {', '.join(f'{d.platform} {d.device_kind}' for d in jax.devices())}")
        except (RuntimeError, AssertionError) as error:  # that JAX doesn't start is what the report is about
            print(f"devices: none, JAX doesn't start: {error}")
        print(f"compiled programs: {enable_compilation_cache() or 'not kept'}")
        print(f"packaged text: wordnet, {WORDNET.stat().st_size / 1e6:.1f} MB" if WORDNET.is_file() else "no wordnet")
        print(f"packaged models: {', '.join(packaged_models()) or 'none'}")
        os.environ["HF_HUB_OFFLINE"] = "1"  # say what is here; fetch nothing
        for name, known in KNOWN.items():
            try:
                print(f"embedder {name}: {locate(name)}")
            except InputError as error:
                if known.packages:  # of the others, most are missing on any machine
                    print(f"embedder {name}: {error}")
