"""Evaluation over steps and beam widths, its table and its plot."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.helpers.tiny_model import make_model
from tests.helpers.tiny_run import make_texts
from v2t_jax.errors import InputError
from v2t_jax.eval.evaluate import evaluate, evaluation_texts, plot, table
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


def test_plot_is_a_png_whatever_its_name(report: dict, tmp_path: Path) -> None:
    for name in ("plot.png", "new/folder/plot", "plot.odd"):
        plot(report, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(InputError, match="plot can't be written"):
        plot(report, tmp_path)


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
