"""Recipes that train from a built data set."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_run import make_recipe, make_tokenizer

from v2t_jax.data.build import BuildSettings, Workers, build
from v2t_jax.errors import InputError
from v2t_jax.interop.sentence_transformers import load_embedder
from v2t_jax.train import loop
from v2t_jax.train.loop import train
from v2t_jax.train.setup import prepare


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The tiny recipe, its text built."""
    folder = tmp_path_factory.mktemp("built")
    made = make_recipe(folder)
    embedder = load_embedder(made.embedder)
    settings = BuildSettings(held_out_share=0.1, chunk_bytes=2000, shard_bytes=6000)
    built = str(build(list(made.data.sources), folder / "data", embedder.tokenizer, settings, Workers()).folder)
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
    stored = setup.stores
    texts = stored.held_out(max(recipe.evaluation.num_examples, loop.NORM_TEXTS))
    assert setup.held_out == [t for t in setup.vocabulary.normalise(texts, recipe.model.max_length) if t]
    assert setup.hashes()["tokens"] == stored.sha256 and setup.model.t5.vocab_size == setup.vocabulary.size


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
    folder = build([str(source)], tmp_path / "built", other, settings, Workers()).folder
    with pytest.raises(InputError, match="was built with another tokenizer than the embedder's"):
        prepare(changed(recipe, sources=(str(folder),), held_out=str(folder)))
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match="manifest.json is missing: .* was never finished; run v2t data build"):
        prepare(changed(recipe, sources=(str(folder),), held_out=str(folder)))
    with pytest.raises(InputError, match="is a built data set"):  # its held-out texts are no source of texts
        prepare(changed(recipe, sources=("wordnet",), held_out=str(folder)))
