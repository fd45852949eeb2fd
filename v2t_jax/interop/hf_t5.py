"""T5 between Hugging Face's key names and ours, both directions, by one table. A tied embedding is stored once."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from v2t_jax import progress
from v2t_jax.config import T5Config
from v2t_jax.decode.state import EOS, PAD, START
from v2t_jax.errors import InputError
from v2t_jax.interop import files
from v2t_jax.interop.hub import folder_of
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import FEED_FORWARD, T5

# Fields that both spell alike.
_SIZES = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_decoder_layers"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
_RATES = ("layer_norm_epsilon", "dropout_rate")
# Copies of `shared.weight`, which a checkpoint may hold.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The oldest T5 checkpoints hold it, and no implementation reads it: cross-attention has no position bias.
_IGNORED = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"


def _stack(stack: str, *blocks: tuple[str, str, Iterable[str]]) -> dict[str, str]:
    """The table of an encoder or decoder whose layers consist of these blocks: (ours, theirs, matrices)."""
    layer = f"{stack}.block.{{}}.layer"
    table = {f"{stack}/final_norm": f"{stack}.final_layer_norm"}
    table[f"{stack}/relative_bias"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
    for i, (ours, theirs, matrices) in enumerate(blocks):
        table[f"{stack}/layers/{ours}_norm"] = f"{layer}.{i}.layer_norm"
        table |= {f"{stack}/layers/{ours}/{matrix}": f"{layer}.{i}.{theirs}.{matrix}" for matrix in matrices}
    return table


_SELF, _CROSS = ("self_attention", "SelfAttention", "qkvo"), ("cross_attention", "EncDecAttention", "qkvo")
_FEED_FORWARD = ("feed_forward", "DenseReluDense", ("wi", "wi_0", "wi_1", "wo"))
TABLE = {"token_embedding": "shared", "word_embedding": "shared", "lm_head": "lm_head"}
TABLE |= _stack("encoder", _SELF, _FEED_FORWARD) | _stack("decoder", _SELF, _CROSS, _FEED_FORWARD)


def load_t5(name: str, put: Callable = np.asarray) -> tuple[T5Config, Params]:
    """Sizes and parameters (float32, on the host) of a T5, v1.1 or Flan, by folder or hub name; `put` as in `fill`."""
    folder = folder_of(name)
    with progress.stage(f"loading the T5 {name}"):
        values = files.read_json(folder / "config.json", "a T5 folder")
        config, state = t5_config_from_huggingface(values), files.open_checkpoint(folder)
        # Since transformers 5, whose configs have this field, an untied head that equals the embedding isn't written.
        if "scale_decoder_outputs" in values and not config.tie_word_embeddings and "shared.weight" in state:
            state.setdefault("lm_head.weight", state["shared.weight"])
        return config, t5_from_huggingface(state, config, put)


def save_t5(folder: Path | str, config: T5Config, params: Params) -> None:
    """The inverse: config.json and model.safetensors as transformers reads them; whole or not at all."""
    state = t5_to_huggingface(params)
    t5_from_huggingface(state, config, put=lambda array: None)  # refuses parameters of another config
    with files.whole_folder(Path(folder)) as building:
        values = t5_config_to_huggingface(config)
        (building / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        save_file(state, building / files.SAFETENSORS, metadata={"format": "pt"})


def t5_from_huggingface(state: Mapping[str, files.Tensor], config: T5Config, put: Callable = np.asarray) -> Params:
    """Parameters (float32, on the host) from a state dict of `T5ForConditionalGeneration`; `put` as in `fill`."""
    copies = (*_COPIES, *(["lm_head.weight"] if config.tie_word_embeddings else []))
    ignored = "|".join([_IGNORED, *copies])
    params = files.fill(T5(config).abstract_params(), TABLE, state, "T5", ignored=ignored, put=put)
    for key in copies:
        if key in state and not np.array_equal(state[key][:], state["shared.weight"][:]):
            wrong = f"T5 weight {key!r} differs from 'shared.weight', of which it should be a copy"
            raise InputError(f"{wrong}; for an untied head the config must say tie_word_embeddings = false.")
    return params


def t5_to_huggingface(params: Params) -> dict[str, np.ndarray]:
    """The inverse: contiguous float32 arrays under Hugging Face's names, without copies of a tied embedding."""
    return {
        # Contiguous, because safetensors writes a transposed view's memory as it lies.
        place.key: np.ascontiguousarray(place.target)
        for name, array in files.named(params).items()
        for place in files.places(TABLE, name, np.asarray(array, np.float32))
    }


def t5_config_from_huggingface(config: dict[str, Any]) -> T5Config:
    """Sizes from a Hugging Face `config.json` of model_type t5; null means the default."""
    if config.get("model_type", "t5") != "t5":
        raise InputError(f"The config has model_type {config['model_type']!r}, not 't5'.")
    given = {name: value for name, value in config.items() if value is not None}
    return t5_config(files.complete_config({"model_type": "t5"} | given))


def t5_config(config: dict[str, Any]) -> T5Config:
    """The same of a completed config (see `complete_config`)."""
    if config["feed_forward_proj"] not in FEED_FORWARD:
        given, supported = config["feed_forward_proj"], ", ".join(FEED_FORWARD)
        raise InputError(f"The T5 config has the feed-forward {given!r}; supported are {supported}.")
    same: dict[str, Any] = {name: files.size(config, name) for name in _SIZES}
    for name, least in zip(_RATES, (1e-30, 0.0), strict=True):
        if not least <= config[name] < 1:
            raise InputError(f"The T5 config has {name} = {config[name]!r}; it must be from {least} to 1.")
        same[name] = float(config[name])
    return T5Config(
        **same,
        num_encoder_layers=files.size(config, "num_layers"),
        feed_forward=config["feed_forward_proj"],
        tie_word_embeddings=config["scale_decoder_outputs"],  # since transformers 5 the older field is always true
    )


def t5_config_to_huggingface(config: T5Config) -> dict[str, Any]:
    """The inverse, for transformers before and since version 5."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        **{name: getattr(config, name) for name in (*_SIZES, *_RATES, "tie_word_embeddings")},
        **{"num_layers": config.num_encoder_layers, "feed_forward_proj": config.feed_forward},
        **{"model_type": "t5", "is_encoder_decoder": True},
        **{"decoder_start_token_id": START, "pad_token_id": PAD, "eos_token_id": EOS},
    }
