"""Training that starts from a T5 that exists, in front of an embedder with the same tokenizer."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import upstream_pair
from tests.helpers.equivalence import load
from tests.helpers.tiny_run import make_embedder, make_recipe, make_tokenizer
from v2t_jax.config import Config
from v2t_jax.data.batches import Batches, Batching
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.errors import InputError
from v2t_jax.interop.hf_t5 import load_t5
from v2t_jax.parallel.mesh import make_mesh
from v2t_jax.train.setup import check_t5, initial_params, prepare


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("initial")
    pair = upstream_pair.write_pair(load("vec2text_gtr"), folder / "pair")
    # The pair's embedder has a vocabulary of its own: here it gets the T5's.
    shutil.copy(pair / "t5-base" / "tokenizer.json", upstream_pair.embedder_of(pair))
    made = make_recipe(folder)
    return dataclasses.replace(
        made,
        embedder=f"mean@{upstream_pair.embedder_of(pair)}",
        initial_t5=str(pair / "t5-base"),
        data=dataclasses.replace(made.data, bucket_lengths=()),
        model=dataclasses.replace(made.model, standardize=False, max_length=24),
    )


def test_both_networks_start_from_it(recipe: Config) -> None:
    setup = prepare(recipe)
    config, params = load_t5(recipe.initial_t5)
    kept = recipe.model.t5
    assert setup.model.t5 == dataclasses.replace(config, dropout_rate=kept.dropout_rate, dtype=kept.dtype)
    batches = Batches(setup.datasets, Batching(batch_size=2, max_length=24, bucket_lengths=(24,)))
    for stage in recipe.stages:
        start = initial_params(setup, stage, {"inverter": {}}, batches, make_mesh(recipe.mesh))
        jax.tree.map(np.testing.assert_array_equal, start["t5"], params)
    assert "initial_t5" in setup.hashes()
    # The embedder's ids are the model's own.
    texts = setup.held_out[:3]
    ids = [np.append(row, 1) for row in setup.vocabulary.encode(texts)]
    longest = max(map(len, ids))
    e = setup.embed(np.stack([np.pad(row, (0, longest - len(row))) for row in ids]).astype(np.int32))
    np.testing.assert_allclose(e, setup.embedder.embed(texts), atol=1e-5)


def test_an_embedder_with_another_tokenizer_needs_the_recipe_to_name_t5s(recipe: Config, tmp_path: Path) -> None:
    other = dataclasses.replace(recipe, embedder=str(make_embedder(tmp_path / "embedder")))
    with pytest.raises(InputError, match="has another tokenizer than the texts.*: set data.tokenizer=.*t5-base"):
        prepare(dataclasses.replace(other, model=dataclasses.replace(recipe.model, max_length=8)))
    data = dataclasses.replace(recipe.data, tokenizer=recipe.initial_t5)
    context = prepare(dataclasses.replace(other, data=data))
    assert context.retokenizes and context.model.t5.d_model == load_t5(recipe.initial_t5)[0].d_model
    ids = context.vocabulary.encode(context.held_out[:1])[0][None]
    np.testing.assert_allclose(context.embed(ids), context.embedder.embed(context.held_out[:1]), atol=1e-5)


def test_a_data_set_with_another_tokenizer(recipe: Config) -> None:
    data = dataclasses.replace(recipe.data, embeddings="vectors", hypotheses="guesses", span_share=0.0)
    other = dataclasses.replace(recipe, embedder="http://host/v1", data=data)
    with pytest.raises(InputError, match="has another tokenizer than the texts"):
        check_t5(other, Vocabulary.full(make_tokenizer()))


def test_other_ways_to_start(recipe: Config) -> None:
    with pytest.raises(InputError, match="initial_t5 has its own token embeddings"):
        dataclasses.replace(recipe, initial_embedding="embedder")
