"""Recipes that train from a built data set."""

import dataclasses
import json

import numpy as np
import pytest

from tests.helpers.tiny_run import make_recipe, make_tokenizer
from v2t_jax.config import BuildSettings
from v2t_jax.data.build import build
from v2t_jax.data.dataset import BLOCK_ROWS
from v2t_jax.data.recipe import make_batches
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.train import loop
from v2t_jax.train.loop import train
from v2t_jax.train.precompute import embed_column, hypothesis_columns
from v2t_jax.train.setup import prepare


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny recipe, its text built."""
    folder = tmp_path_factory.mktemp("built")
    made = make_recipe(folder)
    embedder = load_embedder(made.embedder)
    settings = BuildSettings(held_out_share=0.1)
    built = str(build(list(made.data.sources), folder / "data", embedder.tokenizer, settings).folder)
    stage = dataclasses.replace(made.inverter, num_steps=2)
    return dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, sources=(built,), held_out=built),
        inverter=stage,
        stages=("inverter",),
        evaluation=dataclasses.replace(made.evaluation, num_steps=(0,), sequence_beam_width=(1,)),
    )


def test_a_run_trains_from_it(recipe, tmp_path):
    assert (train(recipe, tmp_path) / "inverter.safetensors").is_file()
    lines = [json.loads(line) for line in (tmp_path / "inverter" / "log.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[0]["loss"]) and lines[0]["step"] == 2
    assert json.loads((tmp_path / "evaluation.json").read_text())["n"] == recipe.evaluation.num_examples


def test_the_held_out_texts_are_its_own_cut_to_the_model(recipe):
    setup = prepare(recipe)
    (stored,) = setup.datasets
    texts = stored.held_out(max(recipe.evaluation.num_examples, loop.NORM_TEXTS))
    assert setup.held_out == [t for t in setup.vocabulary.normalize(texts, recipe.model.max_length) if t]
    assert setup.hashes()["tokens"] == stored.manifest_sha256 and setup.model.t5.vocab_size == setup.vocabulary.size


def changed(recipe, **fields):
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"held_out": "wordnet"}, "is a recipe's only source and holds out its own texts"),
        ({"sources": ("BUILT", "wordnet")}, "is a recipe's only source"),
        ({"vocabulary_size": 9}, "data.vocabulary_size is for texts in memory"),
        ({"weights": (2.0,)}, "data.weights is for texts in memory"),
    ],
)
def test_settings_that_belong_to_texts_in_memory_are_refused(recipe, fields, message):
    built = recipe.data.held_out
    fields = {k: tuple(built if x == "BUILT" else x for x in v) if k == "sources" else v for k, v in fields.items()}
    with pytest.raises(InputError, match=message):
        prepare(changed(recipe, **fields))


def test_a_data_set_of_another_tokenizer_or_half_a_one_is_refused(recipe, tmp_path):
    other = make_tokenizer()
    other.normalizer = None
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(f"the cat sees {'a ' * i}dog" for i in range(1, 90)))
    settings = BuildSettings(held_out_share=0.3)
    folder = build([str(source)], tmp_path / "built", other, settings).folder
    with pytest.raises(InputError, match="was built with another tokenizer than the embedder's"):
        prepare(changed(recipe, sources=(str(folder),), held_out=str(folder)))
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="manifest.json is missing: .* was never finished; run 'v2t data build'"):
        prepare(changed(recipe, sources=(str(folder),), held_out=str(folder)))
    with pytest.raises(InputError, match="is a built data set"):  # its held-out texts are no source of texts
        prepare(changed(recipe, sources=("wordnet",), held_out=str(folder)))


def losses(workdir, stage):
    lines = [json.loads(line) for line in (workdir / stage / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_columns_stand_for_what_is_made_on_the_fly(recipe, tmp_path):
    """Embeddings and guesses read from columns train as those that a step makes, but for their rounding to float16."""
    recipe = dataclasses.replace(changed(recipe, span_share=0.0), log_every_steps=1)
    model = str(train(recipe, tmp_path / "first"))
    setup = prepare(recipe)
    (stored,) = setup.datasets
    length = recipe.model.max_length
    assert embed_column(stored, "vectors", setup.embedder, max_length=length)
    assert hypothesis_columns(stored, "guesses", [model])
    stage = dataclasses.replace(recipe.corrector, num_steps=8)
    second = dataclasses.replace(recipe, stages=("corrector",), initial_inverter=model, corrector=stage)
    train(second, tmp_path / "fly")
    read = changed(second, embeddings="vectors", hypotheses="guesses")
    train(read, tmp_path / "columns")
    assert len(losses(tmp_path / "fly", "corrector")) == 8
    np.testing.assert_allclose(
        losses(tmp_path / "columns", "corrector"), losses(tmp_path / "fly", "corrector"), atol=0.01
    )
    with pytest.raises(InputError, match="The column vectors was made with an embedder whose dtype is 'float32'"):
        train(dataclasses.replace(read, embedder_dtype="bfloat16"), tmp_path / "other")


def test_a_fold_is_left_out(recipe):
    recipe = changed(recipe, span_share=0.0)
    datasets = prepare(recipe).datasets
    seen = []
    for fold in range(2):
        batches = make_batches(changed(recipe, folds=2, fold=fold), datasets, 8)
        rows = np.concatenate([batches(step) for step in range(batches.steps_per_epoch)])
        seen.append({tuple(row) for row in rows.tolist()})
    for i, first in enumerate(range(0, len(datasets[0]), BLOCK_ROWS)):
        block = datasets[0].padded(slice(first, first + BLOCK_ROWS), recipe.model.max_length)
        whole = {tuple(row) for row in block.tolist()}
        assert not whole & seen[i % 2]


@pytest.mark.parametrize("fields", [{"folds": 2}, {"embeddings": "vectors"}, {"hypotheses": "guesses"}])
def test_texts_in_memory_have_no_folds_and_columns(recipe, fields):
    with pytest.raises(InputError, match="data.folds need a built data set in data.sources: v2t data build"):
        prepare(changed(recipe, sources=("wordnet",), held_out="wordnet", **fields))
