"""Evaluation over steps and beam widths, its table and its plot."""

import io
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from tests.helpers.tiny_model import make_model
from tests.helpers.tiny_run import make_texts
from v2t_jax.cli.invert import print_table
from v2t_jax.cli.models import Embedders
from v2t_jax.embedders.known import KNOWN
from v2t_jax.errors import InputError
from v2t_jax.eval.calibrate import plot_reliability
from v2t_jax.eval.evaluate import check_plot_file, evaluate, evaluation_texts, plot, table
from v2t_jax.eval.metrics import text_scores
from v2t_jax.inversion.api import invert_strings
from v2t_jax.inversion.pipeline import InversionPipeline, load

TEXTS = make_texts(5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InversionPipeline:
    return load(str(make_model(tmp_path_factory.mktemp("models"))))


@pytest.fixture(scope="module")
def report(model: InversionPipeline) -> dict:
    return evaluate(model, TEXTS, (3, 0, 1), (2, 1))


def test_a_row_for_each_number_of_steps_and_width(report: dict) -> None:
    assert {key: report[key] for key in ("model", "split", "n")} == {"model": "tiny", "split": "held_out", "n": 5}
    grid = [(row["sequence_beam_width"], row["num_steps"]) for row in report["rows"]]
    assert grid == [(width, steps) for width in (1, 2) for steps in (0, 1, 3)]
    assert all(row["texts_per_second"] > 0 for row in report["rows"])


def test_a_row_is_what_a_run_of_so_many_steps_scores(model: InversionPipeline, report: dict) -> None:
    row = next(row for row in report["rows"] if (row["sequence_beam_width"], row["num_steps"]) == (2, 1))
    found = invert_strings(model, TEXTS, num_steps=1, sequence_beam_width=2, batch_size=32)
    scores = text_scores([one.text for one in found], [str(one.reference) for one in found])
    assert row["bleu"] == pytest.approx(scores["bleu"].mean, abs=1e-4)
    assert row["token_f1_sem"] == pytest.approx(scores["token_f1"].sem, abs=1e-4)
    assert row["cosine"] == pytest.approx(sum(one.cosine for one in found) / 5, abs=2e-4)


def test_cosine_never_falls_with_steps(report: dict) -> None:
    for width in (1, 2):
        cosines = [row["cosine"] for row in report["rows"] if row["sequence_beam_width"] == width]
        assert cosines == sorted(cosines)


def test_table_shows_every_row_in_80_columns(report: dict) -> None:
    console = Console(width=80, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115 (closed below)
    wide = {"num_steps": 8, "edit_rounds": 12, "embedder_calls": 1476.0, "exact_match": 1.0, "bleu": 100.0}
    console.print(table(report | {"rows": [row | wide for row in report["rows"]]}))
    console.file.close()
    shown = console.export_text()
    assert "held_out" in shown and "…" not in shown
    assert shown.count("8 + 12") == len(report["rows"]) and shown.count("±") == 4 * len(report["rows"])


def test_edits_add_a_row_for_each_budget(model: InversionPipeline) -> None:
    loop = model.correction_loop(2, search="both")
    rows = evaluate(model, TEXTS, (0, 1), (2,), search="both", budget=(300, 600))["rows"]
    rounds = [loop.rounds_within(calls, 1) for calls in (300, 600)]
    assert [(row["num_steps"], row["edit_rounds"]) for row in rows] == [(0, 0), (1, 0), *((1, n) for n in rounds)]
    assert [row["texts_per_second"] is None for row in rows] == [True, True, True, False]
    calls = [row["embedder_calls"] for row in rows]
    assert calls == sorted(calls) and calls[0] == 4 and calls[-1] <= 600
    assert rows[-1]["cosine"] > rows[1]["cosine"]


def test_a_plot_has_the_format_of_its_suffix(report: dict, tmp_path: Path) -> None:
    for name, start in (("plot.png", b"\x89PNG\r\n"), ("new/folder/plot.PDF", b"%PDF-"), ("plot.svg", b"<?xml")):
        plot(report, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    for name in ("plot", "plot.odd", "plot.jpg", ""):
        with pytest.raises(InputError, match=r"names no format for a plot; let it end in .png, .pdf, .svg"):
            check_plot_file(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="plot can't be written"):
        plot(report, tmp_path / "folder.png")


def figure_of(report: dict, file: Path) -> Figure:
    drawn: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
        plot(report, file)
    drawn[0].draw_without_rendering()
    return drawn[0]


def test_ticks_of_calls_are_whole_numbers(report: dict, tmp_path: Path) -> None:
    for calls in ((1, 2), (16, 16), (3.5, 4.2), (20, 632.4)):
        rows = [row | {"embedder_calls": one} for row, one in zip(report["rows"], calls, strict=False)]
        for axis in figure_of(report | {"rows": rows}, tmp_path / "plot.png").axes:
            low, high = axis.get_xlim()
            ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
            assert ticks and all(tick == round(tick) for tick in ticks)


def test_one_text_has_no_standard_error(model: InversionPipeline, tmp_path: Path) -> None:
    one = evaluate(model, TEXTS[:1], (0, 1), (2,))
    names = ("bleu_sem", "token_f1_sem", "exact_match_sem", "cosine_sem")
    assert all(row[name] is None for row in one["rows"] for name in names)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table(one))
    assert not {"±", "nan", "None"} & set(re.findall(r"±|nan|None", console.export_text()))
    assert not any(axis.containers[0].has_yerr for axis in figure_of(one, tmp_path / "plot.png").axes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_, **__: None)
        part = {"from": 0.0, "to": 0.1, "n": 1, "probability": 0.05, "exact_match": 0.0}
        plot_reliability({"n": 9, "bins": [part, part | {"n": 8, "exact_match": 0.5}]}, tmp_path / "plot.png")


def test_no_figure_is_cut_in_a_narrow_terminal(report: dict, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table(table(report))
    out = capsys.readouterr().out
    assert "…" not in out and out.count("±") == 4 * len(report["rows"])
    Embedders().run()
    assert "…" not in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    Embedders().run()
    out = capsys.readouterr().out
    assert "…" not in out and max(map(len, out.splitlines())) <= 80
    for name, known in KNOWN.items():
        (line, *_) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        assert {str(known.width), str(known.max_length), known.pooling, known.licence} <= set(line.split())


def test_texts_of_a_split_fit_the_model(model: InversionPipeline, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    lines = [*make_texts(300), "the cat " * 20, "🙂 🙂"]
    source.write_text("\n".join(lines), encoding="utf-8")
    train = evaluation_texts(model, "train", None, str(source))
    held_out = evaluation_texts(model, "held_out", None, str(source))
    assert held_out and set(train) | set(held_out) <= set(lines[:-2])
    assert not set(train) & set(held_out)
    assert evaluation_texts(model, "train", 3, str(source)) == train[:3]


def test_what_cannot_be_evaluated_is_refused(model: InversionPipeline, tmp_path: Path) -> None:
    for steps, widths in (((), (1,)), ((-1,), (1,)), ((0,), ()), ((0,), (0,))):
        with pytest.raises(InputError, match="give (one number or more|a number from)"):
            evaluate(model, TEXTS, steps, widths)
    with pytest.raises(InputError, match="no texts"):
        evaluate(model, [])
    with pytest.raises(InputError, match="no split 'test'"):
        evaluation_texts(model, "test")
    source = tmp_path / "long.txt"
    source.write_text("the cat and the dog and the bird and the fish")
    with pytest.raises(InputError, match="fits in the 7 tokens"):
        evaluation_texts(model, "train", source=str(source))
