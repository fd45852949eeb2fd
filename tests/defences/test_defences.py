"""Defences keep and lose what they should, and the attacker who knows them gains by it; the commands' rows."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny_model import make_model
from v2t_jax.cli import main as cli
from v2t_jax.defences import adapt, measure, study
from v2t_jax.defences import vectors as defences
from v2t_jax.defences.attack import estimator, procrustes
from v2t_jax.defences.embedder import DefendedEmbedder
from v2t_jax.defences.measure import Attacked
from v2t_jax.defences.vectors import unit
from v2t_jax.embedders.base import ranges_of
from v2t_jax.errors import InputError
from v2t_jax.inversion import pipeline
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.vectors import cosines
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import TABLE
from v2t_jax.train.step import Batch, Task

WIDTH = 24


@pytest.fixture(scope="module")
def public() -> np.ndarray:
    """Vectors with few strong directions, as embeddings have them."""
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(2000, 6)) @ rng.normal(size=(6, WIDTH)) + 0.2 * rng.normal(size=(2000, WIDTH)) + 0.5)


@pytest.fixture(scope="module")
def e(public: np.ndarray) -> np.ndarray:
    return public[1900:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InversionPipeline:
    return pipeline.load(str(make_model(tmp_path_factory.mktemp("defences"))))


def test_a_rotation_keeps_every_distance_until_enough_pairs_are_known(public: np.ndarray, e: np.ndarray) -> None:
    turned = defences.rotation(WIDTH, key=7)
    stored = turned.store(e)
    np.testing.assert_allclose(stored @ stored.T, e @ e.T, atol=1e-5)
    np.testing.assert_allclose(turned.query(e[:3]) @ stored.T, e[:3] @ e.T, atol=1e-5)
    assert np.abs(cosines(stored, e)).mean() < 0.5

    def reached(known: int) -> float:
        return float(cosines(procrustes(turned.store(public[:known]), public[:known])(stored), e).min())

    assert reached(WIDTH + 6) > 0.9999 and reached(4) < 0.9


def test_what_quantization_rounds_off(public: np.ndarray, e: np.ndarray) -> None:
    low, high = ranges_of(public)
    for bits in (8, 4):
        step = (high - low) / (256 if bits == 8 else 15)
        # Lengths are brought back to 1 behind the rounding, which moves a number once more.
        assert (np.abs(defences.scalar(bits, public).store(e) - e) <= 1.6 * step).all()
    signs = defences.scalar(1, public).store(e)
    np.testing.assert_allclose(np.abs(signs), WIDTH**-0.5, rtol=1e-6)
    assert ((signs > 0) == (e > 0)).all()


def test_product_quantization_takes_the_nearest_centroids(public: np.ndarray, e: np.ndarray) -> None:
    stored = {parts: defences.product(parts, public).store(e) for parts in (2, 8)}
    assert cosines(stored[2], e).mean() < cosines(stored[8], e).mean() < 0.9999
    again = defences.product(8, public).store(e)
    np.testing.assert_array_equal(again, stored[8])
    # A code is that of the centroid with the least distance: no other row of what is stored is nearer in a part.
    part, every = slice(0, 3), defences.product(8, public).store(public)
    lengths = np.linalg.norm(every, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) and len(np.unique(np.round(every[:, part], 4), axis=0)) > 100


def test_widths_and_masks(public: np.ndarray, e: np.ndarray) -> None:
    np.testing.assert_allclose(defences.matryoshka(6).store(e), unit(e[:, :6]), atol=1e-6)
    directions = np.linalg.eigh(np.cov(public.T))[1][:, ::-1][:, :6]  # by another way than ours
    np.testing.assert_allclose(np.abs(defences.pca(6, public).store(e)), np.abs(unit(e @ directions)), atol=1e-4)
    masked = defences.masking(0.5, WIDTH).store(e)
    assert (masked == 0).all(axis=0).sum() == 12 and not (masked == 0).all(axis=1).any()
    noisy = defences.noise(0.5).store(e)
    assert cosines(noisy, e).mean() == pytest.approx(1 / (1 + 0.25) ** 0.5, abs=0.03)


def test_the_attacker_gains_on_every_defence(public: np.ndarray, e: np.ndarray) -> None:
    half = public[:1900]
    lossy = [defences.noise(0.5), defences.masking(0.5, WIDTH), defences.scalar(1, half), defences.product(2, half)]
    for one in lossy:
        stored = one.store(e)
        gained = cosines(estimator(one.store(half), half)(stored), e).mean()
        assert gained > cosines(stored, e).mean() + 0.003, one.name
    slight = defences.noise(0.02)  # where there is next to nothing to gain, nothing is lost either
    stored = slight.store(e)
    assert cosines(estimator(slight.store(half), half)(stored), e).mean() > cosines(stored, e).mean() - 1e-6
    for one in (defences.matryoshka(12), defences.pca(12, half)):
        assert cosines(estimator(one.store(half), half)(one.store(e)), e).mean() > 0.97
    # With few dimensions and much data, ridge regression is the least-squares solution.
    x, center = defences.matryoshka(4).store(half), half.mean(axis=0)
    solved = np.linalg.lstsq(x - x.mean(axis=0), half - center, rcond=None)[0]
    expected = unit((x[:9] - x.mean(axis=0)) @ solved + center)
    np.testing.assert_allclose(estimator(x, half)(x[:9]), expected, atol=2e-3)


def test_a_defended_embedder_embeds_as_a_store_holds(model: InversionPipeline) -> None:
    one = DefendedEmbedder(model.embedder, defences.matryoshka(8))
    texts = ["the red cat", "a dog"]
    np.testing.assert_array_equal(one.embed(texts), defences.matryoshka(8).store(model.embedder.embed(texts)))
    assert one.width == one.identity.width == 8 and one.identity.name == one.name
    assert one.name.endswith("embedder with first dimensions 8")
    with pytest.raises(InputError):
        one.embed(["  "])


def test_an_attacker_who_trains_fits_what_the_defence_leaves(
    model: InversionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the red cat", "a dog likes the house", "the old man sees a bird", "two fish near the river"] * 4
    monkeypatch.setattr(adapt, "read_texts", lambda *_, limit: texts[:limit])
    e, signs = unit(model.embedder.embed(texts)), defences.scalar(1, np.eye(model.embedder.width))
    coded, before = signs.store(e), model.params["inverter"]
    params = adapt.tuning(model, 150, e)(Attacked(signs, unit))

    def loss(params: Params, e: np.ndarray) -> float:
        ids = np.array([[*ids, 1] + [0] * (model.config.max_length - len(ids) - 1) for ids in encoded], np.int32)
        total, (_, tokens) = Task("inverter", model.config, None, None).loss(
            params, None, Batch(jnp.asarray(ids), jnp.asarray(e)), None
        )
        return float(total / tokens)

    encoded = model.vocabulary.encode(texts)
    assert loss(params, coded) < 0.8 * loss(before, coded)
    np.testing.assert_array_equal(params["t5"][TABLE], before["t5"][TABLE])
    tuned = measure.leakage(model, texts[:2], [Attacked(defences.none(), unit)], 1, num_steps=0, tune=lambda _: params)
    assert model.params["inverter"] is before and tuned[0]["n"] == 2


def test_recommended_is_what_leaks_least_within_two_points() -> None:
    def row(defence: str, exact: float, ndcg: float, pairs: int | None = None) -> dict[str, object]:
        means = {"exact_match": exact, "bleu": 100 * exact, "ndcg": ndcg, "ndcg_lost": 0.9 - ndcg}
        return {"defence": defence, "strength": "", "known_pairs": pairs} | {
            k: {"mean": v, "sem": None} for k, v in means.items()
        }

    rows = [row("none", 0.5, 0.9), row("weak", 0.4, 0.9), row("strong", 0.0, 0.5)]
    said = measure.recommendation(rows)
    assert "weak leaks least: exact match 40.0% instead of 50.0%" in said and "0.000 of 0.900 NDCG@10" in said
    turned = [row("rotation", 0.0, 0.9, 10), row("rotation", 0.45, 0.9, 1000)]
    assert "weak leaks least" in measure.recommendation(rows + turned)  # a rotation is judged by the most that is known
    assert "Nothing keeps" in measure.recommendation([rows[0], rows[2]])


def test_edits_differ_from_each_other_and_from_their_origin() -> None:
    import random

    made = study.edits("the old man sees a dog", ["cat", "river"], 300, random.Random(0))
    assert len(made) == len(set(made)) == 300 and "the old man sees a dog" not in made
    assert "the old man sees a cat" in study.edits("the old man sees a dog", ["cat"], 300, random.Random(0))


@pytest.mark.parametrize("command", [["defend"], ["study", "width"], ["study", "noise"], ["study", "length"]])
def test_the_commands(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path)
    texts = ["the red cat", "a dog likes the house", "the old man sees a bird", "two fish near the river", "one boat"]
    monkeypatch.setattr(measure, "read_texts", lambda *_, **__: texts * 60)
    monkeypatch.setattr("v2t_jax.eval.evaluate.read_texts", lambda *_, **__: texts)
    monkeypatch.setattr(measure, "DISTRACTORS", 20)
    monkeypatch.setattr(measure, "came_back", lambda *_: {"name": (1, 2)})
    plot, few = str(tmp_path / "plot.svg"), ["--num-steps", "0", "--known-pairs", "3", "20"] * (command == ["defend"])
    options = ["--model", str(tmp_path / "tiny"), "--limit", "2", "--budget", "1", "--plot", plot, *few]
    monkeypatch.setattr(sys, "argv", ["v2t", *command, *options, "--json"])
    with pytest.MonkeyPatch.context() as patch:
        # Sentences about people hold nothing that the tiny tokenizer knows.
        patch.setattr("v2t_jax.eval.personal.sentence", lambda _: ("the red boat", {"name": "a b"}))
        cli.main()
        found = json.loads(capsys.readouterr().out)
        monkeypatch.setattr(sys, "argv", ["v2t", *command, *options])
        cli.main()
    shown = capsys.readouterr().out
    names = [f"{row['defence']} {row['strength']}".strip() for row in found["rows"]]
    assert len(names) > 2 or command[-1] == "length"
    assert all(name in shown for name in names) and Path(plot).stat().st_size > 1000
    if command == ["defend"]:
        assert len(found["rows"]) == 1 + 18 + 2 and found["rows"][0]["recall"]["mean"] == 1
        assert found["rows"][-1]["recall"]["mean"] == 1 and "NDCG@10" in found["advice"]  # rotated, all distances stay
        assert {row["known_pairs"] for row in found["rows"]} == {None, 3, 20}


def test_collisions_finds_the_nearest_two(
    model: InversionPipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(study, "SEEDS", 1)
    monkeypatch.setattr(study, "evaluation_texts", lambda *_, **__: ["the red cat", "a dog", "the boat"])
    found = study.collisions(model, 40)
    first, second = found["nearest"]
    e = unit(model.embedder.embed([first, second])).astype(np.float64)
    assert found["distance"] == pytest.approx(float(np.linalg.norm(e[0] - e[1])), abs=1e-6)
    assert len(found["distances"]) == 3 and min(found["distances"]) == found["distance"] < found["median"]
    study.plot_collisions(found, tmp_path / "plot.svg", "toy")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    assert found["texts"] == 3 * 14 and first != second and found["shared"] == 0
    with pytest.raises(InputError, match="edits is 1"):
        study.collisions(model, 1)
