"""An inverter and a corrector with a tokenizer of their own, for a local embedder with another one."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import v2t_jax
from tests.helpers.tiny_run import WORDS, make_recipe
from v2t_jax.config import Config
from v2t_jax.data.recipe import make_batches
from v2t_jax.errors import InputError
from v2t_jax.parallel.mesh import make_mesh
from v2t_jax.train.loop import Feed, train
from v2t_jax.train.setup import prepare, random_params
from v2t_jax.train.step import FrozenParams


def make_own_tokenizer(folder: Path) -> Path:
    """Half words, as T5's pieces would be: other pieces, other special tokens and more of them than the embedder's."""
    halves = {part for word in WORDS for part in (word[:2], "##" + word[2:]) if part != "##"}
    pieces = ["<pad>", "</s>", "<unk>", *sorted(halves)]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("own")
    made = make_recipe(folder)
    tokenizer = str(make_own_tokenizer(folder / "tokenizer"))
    accumulating = dataclasses.replace(made.corrector.optimizer, accumulate_steps=2)
    return dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, tokenizer=tokenizer),
        model=dataclasses.replace(made.model, max_length=14),
        inverter=dataclasses.replace(made.inverter, num_steps=20),
        corrector=dataclasses.replace(made.corrector, num_steps=10, optimizer=accumulating),
        partial_hypotheses=True,
    )


def test_both_stages_train_and_the_model_is_loaded_and_inverts(recipe: Config, tmp_path: Path) -> None:
    folder = train(recipe, tmp_path)
    for stage in recipe.stages:
        lines = [json.loads(line) for line in (tmp_path / stage / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert losses[-1] < losses[0]
    model = v2t_jax.load(str(folder))
    assert model.has_corrector and not model.shares_vocabulary
    assert model.vocabulary.tokenizer.token_to_id("</s>") == 1
    texts = prepare(recipe).held_out[: recipe.evaluation.num_examples]
    found = v2t_jax.invert_strings(model, texts, num_steps=1, sequence_beam_width=1, mode="best")
    assert [one.reference for one in found] == texts and all(np.isfinite(one.cosine) for one in found)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["num_steps"] for row in report["rows"]] == [0, 2, 0, 2]


def test_batches_bring_texts_and_hypotheses_in_the_embedders_tokens(recipe: Config) -> None:
    context, mesh = prepare(recipe), make_mesh(recipe.mesh)
    assert context.retokenizes and context.in_step is not None
    batches = make_batches(recipe, context.datasets, recipe.corrector.batch_size)
    params = random_params("inverter", context.model, mesh)[0](np.asarray(jax.random.key_data(jax.random.key(0))))
    frozen = FrozenParams(context.in_step.params, jnp.asarray(context.vocabulary.vocab_map), params)
    feed = Feed(context, "corrector", batches, frozen, mesh)
    for step in (0, 3):
        batch = feed.start(step)()
        for ids, found in ((batch.ids, batch.tokens), (batch.hypothesis, batch.hypothesis_tokens)):
            assert found is not None
            texts = context.vocabulary.decode(np.asarray(ids))
            expected = context.in_step.tokenize(texts)
            width = expected[0].sum(axis=0).nonzero()[0].max() + 1
            np.testing.assert_array_equal(np.asarray(found[0])[:, :width], expected[0][:, :width])
            assert not np.asarray(found[1])[:, width:].any()
        again = feed.start(step)()
        np.testing.assert_array_equal(again.hypothesis, batch.hypothesis)
    embedded = context.embed(np.asarray(batch.ids))
    np.testing.assert_allclose(
        embedded, context.embedder.embed(context.vocabulary.decode(np.asarray(batch.ids))), atol=1e-5
    )


def test_word_embeddings_of_another_vocabulary_are_no_start(recipe: Config) -> None:
    with pytest.raises(InputError, match="initial_embedding=embedder needs the tokenizer and the weights of"):
        prepare(dataclasses.replace(recipe, initial_embedding="embedder"))
