"""v2t: recover text from embeddings, and train the models that do."""

import dataclasses
import difflib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape

from v2t_jax import progress
from v2t_jax.errors import InputError

PACKAGED_MODEL = "minilm-wordnet"
# Enough work for one batch to be seen moving, and little enough for two minutes on a laptop's two cores.
DEMO_TEXTS, DEMO_SHOWN, DEMO_STEPS, DEMO_BEAM = 24, 3, 8, 4


@dataclass(frozen=True)
class Invert:
    """Recover texts from their embeddings; shows how each guess was corrected."""

    text: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """a text to embed and then recover; may be given several times"""
    embeddings: str | None = None
    """a .npy file of vectors [n, E] to recover"""
    model: str = PACKAGED_MODEL
    """a packaged model's name, or a model folder"""
    num_steps: int = 8
    """correction steps; 0 gives the first guess"""
    sequence_beam_width: int = 4
    """hypotheses kept between steps"""
    mode: Literal["best", "upstream"] = "best"
    """best keeps the closest text ever seen; upstream selects as the original does"""
    batch_size: int | None = None
    """vectors at a time"""
    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        from v2t_jax.invert import check_vectors, invert_embeddings, invert_strings, read_vectors
        from v2t_jax.pretrained import load

        if bool(self.text) == (self.embeddings is not None):
            raise InputError("Give either --text TEXT or --embeddings FILE.npy.")
        for i, text in enumerate(self.text):
            if not text.strip():
                raise InputError(f"Text {i + 1} of {len(self.text)} is empty; give it at least one word.")
        vectors = read_vectors(self.embeddings) if self.embeddings is not None else None
        inverter = load(self.model)
        options: dict[str, Any] = {
            "num_steps": self.num_steps,
            "sequence_beam_width": self.sequence_beam_width,
            "mode": self.mode,
            "batch_size": self.batch_size,
        }
        if vectors is None:
            found = invert_strings(inverter, list(self.text), **options)
        else:
            found = invert_embeddings(inverter, check_vectors(vectors, inverter.config.embedding_width), **options)
        if self.json:
            print(json.dumps([one.to_dict() for one in found], ensure_ascii=False, indent=1))
        else:
            for i, one in enumerate(found):
                show_trace(one, f"{i + 1} of {len(found)}")


@dataclass(frozen=True)
class Embed:
    """Embed the lines of a text file; writes a .npy file [lines, E]."""

    input: str
    """text file, a text a line"""
    output: str
    """the .npy file to write"""
    embedder: str = "all-MiniLM-L6-v2"
    """an embedder's name, or a sentence-transformers folder"""
    batch_size: int = 64

    def run(self) -> None:
        import numpy as np

        from v2t_jax.interop.sentence_transformers import load_embedder

        try:
            lines = Path(self.input).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{self.input} can't be read as text ({error}); give a UTF-8 file, a text a line."
            ) from error
        if not lines:
            raise InputError(f"{self.input} is empty; give a text a line.")
        vectors = load_embedder(self.embedder).embed(lines, self.batch_size)
        output, part = Path(self.output), Path(f"{self.output}.part")
        try:
            with part.open("wb") as file:  # a path would get .npy appended
                np.save(file, vectors)
            part.replace(output)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(f"{self.output} can't be written ({error.strerror}); give another place.") from error
        print(f"{len(lines)} vectors of width {vectors.shape[1]} -> {self.output}")


@dataclass(frozen=True)
class Evaluate:
    """Score a model on held-out texts, over correction steps and beam widths."""

    model: str = PACKAGED_MODEL
    """a packaged model's name, or a model folder"""
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

    def run(self) -> None:
        from v2t_jax.eval.evaluate import evaluate, evaluation_texts, plot, table
        from v2t_jax.pretrained import load

        inverter = load(self.model)
        texts = evaluation_texts(inverter, self.split, self.limit, self.source)
        report = evaluate(inverter, texts, self.num_steps, self.sequence_beam_width, self.split)
        if self.plot:
            plot(report, Path(self.plot))
        if self.json:
            print(json.dumps(report, indent=1))
        else:
            Console().print(table(report))


@dataclass(frozen=True)
class Demo:
    """Recover held-out sentences from their embeddings, step by step, with a table and a plot."""

    text: str | None = None
    """recover this sentence instead"""
    plot: str = "demo.png"
    """where the plot goes"""

    def run(self) -> None:
        from v2t_jax.eval.evaluate import evaluation_texts, plot, table
        from v2t_jax.eval.evaluate import report as make_report
        from v2t_jax.invert import invert_strings
        from v2t_jax.pretrained import load

        inverter = load()
        texts = [self.text] if self.text is not None else evaluation_texts(inverter, limit=DEMO_TEXTS)
        found = invert_strings(inverter, texts, num_steps=DEMO_STEPS, sequence_beam_width=DEMO_BEAM)
        best_first = sorted(range(len(found)), key=lambda i: -found[i].cosine)
        for i in best_first[:DEMO_SHOWN]:
            show_trace(found[i], f"text {i + 1} of {len(found)}")
        report = make_report(
            inverter, found, range(DEMO_STEPS + 1), DEMO_BEAM, "your text" if self.text else "held_out"
        )
        Console().print(table(report))
        plot(report, Path(self.plot))
        if len(found) > DEMO_SHOWN:
            print(f"Shown are the {DEMO_SHOWN} recovered best; the table is over all {len(found)}.")
        print(f'The plot is in {self.plot}. Recover a sentence of your own: make demo TEXT="..."')


@dataclass(frozen=True)
class Env:
    """Versions, devices and packaged assets: what a bug report needs."""

    def run(self) -> None:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        import jax

        from v2t_jax.interop.sentence_transformers import KNOWN, locate
        from v2t_jax.pretrained import PACKAGED

        print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
        names = "v2t_jax jax jaxlib flax optax orbax-checkpoint transformers tokenizers safetensors numpy sacrebleu tensorflow-datasets"
        for name in names.split():
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name} is not installed")
        print(f"devices: {', '.join(f'{d.platform} {d.device_kind}' for d in jax.devices())}")
        models = sorted(path.name for path in PACKAGED.glob("*") if path.is_dir())
        print(f"packaged models: {', '.join(models) or 'none'}")
        os.environ["HF_HUB_OFFLINE"] = "1"  # say what is here; fetch nothing
        for name in KNOWN:
            try:
                print(f"embedder {name}: {'installed' if locate(name) else ''}")
            except InputError as error:
                print(f"embedder {name}: {error}")


def show_trace(found: Any, title: str) -> None:
    """Prints a text's way from the first guess to the last, with what changed in each step set off."""
    console = Console(highlight=False)
    console.print(f"\n[bold]{escape(title)}[/bold]")
    before: list[str] = []
    for step in found.trace:
        words = step.text.split()
        if words != before or step.step == 0:
            console.print(f"  step {step.step:2d}  cosine {step.cosine:.4f}  {_changed(before, words)}")
        before = words
    if found.reference is not None:
        verdict = "[green]recovered exactly[/green]" if found.exact_match else "true text"
        console.print(f"  {verdict:<24}  {escape(found.reference)}")


def _changed(before: list[str], after: list[str]) -> str:
    """`after` with the words that `before` lacks in bold."""
    if not before:
        return escape(" ".join(after))
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        text = escape(" ".join(after[start:end]))
        if text:
            parts.append(text if kind == "equal" else f"[bold yellow]{text}[/bold yellow]")
    return " ".join(parts)


def train(arguments: list[str]) -> None:
    """`v2t train RECIPE --workdir DIR [overrides]`: the recipe decides which options there are."""
    from v2t_jax.config import load_recipe
    from v2t_jax.train.loop import TrainingStopped
    from v2t_jax.train.loop import train as run

    if not arguments or arguments[0] in ("-h", "--help") or arguments[0].startswith("-"):
        print(
            "usage: v2t train configs/NAME.py --workdir DIR [--FIELD VALUE ...]   (--help after the recipe lists fields)"
        )
        raise SystemExit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    recipe = load_recipe(arguments[0])
    schema = dataclasses.make_dataclass(
        "Train", [("workdir", str), ("config", tyro.conf.OmitArgPrefixes[type(recipe)], recipe)]
    )
    chosen = tyro.cli(schema, args=arguments[1:], prog=f"v2t train {arguments[0]}")
    try:
        folder = run(chosen.config, Path(chosen.workdir))
    except TrainingStopped as stopped:
        print(str(stopped), file=sys.stderr)
        return
    print(f'The model is in {folder}; try: v2t invert --model {folder} --text "..."')


COMMANDS = {"invert": Invert, "embed": Embed, "eval": Evaluate, "demo": Demo, "env": Env}


def main() -> None:
    """The command line. A mistake of the user's ends in one sentence and exit status 2."""
    from v2t_jax.compile_cache import enable_compilation_cache

    progress.enable()
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["train"]:
            enable_compilation_cache()
            train(arguments[1:])
            return
        command = tyro.extras.subcommand_cli_from_dict(
            {**COMMANDS, "train": _TrainHelp}, args=arguments, prog="v2t", description=__doc__
        )
        enable_compilation_cache()
        command.run()
    except InputError as error:
        print(f"v2t: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except KeyboardInterrupt:
        print("v2t: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@dataclass(frozen=True)
class _TrainHelp:
    """Train a recipe: v2t train configs/NAME.py --workdir DIR [typed overrides of any field]."""

    def run(self) -> None:
        train([])
