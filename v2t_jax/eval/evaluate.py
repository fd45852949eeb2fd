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
from v2t_jax.inversion.correction import TRACE_STEPS, CorrectionSettings, check_num_steps
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
    """Refuses numbers of steps and beam widths that can't be evaluated.

    Raises:
        InputError: none, or one out of range.
    """
    for name, values, check in (
        ("num_steps", num_steps, check_num_steps),
        ("sequence_beam_width", sequence_beam_width, CorrectionSettings),
    ):
        if not values:
            raise InputError(f"{name} is empty; give one number or more.")
        for value in values:
            check(value)


def evaluate(
    inverter: InversionPipeline,
    texts: list[str],
    num_steps: Sequence[int] = (0, 1, 8),
    sequence_beam_width: Sequence[int] = (1, 4),
    split: str = "held_out",
) -> dict[str, Any]:
    """Recovers `texts` from their embeddings at every number of steps and beam width.

    One run to the largest number of steps serves all: the state after fewer steps is in its trace. That run gives the
    speed of its row; the speed of the others is measured on the first batches only. Compilation is never counted.

    Returns:
        {"model", "split", "n", "rows": [...]}: see `report`.

    Raises:
        InputError: no texts, or see `check_grid` and `v2t_jax.inversion.api.invert_embeddings`.
    """
    if not texts:
        raise InputError("There are no texts to evaluate on; use a split that has some.")
    check_grid(num_steps, sequence_beam_width)
    rows: list[dict[str, Any]] = []
    most = max(num_steps)
    for width in sorted(set(sequence_beam_width)):

        def timed(texts: list[str], steps: int, width: int = width) -> tuple[list[InversionResult], float]:
            started = time.perf_counter()
            options: dict[str, Any] = {"num_steps": steps, "sequence_beam_width": width, "batch_size": BATCH_SIZE}
            found = invert_on_all_hosts(invert_strings, inverter, texts, **options)
            return found, round(len(texts) / (time.perf_counter() - started), 3)

        first = texts[: BATCH_SIZE * jax.device_count()]
        # Compiles; up to TRACE_STEPS the number of steps is no part of the program.
        timed(first, min(most, 1) if most <= TRACE_STEPS else most)
        found, speed = timed(texts, most)
        for row in report(inverter, found, num_steps, width, split)["rows"]:
            steps = row["num_steps"]
            rows.append(row | {"texts_per_second": speed if steps == most else timed(first, steps)[1]})
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
    rows = [_row(found, step, sequence_beam_width) for step in sorted(set(num_steps))]
    return {"model": inverter.name, "split": split, "n": len(found), "rows": rows}


def _row(found: list[InversionResult], step: int, width: int) -> dict[str, Any]:
    scores = text_scores([f.trace[step].text for f in found], [str(f.reference) for f in found])
    scores["cosine"] = score([f.trace[step].cosine for f in found])
    row: dict[str, Any] = {"num_steps": step, "sequence_beam_width": width}
    for name, value in scores.items():
        row |= {name: round(value.mean, 4), f"{name}_sem": round(value.sem, 4)}
    return row | {"texts_per_second": None}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a report for people: steps, beam width and scores with their standard errors."""
    return [
        str(row["num_steps"]),
        str(row["sequence_beam_width"]),
        f"{row['bleu']:.1f} ± {row['bleu_sem']:.1f}",
        f"{row['token_f1']:.3f} ± {row['token_f1_sem']:.3f}",
        f"{row['exact_match']:.1%} ± {row['exact_match_sem']:.1%}",
        f"{row['cosine']:.4f} ± {row['cosine_sem']:.4f}",
    ]


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
    """Makes sure, before any work is done, that a plot can be written there.

    Raises:
        InputError: it can't.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The plot can't be written to {file} ({error.strerror}); use another path.") from error
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"The plot can't be written to {file}; give the name of a writable file.")


def plot(report: dict[str, Any], file: Path) -> None:
    """Cosine and BLEU against correction steps, a line a beam width, with standard errors; PNG.

    Raises:
        InputError: the file can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    check_plot_file(file)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, name, label in zip(axes, ("cosine", "bleu"), ("cosine to the target", "BLEU"), strict=True):
        for width in sorted({row["sequence_beam_width"] for row in report["rows"]}):
            rows = [row for row in report["rows"] if row["sequence_beam_width"] == width]
            steps, means, errors = ([row[key] for row in rows] for key in ("num_steps", name, f"{name}_sem"))
            axis.errorbar(steps, means, errors, marker="o", capsize=3, label=f"sequence beam {width}")
        axis.set(xlabel="correction steps", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{report['model']}, {report['n']} texts of {report['split']}")
    try:
        figure.savefig(file, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"The plot can't be written to {file} ({error.strerror}); use another path.") from error
    finally:
        plt.close(figure)
