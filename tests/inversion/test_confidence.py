"""How likely a text is exact: the regression against one known in advance, and its way through a model's folder."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny_model import make_model
from tests.helpers.tiny_run import make_texts
from v2t_jax.errors import InputError
from v2t_jax.eval.calibrate import calibrate, plot_reliability, store
from v2t_jax.inversion.api import invert_strings
from v2t_jax.inversion.confidence import fit, probability
from v2t_jax.inversion.pipeline import load

TRUE = (-4.0, -1.0, 2.0)


def test_the_fit_finds_the_law_that_made_the_data() -> None:
    draw = np.random.default_rng(0)
    runner_up = 1 - 10 ** draw.uniform(-4, 0, 20_000)
    cosine = 1 - (1 - runner_up) * 10 ** draw.uniform(-3, 0, 20_000)
    odds = TRUE[0] + TRUE[1] * np.log10(1 - cosine) + TRUE[2] * np.log10((1 - runner_up) / (1 - cosine))
    exact = draw.uniform(size=20_000) < 1 / (1 + np.exp(-odds))
    assert fit(cosine, runner_up, exact) == pytest.approx(TRUE, abs=0.15)
    assert probability(fit(cosine, runner_up, exact), cosine, runner_up).mean() == pytest.approx(exact.mean(), abs=1e-3)


def test_texts_that_can_be_told_apart_get_finite_weights_and_the_right_side() -> None:
    cosine, exact = np.array([1.0, 1.0, 0.99, 0.9]), np.array([1, 1, 0, 0])
    found = probability(fit(cosine, np.full(4, 0.89), exact), cosine, np.full(4, 0.89))
    assert ((found > 0.5) == exact).all() and np.isfinite(found).all()


def test_a_stored_calibration_gives_results_their_confidence(tmp_path: Path) -> None:
    folder, texts = make_model(tmp_path), make_texts(12)
    model = load(folder)
    before = invert_strings(model, texts, num_steps=2)
    assert all(one.confidence is None and -1 <= one.runner_up <= 1 for one in before)
    assert all(one.runner_up <= one.cosine + 1e-5 for one in before)
    weights, report = calibrate(model, texts, (0.0, 0.1), num_steps=2, search="corrector")
    assert report["n"] == 12 == sum(part["n"] for part in report["bins"])
    assert all(part["from"] <= part["probability"] <= part["to"] for part in report["bins"])
    store(folder, weights, report)
    again = load(folder)
    assert again.calibration == pytest.approx(weights)
    assert json.loads((folder / "config.json").read_text())["record"]["calibration"] == report
    for one in invert_strings(again, texts, num_steps=2):
        assert one.confidence == pytest.approx(float(probability(weights, one.cosine, one.runner_up)))
        assert one.to_dict()["confidence"] == one.confidence
    plot_reliability(report, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give 8 or more"):
        calibrate(load(make_model(tmp_path)), make_texts(3), (0.0,))
