"""Scores of a model over correction steps and beam widths, as a table and a plot."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.table import Table

from v2t_jax import progress
from v2t_jax.data.split import read_texts
from v2t_jax.errors import InputError, check_whole
from v2t_jax.eval.metrics import score, text_scores
from v2t_jax.inversion.api import BATCH_SIZE, InversionResult, invert_on_all_hosts, invert_strings
from v2t_jax.inversion.correction import MOST_STEPS, TRACE_STEPS, CorrectionSettings
from v2t_jax.inversion.pipeline import InversionPipeline


def evaluation_texts(
    inverter: InversionPipeline, split: str = "held_out", limit: int | None = None, source: str = "wordnet"
) -> list[str]:
    """Texts of a split that are short enough for the model, in the source's order and the tokenizer's normal form."""
    if split not in ("held_out", "train"):
        raise InputError(f"There is no split {split!r}; use held_out or train.")
    if limit is not None:
        check_whole("limit", limit, 1)
    longest = inverter.config.max_length
    with progress.stage(f"reading the {split} texts of {source}"):
        texts = read_texts(source, "held_out" if split == "held_out" else "train")
        lengths = map(len, inverter.vocabulary.encode(texts))
        short = [text for text, length in zip(texts, lengths, strict=True) if 0 < length < longest]
        # A text may consist of nothing that the tokenizer knows.
        found = [text for text in inverter.vocabulary.normalize(short, longest) if text.strip()][:limit]
    if not found:
        raise InputError(
            f"No {split} text of {source} fits in the {longest - 1} tokens that the model takes; use shorter ones."
        )
    return found


def check_grid(num_steps: Sequence[int], sequence_beam_width: Sequence[int]) -> None:
    """Refuses numbers of steps and beam widths that can't be evaluated: none, or one out of range."""
    for name, values in (("num_steps", num_steps), ("sequence_beam_width", sequence_beam_width)):
        if not values:
            raise InputError(f"{name} is empty; give one number or more.")
    for steps in num_steps:
        check_whole("num_steps", steps, 0, MOST_STEPS)
    for width in sequence_beam_width:
        CorrectionSettings(width)


def evaluate(
    inverter: InversionPipeline,
    texts: list[str],
    num_steps: Sequence[int] = (0, 1, 8),
    sequence_beam_width: Sequence[int] = (1, 4),
    split: str = "held_out",
) -> dict[str, Any]:
    """Recovers `texts` from their embeddings at every number of steps and beam width; returns a report, see `report`.

    One run to the largest number of steps serves all: the state after fewer steps is in its trace. That run gives the
    speed of its row; the speed of the others is measured on the first batches only. Compilation is never counted.

    Raises:
        InputError: no texts, or see `check_grid` and `v2t_jax.inversion.api.invert_embeddings`.
    """
    if not texts:
        raise InputError("There are no texts to evaluate on; use a split that has some.")
    check_grid(num_steps, sequence_beam_width)
    rows: list[dict[str, Any]] = []
    most, first = max(num_steps), texts[: BATCH_SIZE * jax.device_count()]

    def timed(texts: list[str], steps: int, width: int) -> tuple[list[InversionResult], float]:
        started = time.perf_counter()
        options = {"num_steps": steps, "sequence_beam_width": width, "batch_size": BATCH_SIZE}
        found = invert_on_all_hosts(invert_strings, inverter, texts, **options)
        return found, round(len(texts) / (time.perf_counter() - started), 3)

    for width in sorted(set(sequence_beam_width)):
        # Compiles; up to TRACE_STEPS the number of steps is no part of the program.
        timed(first, min(most, 1) if most <= TRACE_STEPS else most, width)
        found, speed = timed(texts, most, width)
        for row in report(inverter, found, num_steps, width, split)["rows"]:
            steps = row["num_steps"]
            rows.append(row | {"texts_per_second": speed if steps == most else timed(first, steps, width)[1]})
    return {"model": inverter.name, "split": split, "n": len(texts), "rows": rows}


def report(
    inverter: InversionPipeline,
    found: list[InversionResult],
    num_steps: Iterable[int],
    sequence_beam_width: int,
    split: str,
) -> dict[str, Any]:
    """Scores of recovered texts after each of `num_steps`, from their traces.

    Returns:
        {"model", "split", "n", "rows": [{"num_steps", "sequence_beam_width", "texts_per_second" (None here), and
        "bleu", "token_f1", "exact_match", "cosine", each with "..._sem", its standard error}]}
    """
    rows = []
    for step in sorted(set(num_steps)):
        scores = text_scores([f.trace[step].text for f in found], [str(f.reference) for f in found])
        scores["cosine"] = score([f.trace[step].cosine for f in found])
        row: dict[str, Any] = {"num_steps": step, "sequence_beam_width": sequence_beam_width}
        for name, value in scores.items():
            row |= {name: round(value.mean, 4), f"{name}_sem": round(value.sem, 4)}
        rows.append(row | {"texts_per_second": None})
    return {"model": inverter.name, "split": split, "n": len(found), "rows": rows}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a report for people: steps, beam width and scores with their standard errors."""
    formats = {"bleu": ".1f", "token_f1": ".3f", "exact_match": ".1%", "cosine": ".4f"}
    scores = [f"{row[name]:{style}} ± {row[f'{name}_sem']:{style}}" for name, style in formats.items()]
    return [str(row["num_steps"]), str(row["sequence_beam_width"]), *scores]


def table(report: dict[str, Any]) -> Table:
    """The report as a table for people."""
    result = Table(
        caption="BLEU and F1 of texts in the tokenizer's normal form; exact match means equal in that form.",
        title=f"{report['model']}: {report['n']} texts of {report['split']}",
        box=box.SIMPLE_HEAD,  # in 80 columns
        pad_edge=False,
    )
    timed = any(row["texts_per_second"] is not None for row in report["rows"])
    for column in ("steps", "beam", "BLEU", "token F1", "exact match", "cosine", *["texts/s"] * timed):
        result.add_column(column, justify="right", no_wrap=True)
    for row in report["rows"]:
        speed = row["texts_per_second"]
        result.add_row(*cells(row), *([] if speed is None else [f"{speed:.2f}"]))
    return result


def check_plot_file(file: Path) -> None:
    """Refuses a file where no plot can be written, before any work is done."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"The plot can't be written to {file}; give the name of a writable file.")


def plot(report: dict[str, Any], file: Path) -> None:
    """Cosine and BLEU against correction steps, a line a beam width, with standard errors; PNG."""
    from matplotlib.figure import Figure

    check_plot_file(file)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(axes, ("cosine", "bleu"), ("cosine to the target", "BLEU"), strict=True):
        for width in sorted({row["sequence_beam_width"] for row in report["rows"]}):
            rows = [row for row in report["rows"] if row["sequence_beam_width"] == width]
            steps, means, errors = ([row[key] for row in rows] for key in ("num_steps", name, f"{name}_sem"))
            axis.errorbar(steps, means, errors, marker="o", capsize=3, label=f"sequence beam {width}")
        axis.set(xlabel="correction steps", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{report['model']}, {report['n']} texts of {report['split']}")
    figure.savefig(file, dpi=120, format="png")
