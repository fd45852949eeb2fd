"""Model folders: what is saved comes back, and what is damaged is refused in one sentence."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import v2t_jax
from tests.helpers.tiny_run import make_embedder, make_texts
from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.inversion import pipeline
from v2t_jax.inversion.pipeline import CARD_HEAD, InversionPipeline, load
from v2t_jax.models.ranker import NETWORKS

T5 = T5Config(vocab_size=60, d_model=64, d_kv=32, d_ff=128, num_heads=2, num_encoder_layers=1, num_decoder_layers=1)
MODEL = ModelConfig(t5=T5, embedding_width=16, num_pseudo_tokens=2, max_length=8, standardize=True, bag_of_words=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random networks on a tiny embedder, as training would hand them over."""
    embedder = load_embedder(str(make_embedder(tmp_path_factory.mktemp("embedder") / "embedder")))
    params = {
        name: jax.jit(network(MODEL).init_params)(jax.random.key(i))
        for i, (name, network) in enumerate(NETWORKS.items())
    }
    return InversionPipeline("test", MODEL, params, embedder, Vocabulary.full(embedder.tokenizer))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder, record={"recipe": {"seed": 3}}, card="# A model\n")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def edit_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(change(config)))


def test_a_saved_model_is_the_same_model(model, saved):
    loaded = v2t_jax.load(str(saved))
    assert (loaded.name, loaded.config, loaded.has_corrector) == ("test", MODEL, True)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)
    np.testing.assert_array_equal(loaded.vocabulary.vocab_map, model.vocabulary.vocab_map)
    e = model.embedder.embed(make_texts(4))
    ours, theirs = (m.correction_loop(sequence_beam_width=2)(m.loop_params(), e, 2) for m in (model, loaded))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_what_a_folder_holds(saved):
    names = sorted(file.name for file in saved.iterdir())
    weights = [f"{name}.safetensors" for name in ("corrector", "inverter", "pieces", "ranker")]
    assert names == ["README.md", "config.json", *weights]
    config = json.loads((saved / "config.json").read_text())
    assert config["record"] == {"recipe": {"seed": 3}}
    assert (saved / "README.md").read_text() == f"{CARD_HEAD}# A model\n"
    for name, sha256 in config["files"].items():
        assert hashlib.sha256((saved / name).read_bytes()).hexdigest() == sha256
    assert [file.name for file in saved.parent.iterdir()] == ["model"]  # nothing half-built is left


def test_saving_again_replaces(model, folder):
    (folder / "stray").write_text("")
    only = dataclasses.replace(model, params={"inverter": model.params["inverter"]})
    only.save(folder, record={})
    assert not (folder / "stray").exists() and not (folder / "corrector.safetensors").exists()
    loaded = load(str(folder))
    assert not loaded.has_corrector and list(loaded.params) == ["inverter"]


def test_quantized(model, saved, tmp_path):
    model.save(tmp_path / "small", record={}, quantize=True)
    loaded = load(str(tmp_path / "small"))
    for stage, params in model.params.items():

        def close(path, true, found):
            name = jax.tree_util.keystr(path)
            axis = -1 if "token_embedding" in name else -2
            step = np.abs(true).max(axis, keepdims=True) / 127 if np.ndim(true) > 1 else 0.0
            # Half a step either way, and rounding.
            assert (np.abs(true - found) <= 0.5 * step + 1e-6).all(), name
            if true.ndim < 2 or true.size < 4096:
                np.testing.assert_array_equal(true, found)

        jax.tree_util.tree_map_with_path(close, params, loaded.params[stage])
        tensors = load_file(tmp_path / "small" / f"{stage}.safetensors")
        assert tensors["hidden/kernel" if stage == "ranker" else "t5/decoder/layers/feed_forward/wi"].dtype == np.int8
        sizes = [(f / f"{stage}.safetensors").stat().st_size for f in (tmp_path / "small", saved)]
        assert sizes[0] < (0.7 if stage == "ranker" else 0.45) * sizes[1]


def test_quantized_vectors_are_half_precision(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "QUANTIZED_SIZE", 8)
    model.save(tmp_path / "small", record={}, quantize=True)
    loaded, halves = load(str(tmp_path / "small")).params, 0
    for stage, params in model.params.items():
        tensors = load_file(tmp_path / "small" / f"{stage}.safetensors")
        found = flatten_dict(loaded[stage], sep="/")
        for name, true in flatten_dict(params, sep="/").items():
            if np.ndim(true) == 1 and np.size(true) >= 8:
                assert tensors[name].dtype == np.float16
                np.testing.assert_allclose(found[name], true, rtol=2**-11, atol=1e-7)
                halves += 1
    assert halves


def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        model.save(tmp_path / "file" / "model", record={})


def test_a_folder_of_other_things_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="aren't a model's"):
        model.save(tmp_path, {})
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_model_of_longer_texts_than_its_embedder_reads(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["max_length"] = 1000
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="max_length is 1000"):
        load(str(folder))


def test_no_such_model():
    with pytest.raises(InputError, match="There is no model 'no-such-model': pass a model folder, a packaged name"):
        load("no-such-model")


@pytest.mark.parametrize("name", ["inverter.safetensors", "corrector.safetensors", "pieces.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "empty"])
def test_damaged_weights(folder, name, damage):
    file = folder / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[: len(content) // 2], "altered": content, "empty": b""}[damage])
    message = f"{name} is missing" if damage == "missing" else f"{name} is truncated or altered"
    with pytest.raises(InputError, match=message):
        load(str(folder))


def test_weights_that_are_no_safetensors(folder):
    """Even with the hash that config.json names, nothing but safetensors is read."""
    content = b"not tensors"
    (folder / "inverter.safetensors").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    edit_config(folder, lambda c: c | {"files": c["files"] | {"inverter.safetensors": sha256}})
    with pytest.raises(InputError, match="damaged or no safetensors file"):
        load(str(folder))


@pytest.mark.parametrize(
    "tensors",
    [{"other": np.arange(4)}, {}, {"pieces": np.zeros((2, 2), np.int32)}, {"pieces": np.zeros(4, np.float32)}],
)
def test_pieces_that_are_none(folder, tensors):
    save_file(tensors, folder / "pieces.safetensors")
    sha256 = hashlib.sha256((folder / "pieces.safetensors").read_bytes()).hexdigest()
    edit_config(folder, lambda c: c | {"files": c["files"] | {"pieces.safetensors": sha256}})
    with pytest.raises(InputError, match="pieces.safetensors doesn't hold a row of integers"):
        load(str(folder))


@pytest.mark.parametrize("max_length", [True, "32", 3.5, 2, 0])
def test_a_length_that_no_embedder_has(folder, max_length):
    edit_config(folder, lambda c: c | {"embedder": c["embedder"] | {"max_length": max_length}})
    with pytest.raises(InputError, match="Expected `int.* - at `.*embedder.max_length`"):
        load(str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'"text"', b"null"])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="(is not readable JSON|holds no JSON object).*; download it again"):
        load(str(folder))


def test_a_folder_without_config(tmp_path):
    with pytest.raises(InputError, match="is not a model folder"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "Invalid enum value 2 - at `\\$.format_version`"),
        ({"name": 3}, "Expected `str`, got `int`"),
        ({"files": []}, "Expected `object`, got `array`"),
        ({"files": {}}, "lacks inverter.safetensors or pieces.safetensors"),
        ({"embedder": "name"}, "Expected `object`, got `str`"),
        ({"embedder": {"name": "all-MiniLM-L6-v2"}}, "all-MiniLM-L6-v2, whose weights aren't known"),
        (
            {"embedder": {"name": "all-MiniLM-L6-v2", "weights_sha256": "", "prefix": 5}},
            "Expected `str . null`, got `int`",
        ),
        ({"embedder": {"name": "no-such-embedder", "weights_sha256": "0"}}, "There is no embedder"),
        ({"embedder": {"name": "a-service", "weights_sha256": ""}}, "a-service, whose weights aren't known"),
        ({"embedding_norm": [1, "0"]}, "Expected `float`, got `str` - at .*embedding_norm"),
        ({"model": 5}, "model must be an object"),
        ({"model": {"no_such_field": 1}}, "unknown field 'no_such_field'"),
        ({"model": {"max_length": "8"}}, "model.max_length is '8'; it must be a whole number"),
        ({"model": {"max_length": 1}}, "max_length is 1; it must be a whole number >= 2"),
        ({"model": {"t5": {"feed_forward": "swish"}}}, "model.t5.feed_forward is 'swish'"),
        ({"model": {"t5": {"d_model": [64]}}}, "model.t5.d_model"),
    ],
)
def test_an_altered_config(folder, change, message):
    edit_config(folder, lambda config: config | change)
    with pytest.raises(InputError, match=message):
        load(str(folder))


@pytest.mark.parametrize("field", ["name", "embedder", "model", "files"])
def test_a_config_that_lacks_a_field(folder, field):
    edit_config(folder, lambda config: {key: value for key, value in config.items() if key != field})
    with pytest.raises(InputError, match=f"missing required field `{field}`"):
        load(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pseudo_tokens": 3}, "projection/output.* has shape .* config.json implies"),
        ({"standardize": False}, "holds the unknown parameter 'statistics/mean'"),
        ({"t5": {"tie_word_embeddings": False}}, "lacks the parameter 't5/lm_head'"),
    ],
)
def test_weights_of_another_model(folder, change, message):
    def merged(config):
        t5 = config["model"]["t5"] | change.get("t5", {})
        return config | {"model": config["model"] | change | {"t5": t5}}

    edit_config(folder, merged)
    with pytest.raises(InputError, match=message):
        load(str(folder))


def test_another_embedder(folder, tmp_path):
    other = make_embedder(tmp_path / "embedder", seed=9)
    edit_config(folder, lambda c: c | {"embedder": c["embedder"] | {"name": str(other)}})
    with pytest.raises(InputError, match="was made with an embedder whose weights_sha256 is"):
        load(str(folder))


def test_an_embedder_of_another_kind(model, folder):
    with pytest.raises(InputError, match="The embedder is of type function; .*CallableEmbedder.function."):
        load(str(folder), lambda texts: texts)
    assert load(folder, folder.parent / model.embedder.name).name == model.name
    with pytest.raises(InputError, match="There is no model '.*nowhere'"):
        load(folder / "nowhere")


def test_an_embedder_that_cannot_be_compared(model, folder):
    unknown = dataclasses.replace(model.embedder, name="another", weights_sha256="")
    with pytest.warns(UserWarning, match="was trained for .*; that another is the same embedder can't be checked"):
        load(str(folder), unknown)
    load(str(folder), dataclasses.replace(unknown, name=model.embedder.name))  # no warning, which would be an error
    load(str(folder), dataclasses.replace(model.embedder, name="moved"))
    edit_config(folder, lambda c: c | {"embedder": c["embedder"] | {"weights_sha256": ""}})
    with pytest.warns(UserWarning, match="that moved is the same embedder can't be checked"):
        load(str(folder), dataclasses.replace(model.embedder, name="moved"))


def test_the_same_weights_pooled_in_another_way(model, folder):
    """The weights' hash can't tell them apart: the vectors do."""
    lies = model.embedder.name
    for name, field in ((f"cls@{lies}", "pooling is 'mean', but .* 'cls'"), (f"mean@{lies}", "normalize is True, but")):
        for given in (name, load_embedder(name)):
            with pytest.raises(InputError, match=f"{model.name} was made with an embedder whose {field}"):
                load(str(folder), given)
    with pytest.raises(InputError, match="whose prefix is '', but that of .* is 'the '"):
        load(str(folder), load_embedder(lies, prefix="the "))
    with pytest.raises(InputError, match="whose max_length is 32, but that of .* is 12"):
        load(str(folder), model.embedder.shortened(12))


def test_a_folder_of_an_earlier_version_is_compared_in_what_it_recorded(model, folder):
    old = ("name", "weights_sha256", "max_length", "prefix")
    edit_config(folder, lambda c: c | {"embedder": {name: c["embedder"][name] for name in old}})
    assert load(str(folder)).embedder.config == model.embedder.config
    assert load(str(folder), f"cls@{model.embedder.name}").embedder.config.pooling == "cls"
    with pytest.raises(InputError, match="whose prefix is ''"):
        load(str(folder), load_embedder(model.embedder.name, prefix="the "))


def test_a_prefix_is_kept(model, folder, tmp_path):
    assert load(str(folder)).embedder.config.prefix == ""
    embedder = load_embedder(model.embedder.name, prefix="the ")
    dataclasses.replace(model, embedder=embedder).save(tmp_path / "prefixed", record={})
    loaded = load(str(tmp_path / "prefixed"))
    assert loaded.embedder.config == embedder.config
    np.testing.assert_array_equal(loaded.embedder.embed(["cat"]), embedder.embed(["cat"]))
    assert np.abs(loaded.embedder.embed(["cat"]) - model.embedder.embed(["cat"])).max() > 1e-3


def test_files_outside_the_folder_are_not_read(folder, tmp_path):
    save_file({"pieces": np.zeros(2, np.int32)}, tmp_path / "pieces.safetensors")
    sha256 = hashlib.sha256((tmp_path / "pieces.safetensors").read_bytes()).hexdigest()
    edit_config(folder, lambda c: c | {"files": c["files"] | {"../pieces.safetensors": sha256}})
    with pytest.raises(InputError, match="truncated or altered"):
        load(str(folder))
