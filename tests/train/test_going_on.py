"""Training that goes on from a model: with its embedder, with another one, and with one of another width."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import v2t_jax
from tests.helpers.tiny_run import make_embedder, make_recipe, make_tokenizer
from v2t_jax import progress
from v2t_jax.config import BuildSettings, Config, Stage
from v2t_jax.data.build import build
from v2t_jax.data.recipe import make_batches
from v2t_jax.errors import InputError
from v2t_jax.models.layers import Params
from v2t_jax.parallel.mesh import make_mesh
from v2t_jax.train import setup as starting
from v2t_jax.train.loop import train
from v2t_jax.train.setup import STATISTICS_TEXTS, TrainContext, initial_params, prepare
from v2t_jax.train.step import Batch

WIDER = 24
NETWORKS: tuple[Stage, ...] = ("inverter", "corrector", "ranker")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("going_on")
    make_embedder(folder / "same_width", seed=11)
    make_embedder(folder / "wider", seed=11, width=WIDER)
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Config:
    made = make_recipe(folder)
    fast = dataclasses.replace(made.evaluation, num_steps=(0,), sequence_beam_width=(1,))
    stage = dataclasses.replace(made.inverter, num_steps=100)
    return dataclasses.replace(made, stages=NETWORKS, inverter=stage, corrector=stage, evaluation=fast)


@pytest.fixture(scope="module")
def model(recipe: Config, folder: Path) -> str:
    """A model whose inverter and corrector are trained, with a random ranker."""
    trained = train(dataclasses.replace(recipe, stages=("inverter", "corrector")), folder / "first")
    made, (_, params, _) = v2t_jax.load(str(trained)), starts(recipe)
    made.params = {**made.params, "ranker": params["ranker"]}
    made.save(folder / "model", record={})
    return str(folder / "model")


def going_on(recipe: Config, model: str, embedder: Path | None = None, **changes: Any) -> Config:
    """The recipe, starting from a model in all of its stages."""
    values = {f"initial_{stage}": model for stage in recipe.stages} | changes
    return dataclasses.replace(recipe, embedder=str(embedder or recipe.embedder), **values)


def starts(recipe: Config) -> tuple[TrainContext, dict[Stage, Params], dict[Stage, float]]:
    """Each stage's first parameters, and inverter's and corrector's loss a token with them, on a training batch."""
    context, params, losses = prepare(recipe), dict[Stage, Params](), dict[Stage, float]()
    mesh = make_mesh(recipe.mesh, jax.devices()[:1])
    for stage in recipe.stages:
        batches = make_batches(recipe, context.datasets, 64)
        params[stage] = initial_params(context, stage, params, batches, mesh)
        ids = batches(0)
        batch = Batch(ids, tokens=context.retokenize(ids) if context.retokenizes else None)
        if stage != "ranker":
            frozen = context.frozen(None if stage == "inverter" else params["inverter"])
            total, (_, tokens) = jax.jit(context.task(stage).loss, static_argnums=3)(params[stage], frozen, batch, None)
            losses[stage] = float(total / tokens)
    return context, params, losses


def test_with_the_same_embedder_everything_is_kept(recipe: Config, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "note", lambda text: pytest.fail(text))
    _, params, _ = starts(going_on(recipe, model))
    before = v2t_jax.load(model)
    for stage in NETWORKS:
        jax.tree.map(np.testing.assert_array_equal, params[stage], before.params[stage])


@pytest.mark.parametrize("name", ["same_width", "wider"])
def test_for_another_embedder_what_was_learned_of_text_is_kept(
    recipe: Config, model: str, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "note", said.append)
    context, params, losses = starts(going_on(recipe, model, folder / name))
    what = "all but what depends on the width of its vectors" if name == "wider" else "all of its weights"
    expected = f"of {model}, which was trained for {recipe.embedder}, and learns {folder / name}"
    assert said == [f"the {stage} keeps {what} {expected}" for stage in NETWORKS]
    before = v2t_jax.load(model).params
    batches = make_batches(context.config, context.datasets, 64)
    texts = [text for step in range(-(-STATISTICS_TEXTS // 64)) for text in context.vocabulary.decode(batches(step))]
    vectors = context.embedder.embed(texts)[:STATISTICS_TEXTS]
    for stage, projection in (("inverter", "projection"), ("corrector", "projection_difference")):
        old, new = before[stage], params[stage]
        jax.tree.map(np.testing.assert_array_equal, new["t5"], old["t5"])
        np.testing.assert_allclose(new["statistics"]["mean"], vectors.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(new["statistics"]["std"], vectors.std(axis=0), rtol=1e-3)
        if name == "same_width":
            jax.tree.map(np.testing.assert_array_equal, new[projection], old[projection])
            np.testing.assert_array_equal(new["bag_of_words"], old["bag_of_words"])
        else:
            assert new[projection]["hidden"]["kernel"].shape == (WIDER, WIDER)
            assert not np.asarray(new["bag_of_words"]).any()
    jax.tree.map(np.testing.assert_array_equal, params["ranker"]["gap"], before["ranker"]["gap"])
    _, _, at_random = starts(dataclasses.replace(recipe, embedder=str(folder / name)))
    for stage in ("inverter", "corrector"):
        assert losses[stage] < 0.95 * at_random[stage], (losses, at_random)


def test_a_run_for_an_embedder_of_another_width_ends_in_a_model_for_it(
    recipe: Config, model: str, folder: Path, tmp_path: Path
) -> None:
    stage = dataclasses.replace(recipe.inverter, num_steps=30)
    short = dataclasses.replace(recipe, stages=("inverter",), inverter=stage, log_every_steps=1)
    made = v2t_jax.load(str(train(going_on(short, model, folder / "wider"), tmp_path)))
    assert made.config.embedding_width == made.embedder.width == WIDER and made.embedder.name == str(folder / "wider")
    lines = [json.loads(line) for line in (tmp_path / "inverter" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_a_network_that_is_not_trained_needs_its_own_embedder(
    recipe: Config, model: str, folder: Path, tmp_path: Path
) -> None:
    alone = dataclasses.replace(recipe, stages=("corrector",), initial_inverter=model)
    for name in ("same_width", "wider"):
        with pytest.raises(InputError, match="was made with an embedder whose weights_sha256 is .*: give the embedder"):
            train(going_on(alone, model, folder / name), tmp_path / name)


@pytest.fixture(scope="module")
def cased(folder: Path) -> Path:
    """An embedder with another tokenizer."""
    made, tokenizer = make_embedder(folder / "cased", seed=12), make_tokenizer()
    tokenizer.normalizer = None
    tokenizer.save(str(made / "tokenizer.json"))
    return made


def test_another_vocabulary_is_refused(
    recipe: Config, model: str, folder: Path, cased: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = f"{model} writes another vocabulary than this recipe's texts have: give its tokenizer as data.tokenizer"
    with monkeypatch.context() as patched:
        patched.setattr(starting, "open_texts", lambda *_: pytest.fail("it read texts"))
        with pytest.raises(InputError, match=refused):
            prepare(going_on(recipe, model, cased))
    source, built = recipe.data.sources[0], str(tmp_path / "built")
    build([source], Path(built), make_tokenizer(), BuildSettings(vocabulary_size=20, held_out_share=0.1))
    data = dataclasses.replace(recipe.data, sources=(built,), held_out=built)
    with pytest.raises(InputError, match=refused):
        prepare(going_on(recipe, model, data=data))
    moved = shutil.copytree(model, tmp_path / "moved")
    values = json.loads((moved / "config.json").read_text())
    values["embedder"] |= {"name": str(tmp_path / "gone"), "weights_sha256": "0"}
    (moved / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="moved writes the tokens of its embedder, whose tokenizer isn't here: .*gone"):
        prepare(going_on(recipe, str(moved), folder / "same_width"))


def test_an_embedder_with_another_tokenizer_learns_with_the_models(recipe: Config, model: str, cased: Path) -> None:
    data = dataclasses.replace(recipe.data, tokenizer=recipe.embedder)
    alone = dataclasses.replace(recipe, stages=("inverter",), data=data)
    context, _, losses = starts(going_on(alone, model, cased))
    assert context.retokenizes
    _, _, at_random = starts(dataclasses.replace(alone, embedder=str(cased)))
    assert losses["inverter"] < 0.95 * at_random["inverter"]


def test_other_sizes_are_refused(recipe: Config, model: str) -> None:
    larger = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_pseudo_tokens=3))
    with pytest.raises(
        InputError, match="The inverter of .* has other sizes than this recipe: give the recipe the mod"
    ):
        starts(going_on(larger, model))
