"""T5 between Hugging Face's key names and ours, both directions, by one table. A tied embedding is stored once."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from v2t_jax import progress
from v2t_jax.config import T5Config
from v2t_jax.errors import InputError
from v2t_jax.interop.files import (
    SAFETENSORS,
    Entry,
    Tensor,
    complete_config,
    fill,
    open_checkpoint,
    read_json,
    size,
    whole_folder,
)
from v2t_jax.interop.hub import folder_of
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import T5

# One layer of a stack: (Hugging Face's key within the block, our path within the layer).
_SELF_ATTENTION = tuple((f"layer.0.SelfAttention.{m}", f"self_attention/{m}") for m in "qkvo")
_CROSS_ATTENTION = tuple((f"layer.1.EncDecAttention.{m}", f"cross_attention/{m}") for m in "qkvo")
_FEED_FORWARD = {"relu": ("wi", "wo"), "gated-gelu": ("wi_0", "wi_1", "wo")}
_SIZES = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_decoder_layers"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
# The token embedding under its other names: copies that a checkpoint may hold, and that must equal `shared.weight`.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# The oldest T5 checkpoints hold it, and no implementation reads it: cross-attention has no position bias.
_IGNORED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def _entries(config: T5Config) -> Iterator[Entry]:
    """Every tensor of a T5 of this configuration."""
    yield Entry("shared.weight", ("token_embedding",), None, False)
    if not config.tie_word_embeddings:
        yield Entry("lm_head.weight", ("lm_head",), None, True)
    yield from stack_entries(config, "encoder", config.num_encoder_layers)
    yield from stack_entries(config, "decoder", config.num_decoder_layers)


def stack_entries(config: T5Config, stack: str, num_layers: int) -> Iterator[Entry]:
    """Every tensor of a T5's encoder or decoder."""
    cross = _CROSS_ATTENTION if stack == "decoder" else ()
    last = 1 + bool(cross)  # sub-layers: self-attention, (cross-attention,) feed-forward
    linear = _SELF_ATTENTION + cross
    linear += tuple(
        (f"layer.{last}.DenseReluDense.{m}", f"feed_forward/{m}") for m in _FEED_FORWARD[config.feed_forward]
    )
    norms = ["self_attention_norm", *(["cross_attention_norm"] if cross else []), "feed_forward_norm"]
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Entry(bias, (stack, "relative_bias"), None, False)
    yield Entry(f"{stack}.final_layer_norm.weight", (stack, "final_norm", "scale"), None, False)
    for i in range(num_layers):
        block = f"{stack}.block.{i}"
        for theirs, ours in linear:
            yield Entry(f"{block}.{theirs}.weight", (stack, "layers", *ours.split("/")), i, True)
        for j, norm in enumerate(norms):
            yield Entry(f"{block}.layer.{j}.layer_norm.weight", (stack, "layers", norm, "scale"), i, False)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def load_t5(name: str, put: Callable[[np.ndarray], Any] = lambda array: array) -> tuple[T5Config, Params]:
    """Sizes and parameters (float32, on the host) of a T5 v1.0, v1.1 or Flan, by folder or hub name.

    Args:
        put: takes each array as it is read: see `fill`.

    Raises:
        InputError: see `folder_of`, `open_checkpoint`, `t5_config_from_huggingface` and `t5_from_huggingface`.
    """
    folder = folder_of(name)
    with progress.stage(f"loading the T5 {name}"):
        values = read_json(folder / "config.json", "a T5 folder")
        config, state = t5_config_from_huggingface(values), open_checkpoint(folder)
        # Since transformers 5, whose configs have this field, an untied head that equals the embedding isn't written.
        if "scale_decoder_outputs" in values and not config.tie_word_embeddings and "shared.weight" in state:
            state.setdefault("lm_head.weight", state["shared.weight"])
        return config, t5_from_huggingface(state, config, put)


def save_t5(folder: Path | str, config: T5Config, params: Params) -> None:
    """The inverse: config.json and model.safetensors as transformers reads them; whole or not at all.

    Raises:
        InputError: the parameters aren't those of `config`, there is something at `folder`, or it can't be written.
    """
    shapes, meant = _shapes(params), _shapes(T5(config).abstract_params())
    if differing := sorted(path for path in shapes | meant if shapes.get(path) != meant.get(path)):
        raise InputError(
            f"The T5's parameter {differing[0]!r} has shape {shapes.get(differing[0])}, but its config implies "
            f"{meant.get(differing[0])}; give the two that belong together."
        )
    with whole_folder(Path(folder)) as building:
        values = t5_config_to_huggingface(config)
        (building / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        save_file(t5_to_huggingface(params, config), building / SAFETENSORS, metadata={"format": "pt"})


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(step.key) for step in path): leaf.shape for path, leaf in leaves}


def t5_from_huggingface(
    state: Mapping[str, Tensor], config: T5Config, put: Callable[[np.ndarray], Any] = lambda array: array
) -> Params:
    """Parameters (float32, on the host) from a state dict of `T5ForConditionalGeneration`.

    A tied head (`lm_head.weight`) and the stacks' copies of the embedding may be there or not; if they are, they must
    equal `shared.weight`.

    Args:
        state: arrays of any floating dtype, or tensors still in their file, under Hugging Face's names.
        config: see `t5_config_from_huggingface`.
        put: takes each array as it is read: see `fill`.

    Raises:
        InputError: a key is missing, unknown, of another shape than `config` implies, or a copy that differs.
    """
    copies = (*_COPIES, *(["lm_head.weight"] if config.tie_word_embeddings else []))
    ignored = {*_IGNORED, *copies}
    params = fill(T5(config).abstract_params(), _entries(config), state, "T5", lambda key: key in ignored, put=put)
    for key in copies:
        if key in state and not np.array_equal(state[key][:], state["shared.weight"][:]):
            raise InputError(
                f"T5 weight {key!r} differs from 'shared.weight', of which it should be a copy; "
                "for an untied head the config must say tie_word_embeddings = false."
            )
    return params


def t5_to_huggingface(params: Params, config: T5Config) -> dict[str, np.ndarray]:
    """The inverse: contiguous float32 arrays under Hugging Face's names, without copies of a tied embedding."""
    state = {}
    for entry in _entries(config):
        value = np.asarray(_at(params, entry.ours), np.float32)
        if entry.layer is not None:
            value = value[entry.layer]
        # Contiguous, because safetensors writes a transposed view's memory as it lies.
        state[entry.theirs] = np.ascontiguousarray(value.T if entry.transposed else value)
    return state


def t5_config_from_huggingface(config: dict[str, Any]) -> T5Config:
    """Sizes from a Hugging Face `config.json` of model_type t5; null means the default.

    Raises:
        InputError: another architecture, an impossible size, or a feed-forward layer that isn't supported.
    """
    if config.get("model_type", "t5") != "t5":
        raise InputError(f"The config has model_type {config['model_type']!r}, not 't5'.")
    given = {name: value for name, value in config.items() if value is not None}
    return t5_config(complete_config({"model_type": "t5"} | given))


def t5_config(config: dict[str, Any]) -> T5Config:
    """The same of a completed config (see `complete_config`)."""
    if config["feed_forward_proj"] not in _FEED_FORWARD:
        raise InputError(
            f"The T5 config has the feed-forward {config['feed_forward_proj']!r}; supported are "
            f"{', '.join(_FEED_FORWARD)}."
        )
    for name, least in (("layer_norm_epsilon", 1e-30), ("dropout_rate", 0.0)):
        if not least <= config[name] < 1:
            raise InputError(f"The T5 config has {name} = {config[name]!r}; it must be from {least} to 1.")
    sizes: dict[str, Any] = {name: size(config, name) for name in _SIZES}
    return T5Config(
        **sizes,
        num_encoder_layers=size(config, "num_layers"),
        feed_forward=config["feed_forward_proj"],
        tie_word_embeddings=config["scale_decoder_outputs"],  # since transformers 5 the older field is always true
        layer_norm_epsilon=float(config["layer_norm_epsilon"]),
        dropout_rate=float(config["dropout_rate"]),
    )


def t5_config_to_huggingface(config: T5Config) -> dict[str, Any]:
    """The inverse, for transformers before and since version 5."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": config.feed_forward,
        "tie_word_embeddings": config.tie_word_embeddings,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": config.dropout_rate,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
