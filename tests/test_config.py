"""One schema: round trips, and one sentence for everything that isn't in it."""

import dataclasses
import json
from pathlib import Path

import pytest

from v2t_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    T5Config,
    from_dict,
    load_recipe,
    to_dict,
)
from v2t_jax.errors import InputError

RECIPES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_survive_json(path):
    config = load_recipe(str(path))
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert config != Config()


def test_what_is_left_out_has_its_default():
    assert from_dict(Config, {}) == Config()
    config = from_dict(Config, {"model": {"t5": {"d_model": 64}}, "stages": ["inverter"]})
    assert config.model.t5 == dataclasses.replace(T5Config(), d_model=64)
    assert config.stages == ("inverter",)
    assert from_dict(OptimizerConfig, {"learning_rate": 1}).learning_rate == 1  # an int is a float, as in JSON


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "config has the unknown field 'sed'; known are name, embedder"),
        ({"model": {"t5": {"width": 1}}}, "config.model.t5 has the unknown field 'width'"),
        ({"model": 3}, "config.model must be an object with fields, not int"),
        ({"model": None}, "config.model must be an object with fields, not NoneType"),
        ({"seed": "1"}, "seed is '1'; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": True}, "seed is True; it must be a whole number"),
        ({"seed": [1]}, r"seed is \[1\]; it must be a whole number"),
        ({"seed": None}, "seed is None; it must be a whole number"),
        ({"name": 1}, "name is 1; it must be a string"),
        ({"corrector_from_inverter": 1}, "corrector_from_inverter is 1; it must be true or false"),
        ({"initial_embedding_std": "0.1"}, "initial_embedding_std is '0.1'; it must be a number"),
        ({"initial_embedding_std": True}, "it must be a number"),
        ({"embedder_dtype": "float16"}, "embedder_dtype is 'float16'; it must be .*bfloat16"),
        ({"stages": ["inverter", "writer"]}, "stages is .*writer"),
        ({"stages": "inverter"}, "stages is 'inverter'; it must be a list"),
        ({"data": {"bucket_lengths": [8, "9"]}}, "data.bucket_lengths is"),
        ({"inverter": {"optimizer": {"name": "sgd"}}}, "optimizer.name is 'sgd'; it must be .*adamw"),
    ],
)
def test_values_that_do_not_fit(values, message):
    with pytest.raises(InputError, match=message):
        from_dict(Config, values)


def test_no_object():
    with pytest.raises(InputError, match="model must be an object with fields, not list"):
        from_dict(ModelConfig, [], "model")


@pytest.mark.parametrize(
    ("schema", "values", "message"),
    [
        *((T5Config, {name: 0}, f"t5.{name} is 0") for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads")),
        (T5Config, {"num_encoder_layers": 0}, "num_encoder_layers"),
        (T5Config, {"num_decoder_layers": -1}, "num_decoder_layers"),
        (T5Config, {"dropout_rate": 1.0}, "dropout_rate"),
        (T5Config, {"dropout_rate": -0.1}, "dropout_rate"),
        (T5Config, {"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
        (T5Config, {"relative_attention_max_distance": 16}, "relative_attention_max_distance"),
        (ModelConfig, {"num_pseudo_tokens": 0}, "num_pseudo_tokens"),
        (ModelConfig, {"max_length": 1}, "max_length"),
        (ModelConfig, {"embedding_width": 0}, "embedding_width"),
        (OptimizerConfig, {"learning_rate": 0.0}, "learning_rate"),
        (OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate"),
        (OptimizerConfig, {"warmup_steps": -1}, "warmup_steps"),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay"),
        (OptimizerConfig, {"b1": 1.5}, "optimizer.b1 is 1.5; it must be a number < 1.0"),
        (OptimizerConfig, {"b1": 1.0}, "b1"),
        (OptimizerConfig, {"b2": -0.1}, "b2"),
        (OptimizerConfig, {"clip_norm": -1.0}, "clip_norm"),
        (OptimizerConfig, {"accumulate_steps": 0}, "accumulate_steps"),
        (StageConfig, {"num_steps": 0}, "num_steps"),
        (StageConfig, {"batch_size": 0}, "batch_size"),
        (
            StageConfig,
            {"batch_size": 6, "optimizer": OptimizerConfig(accumulate_steps=4)},
            "not divisible by optimizer.accumulate_steps=4",
        ),
        (DataConfig, {"sources": ()}, r"data.sources is \(\); it must be a list of length >= 1"),
        (DataConfig, {"span_share": 1.5}, "span_share"),
        (DataConfig, {"vocabulary_size": -1}, "vocabulary_size"),
        (EvalConfig, {"every_steps": -1}, "every_steps"),
        (EvalConfig, {"num_examples": 0}, "num_examples"),
        (DataConfig, {"weights": (1.0, 2.0)}, "data.weights"),
        (DataConfig, {"weights": (-1.0,)}, "data.weights"),
        (DataConfig, {"weights": (float("inf"),)}, "data.weights is .*; it must be a number that is finite"),
        (T5Config, {"scan_unroll": 0}, "scan_unroll"),
        (ModelConfig, {"projection_dropout": 1.0}, "projection_dropout"),
        (EvalConfig, {"num_steps": (0, -1)}, "num_steps"),
        (EvalConfig, {"num_steps": ()}, "num_steps"),
        (EvalConfig, {"sequence_beam_width": ()}, "sequence_beam_width"),
        (EvalConfig, {"sequence_beam_width": (1, 0)}, "sequence_beam_width"),
        (CheckpointConfig, {"every_steps": 0}, "every_steps"),
        (CheckpointConfig, {"keep": 0}, "keep"),
        (Config, {"stages": ()}, r"stages is \(\); it must be a list of length >= 1"),
        (Config, {"partial_hypotheses": True, "corrector": StageConfig(batch_size=3)}, "even number of rows"),
        (
            Config,
            {"partial_hypotheses": True, "edited_hypotheses": True, "corrector": StageConfig(batch_size=6)},
            "both a multiple of 4; it is 6",
        ),
        (Config, {"stages": ("ranker",)}, "give a trained model as initial_inverter"),
        (Config, {"log_every_steps": 0}, "log_every_steps"),
        (Config, {"initial_embedding_std": 0.0}, "initial_embedding_std"),
    ],
)
def test_a_config_that_exists_can_run(schema, values, message):
    with pytest.raises(InputError, match=message):
        schema(**values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no recipe"),
        ("def get_config(:", "failed to load"),
        ("import no_such_module_at_all", "failed to load"),
        ("1 / 0", "ZeroDivisionError"),
        ("def get_config():\n    return {}['name']", "KeyError"),
        ("x = 1", "must define get_config"),
        ("def get_config():\n    return {}", "must define get_config"),
        ("get_config = 3", "must define get_config"),
    ],
)
def test_recipes_that_do_not_work(tmp_path, content, message):
    file = tmp_path / "recipe.py"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        load_recipe(str(file))


def test_a_recipe_that_is_no_python_file(tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text("hello")
    with pytest.raises(InputError, match="is not a Python file"):
        load_recipe(str(file))
