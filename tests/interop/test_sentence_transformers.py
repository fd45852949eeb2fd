"""Reading an embedder's folder: what it asks for is done, or refused in a sentence."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_run import make_embedder

from v2t_jax.errors import InputError
from v2t_jax.interop.sentence_transformers import load_embedder

TYPE = "sentence_transformers.models."


@pytest.fixture
def folder(tmp_path):
    return make_embedder(tmp_path / "embedder")


def change(file, **values):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def add_dense(folder, activation="torch.nn.modules.linear.Identity"):
    """A dense layer that doubles the first 8 of 16 dimensions, without normalisation behind it."""
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": 2 * np.eye(8, 16, dtype=np.float32)}, folder / "2_Dense" / "model.safetensors")
    change(folder / "2_Dense" / "config.json", activation_function=activation, bias=False, out_features=8)
    modules = json.loads((folder / "modules.json").read_text())[:2]
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": f"{TYPE}Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_default_prompt_stands_before_every_text(folder):
    plain = load_embedder(str(folder))
    prompts = {"query": "the cat sees ", "passage": "a dog"}
    change(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query")
    prompted = load_embedder(str(folder))
    np.testing.assert_allclose(prompted.embed(["a bird"]), plain.embed(["the cat sees a bird"]), atol=1e-6)
    change(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=None)
    np.testing.assert_array_equal(load_embedder(str(folder)).embed(["a bird"]), plain.embed(["a bird"]))


def test_a_dense_layer(folder):
    modules = json.loads((folder / "modules.json").read_text())[:2]
    (folder / "modules.json").write_text(json.dumps(modules))
    pooled = load_embedder(str(folder)).embed(["a bird sees the cat"])
    add_dense(folder)
    dense = load_embedder(str(folder))
    assert dense.width == 8
    np.testing.assert_allclose(dense.embed(["a bird sees the cat"]), 2 * pooled[:, :8], atol=1e-5)
    change(folder / "2_Dense" / "config.json", activation_function="torch.nn.modules.activation.Tanh")
    tanh = load_embedder(str(folder)).embed(["a bird sees the cat"])
    np.testing.assert_allclose(tanh, np.tanh(2 * pooled[:, :8]), atol=1e-5)


def no_pooling(folder):
    change(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False)


def another_order(folder):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[::-1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: add_dense(folder, "torch.nn.modules.activation.ReLU"), "the activation 'relu'"),
        (lambda folder: change(folder / "config.json", hidden_act="relu"), "hidden_act 'relu'"),
        (lambda folder: change(folder / "config.json", position_embedding_type="relative_key"), "'relative_key'"),
        (lambda folder: change(folder / "config.json", model_type="gpt2"), "'gpt2' encoder"),
        (another_order, "holds Normalize, Pooling, Transformer; supported are"),
        (no_pooling, "exactly one supported mode"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "lack or garble 'hidden_size'"),
        (lambda folder: (folder / "modules.json").write_text('[{"path": ""}]'), "lack or garble 'type'"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "lack or garble"),
        (lambda folder: (folder / "modules.json").unlink(), "modules.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "only safetensors weights"),
        (lambda folder: os.truncate(folder / "model.safetensors", 500), "truncated"),
    ],
)
def test_folders_that_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_embedder(str(folder))


@pytest.mark.parametrize("name", ["no-such-embedder", "x" * 300, "nul\0"])
def test_no_such_embedder(name):
    with pytest.raises(InputError, match="There is no embedder"):
        load_embedder(name)
