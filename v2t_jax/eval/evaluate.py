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
from v2t_jax.inversion.api import BATCH_SIZE, BUDGET, MOST_CALLS, InversionResult, invert_on_all_hosts, invert_strings
from v2t_jax.inversion.correction import MOST_STEPS, TRACE_STEPS, CorrectionSettings, Search
from v2t_jax.inversion.pipeline import InversionPipeline

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


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


def check_grid(num_steps: Sequence[int], sequence_beam_width: Sequence[int], budget: Sequence[int] = (BUDGET,)) -> None:
    """Refuses numbers of steps, beam widths and budgets that can't be evaluated: none, or one out of range."""
    grid = ("num_steps", num_steps), ("sequence_beam_width", sequence_beam_width), ("budget", budget)
    for name, values in grid:
        if not values:
            raise InputError(f"{name} is empty; give one number or more.")
    for steps in num_steps:
        check_whole("num_steps", steps, 0, MOST_STEPS)
    for width in sequence_beam_width:
        CorrectionSettings(width)
    for calls in budget:
        check_whole("budget", calls, 1, MOST_CALLS)


def evaluate(
    inverter: InversionPipeline,
    texts: list[str],
    num_steps: Sequence[int] | None = None,
    sequence_beam_width: Sequence[int] = (1, 4),
    split: str = "held_out",
    search: Search | None = None,
    budget: Sequence[int] = (BUDGET,),
) -> dict[str, Any]:
    """Recovers `texts` from their embeddings at every number of steps and beam width; returns a report, see `report`.

    By default before all steps and after as many as `invert_embeddings` takes.

    With edits, every budget gives one more row: rounds of them behind the largest number of steps.

    One run to the largest number of steps serves all: the state after fewer steps is in its trace. That run gives the
    speed of its row; without edits, the others' speed is measured on the first batches. Compilation isn't counted.

    Raises:
        InputError: no texts, or see `check_grid` and `v2t_jax.inversion.api.invert_embeddings`.
    """
    if not texts:
        raise InputError("There are no texts to evaluate on; use a split that has some.")
    search = search or inverter.default_search()
    if num_steps is None or search == "edits":
        num_steps = (0, inverter.default_steps(search))
    check_grid(num_steps, sequence_beam_width, budget)
    rows: list[dict[str, Any]] = []
    most, first = max(num_steps), texts[: BATCH_SIZE * jax.device_count()]

    def timed(texts: list[str], width: int, steps: int, rounds: int = 0) -> tuple[list[InversionResult], float]:
        started = time.perf_counter()
        options: dict[str, Any] = {"num_steps": steps, "sequence_beam_width": width, "batch_size": BATCH_SIZE}
        loop = inverter.correction_loop(width, search=search)
        edits = {"search": search, "budget": loop.calls_at(steps + rounds, steps)}
        options |= edits if rounds else {"search": "corrector"}
        found = invert_on_all_hosts(invert_strings, inverter, texts, **options)
        return found, round(len(texts) / (time.perf_counter() - started), 3)

    for width in sorted(set(sequence_beam_width)):
        loop = inverter.correction_loop(width, search=search)
        rounds = sorted({loop.rounds_within(calls, most) for calls in budget})
        last = most + rounds[-1]
        # Compiles; up to TRACE_STEPS the number of steps is no part of the program.
        least = (min(most, 1), min(rounds[-1], 1)) if last <= TRACE_STEPS else (most, rounds[-1])
        timed(first, width, *least)
        found, speed = timed(texts, width, most, rounds[-1])
        ends = {*num_steps, *(most + n for n in rounds)}
        for row in report(inverter, found, ends, width, split, most)["rows"]:
            steps = row["num_steps"]
            whole = steps + row["edit_rounds"] == last
            # Parts of a run with edits aren't timed: each would be one more program to compile.
            took = speed if whole else None if last > most else timed(first, width, steps)[1]
            rows.append(row | {"texts_per_second": took})
    return {"model": inverter.name, "split": split, "n": len(texts), "rows": rows}


def report(
    inverter: InversionPipeline,
    found: list[InversionResult],
    num_steps: Iterable[int],
    sequence_beam_width: int,
    split: str,
    corrections: int | None = None,
) -> dict[str, Any]:
    """Scores of recovered texts after each of `num_steps`, from their traces.

    Args:
        corrections: the steps behind which rounds of edits follow; by default there are none.

    Returns:
        {"model", "split", "n", "rows": [{"num_steps", "edit_rounds" behind them, "sequence_beam_width",
        "embedder_calls" (for a text, on average), "texts_per_second" (None here), and "bleu", "token_f1",
        "exact_match", "cosine", each with "..._sem", its standard error (None for one text)}]}
    """
    rows = []
    for step in sorted(set(num_steps)):
        scores = text_scores([f.trace[step].text for f in found], [str(f.reference) for f in found])
        scores["cosine"] = score([f.trace[step].cosine for f in found])
        steps = step if corrections is None else min(step, corrections)
        row: dict[str, Any] = {"num_steps": steps, "edit_rounds": step - steps}
        row["sequence_beam_width"] = sequence_beam_width
        row["embedder_calls"] = round(sum(f.trace[step].embedder_calls for f in found) / len(found), 1)
        for name, value in scores.items():
            row |= {name: round(value.mean, 4), f"{name}_sem": None if value.sem is None else round(value.sem, 4)}
        rows.append(row | {"texts_per_second": None})
    return {"model": inverter.name, "split": split, "n": len(found), "rows": rows}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a report for people: steps + rounds, beam width, calls and scores with their standard errors."""
    formats = {"bleu": ".1f", "token_f1": ".3f", "exact_match": ".1%", "cosine": ".4f"}
    known = {name: [x for x in (row[name], row[f"{name}_sem"]) if x is not None] for name in formats}
    scores = [" ± ".join(f"{x:{formats[name]}}" for x in values) for name, values in known.items()]
    steps = f"{row['num_steps']}" + (f" + {row['edit_rounds']}" if row["edit_rounds"] else "")
    return [steps, str(row["sequence_beam_width"]), f"{row['embedder_calls']:.0f}", *scores]


def table(report: dict[str, Any]) -> Table:
    """The report as a table for people."""
    result = Table(
        caption="BLEU and F1 of texts in the tokenizer's normal form; exact match means equal in that form.",
        title=f"{report['model']}: {report['n']} texts of {report['split']}",
        box=box.SIMPLE_HEAD,  # in 80 columns, thanks to the next three and to scores without spaces
        pad_edge=False,
        padding=(0, 0, 0, 1),
        show_edge=False,
    )
    timed = any(row["texts_per_second"] is not None for row in report["rows"])
    for column in ("steps", "beam", "calls", "BLEU", "F1", "exact match", "cosine", *["texts/s"] * timed):
        result.add_column(column, justify="right", no_wrap=True)
    for row in report["rows"]:
        speed = row["texts_per_second"]
        result.add_row(*(cell.replace(" ± ", "±") for cell in cells(row)), *([] if speed is None else [f"{speed:.2f}"]))
    return result


def check_plot_file(file: Path) -> None:
    """Refuses a file where no plot can be written, before any work is done."""
    if file.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"{str(file)!r} names no format for a plot; let it end in {', '.join(PLOT_SUFFIXES)}.")
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"The plot can't be written to {file}; give the name of a writable file.")


def plot(report: dict[str, Any], file: Path) -> None:
    """Exact match and BLEU against the embedder's calls, a line a beam width, with errors, in the suffix's format."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    check_plot_file(file)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name, score_name in zip(axes, ("exact_match", "bleu"), ("exact match", "BLEU"), strict=True):
        for width in sorted({row["sequence_beam_width"] for row in report["rows"]}):
            rows = [row for row in report["rows"] if row["sequence_beam_width"] == width]
            calls, means, errors = ([row[key] for row in rows] for key in ("embedder_calls", name, f"{name}_sem"))
            axis.errorbar(
                calls, means, None if None in errors else errors, marker="o", capsize=3, label=f"sequence beam {width}"
            )
        axis.set(xlabel="embedder calls for a text", ylabel=score_name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{report['model']}, {report['n']} texts of {report['split']}")
    figure.savefig(file, dpi=120)
