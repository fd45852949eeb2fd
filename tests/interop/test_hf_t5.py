"""The key table between Hugging Face's T5 and ours, both directions, and what it refuses."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.equivalence import Case, load, state_dict, t5_of
from v2t_jax.config import T5Config
from v2t_jax.errors import InputError
from v2t_jax.interop.hf_t5 import load_t5, save_t5, t5_config_from_huggingface, t5_from_huggingface, t5_to_huggingface
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import T5

TINY = T5Config(vocab_size=11, d_model=6, d_kv=4, d_ff=5, num_heads=2, num_encoder_layers=2, num_decoder_layers=1)
V1_1 = dataclasses.replace(TINY, feed_forward="gated-gelu", tie_word_embeddings=False)


def make(config: T5Config) -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), T5(config).abstract_params())


@pytest.mark.parametrize("config", [TINY, V1_1], ids=["v1.0", "v1.1"])
def test_there_and_back_changes_nothing(config: T5Config) -> None:
    params = make(config)
    state = t5_to_huggingface(params)
    assert all(value.flags.c_contiguous and value.dtype == np.float32 for value in state.values())
    jax.tree.map(np.testing.assert_array_equal, t5_from_huggingface(state, config), params)


@pytest.mark.parametrize("name", ["t5_v1_0", "t5_v1_1"])
def test_back_and_there_gives_torch_its_own_keys(name: str) -> None:
    case: Case = load(name)
    config, params = t5_of(case)
    state, theirs = t5_to_huggingface(params), state_dict(case)
    assert set(state) == set(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(state[key], value.astype(np.float32), err_msg=key)


def test_copies_of_a_tied_embedding_and_dead_keys_are_accepted() -> None:
    state = t5_to_huggingface(make(TINY))
    for key in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        state[key] = state["shared.weight"]
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros((32, 2), np.float32)
    t5_from_huggingface(state, TINY)


QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


def _without(state: Case) -> None:
    del state[QUERY]


def _with_unknown(state: Case) -> None:
    state["decoder.block.1.layer.0.layer_norm.weight"] = np.ones(6, np.float32)


def _transposed(state: Case) -> None:
    state[QUERY] = state[QUERY].T


def _untied(state: Case) -> None:
    state["lm_head.weight"] = state["shared.weight"] + 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without, f"lack '{QUERY}'"),
        (_with_unknown, "unknown key 'decoder.block.1.layer.0.layer_norm.weight'"),
        (_transposed, rf"'{QUERY}' has shape \(6, 8\); its config implies \(8, 6\)"),
        (_untied, "'lm_head.weight' differs from 'shared.weight'"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_refuses_and_names_the_key(spoil: Callable[[Case], None], words: str) -> None:
    state = t5_to_huggingface(make(TINY))
    spoil(state)
    with pytest.raises(InputError, match=words):
        t5_from_huggingface(state, TINY)


def test_reads_published_configs() -> None:
    v1_1 = t5_config_from_huggingface(json.loads(str(load("t5_v1_1")["config"])))
    assert (v1_1.feed_forward, v1_1.tie_word_embeddings) == ("gated-gelu", False)
    assert (v1_1.num_encoder_layers, v1_1.num_decoder_layers) == (2, 1)
    # t5-small's, from the time before there was a v1.1
    t5_small = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_heads": 8, "num_layers": 6}
    t5_small |= {"relative_attention_num_buckets": 32, "model_type": "t5"}
    assert t5_config_from_huggingface(t5_small) == T5Config()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "model_type 'bert'"),
        ({"feed_forward_proj": "gated-silu"}, "feed-forward 'gated-silu'"),
        ({"feed_forward_proj": [1]}, "'feed_forward_proj' expected str"),
        ({"d_model": "32"}, "'d_model' expected int, got str"),
        ({"d_ff": 10**400}, "d_ff = 10000.*; it must be a whole number from 1"),
        ({"num_heads": "x"}, "'num_heads' expected int"),
        ({"num_layers": 2.0}, "'num_layers' expected int, got float"),
        ({"num_layers": True}, "'num_layers' expected int, got bool"),
        ({"num_decoder_layers": "2"}, "'num_decoder_layers' with value '2'"),
        ({"relative_attention_max_distance": "x"}, "'relative_attention_max_distance' expected int"),
        ({"dropout_rate": "x"}, "'dropout_rate' with value 'x'"),
        ({"layer_norm_epsilon": "x"}, "'layer_norm_epsilon' expected float"),
        ({"layer_norm_epsilon": 10**400}, "'layer_norm_epsilon' expected float, got int"),
    ],
)
def test_refuses_a_config_of_something_else(change: dict, words: str) -> None:
    config = {**json.loads(str(load("t5_v1_0")["config"])), **change}
    with pytest.raises(InputError, match=words):
        t5_config_from_huggingface(config)
    with pytest.raises(InputError, match=words):  # null is as good as nothing
        t5_config_from_huggingface({name: value for name, value in config.items() if value is not None})


def test_null_is_the_default_and_no_dropout_is_a_rate() -> None:
    config = json.loads(str(load("t5_v1_0")["config"]))
    nulls = ("num_decoder_layers", "relative_attention_max_distance", "layer_norm_epsilon", "dropout_rate")
    read = t5_config_from_huggingface(config | dict.fromkeys(nulls))
    assert (read.num_decoder_layers, read.dropout_rate, read.layer_norm_epsilon) == (read.num_encoder_layers, 0.1, 1e-6)
    assert t5_config_from_huggingface(config | {"dropout_rate": 0}).dropout_rate == 0.0


@pytest.mark.parametrize("config", [TINY, V1_1], ids=["v1.0", "v1.1"])
def test_a_folder_of_ours(config: T5Config, tmp_path: Path) -> None:
    params = make(config)
    save_t5(tmp_path / "t5", config, params)
    loaded_config, loaded = load_t5(str(tmp_path / "t5"))
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(InputError, match="t5 exists already; give a new or an empty folder"):
        save_t5(tmp_path / "t5", config, params)
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(InputError, match="model.safetensors is damaged"):
        load_t5(str(tmp_path / "t5"))
    (tmp_path / "t5" / "config.json").unlink()
    with pytest.raises(InputError, match="config.json is missing: .* is not a T5 folder"):
        load_t5(str(tmp_path / "t5"))


def test_parameters_of_another_config_are_not_written(tmp_path: Path) -> None:
    params = make(TINY)
    for changes, message in (
        ({"d_ff": TINY.d_ff + 1}, "DenseReluDense.* has shape .*; its config implies"),
        ({"num_encoder_layers": 1, "num_decoder_layers": 1}, "hold the unknown key 'encoder.block.1."),
        ({"tie_word_embeddings": False}, "weights lack 'lm_head.weight'"),
    ):
        with pytest.raises(InputError, match=message):
            save_t5(str(tmp_path / "t5"), dataclasses.replace(TINY, **changes), params)
    assert not any(tmp_path.iterdir())


def test_a_head_is_a_copy_only_where_transformers_leaves_it_out(tmp_path: Path) -> None:
    """Its version 5, whose configs have `scale_decoder_outputs`; elsewhere the file was cut short."""
    params = make(V1_1)
    save_t5(tmp_path / "t5", V1_1, params)
    file, settings = tmp_path / "t5" / "model.safetensors", tmp_path / "t5" / "config.json"
    save_file({key: value for key, value in load_file(file).items() if key != "lm_head.weight"}, file)
    with pytest.raises(InputError, match="T5 weights lack 'lm_head.weight'"):
        load_t5(str(tmp_path / "t5"))
    values = json.loads(settings.read_text()) | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    settings.write_text(json.dumps(values))
    config, loaded = load_t5(str(tmp_path / "t5"))
    assert config == V1_1
    np.testing.assert_array_equal(loaded["lm_head"].T, params["token_embedding"])


def test_no_such_t5() -> None:
    with pytest.raises(InputError, match="not a name on the hub"):
        load_t5("no/such/folder")
    with pytest.raises(InputError, match="hub"):  # tests are offline
        load_t5("no-such/t5")
