"""Checkpoints of the original (vec2text, PyTorch): read into our parameters, compared, and written back.

A pair is two folders, of the inverter and of the corrector, each with a flat config.json and its weights. The sizes of
their T5 and its tokenizer are in neither: they come from that T5's own folder, here called the base.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders

from v2t_jax import progress
from v2t_jax.config import ModelConfig, Stage, T5Config
from v2t_jax.errors import InputError
from v2t_jax.interop.files import (
    SAFETENSORS,
    ShapeError,
    Tensor,
    folder_tokenizer,
    open_checkpoint,
    part,
    read_json,
    real_numbers,
    whole_folder,
)
from v2t_jax.interop.hf_t5 import t5_config_from_huggingface, t5_from_huggingface, t5_to_huggingface
from v2t_jax.interop.hub import folder_of
from v2t_jax.models.layers import Params

Settings = dict[str, Any]  # a checkpoint's config.json
KINDS: dict[Stage, str] = {"inverter": "InversionModel", "corrector": "CorrectorEncoderModel"}
# Our projection -> theirs. The oldest correctors have one, `embedding_transform`, in place of the three.
_PROJECTIONS: dict[Stage, dict[str, str]] = {
    "inverter": {"projection": "embedding_transform"},
    "corrector": {
        "projection_target": "embedding_transform_1",
        "projection_difference": "embedding_transform_2",
        "projection_hypothesis": "embedding_transform_3",
    },
}
_OLD_CORRECTOR = "embedding_transform"
# Before a dropout was put between them, the second linear layer was number 2.
_HIDDEN, _OUTPUT, _OLD_OUTPUT = "0", "3", "2"
_T5, _EMBEDDER, _NORM = "encoder_decoder.", "embedder.", "layernorm"
# In an embedder inside an inverter: buffers, which are computed; and modules of sentence-transformers behind it.
_BUFFERS = ("position_ids", "inv_freq")
_BEHIND_ENCODER = re.compile(r"[1-9]\d*\.linear\.")
_OLD_NORM = {"gamma": "weight", "beta": "bias"}
_NEEDED = ("model_name_or_path", "embedder_model_name", "max_seq_length", "num_repeat_tokens")
# Settings that change the computation, with the only value supported here. Those of training alone (dropout, freezing,
# noise) may have any.
_SUPPORTED: Settings = {
    "use_lora": False,
    "embeddings_from_layer_n": None,
    "embedder_fake_with_zeros": False,
    "embedding_zero_except_topk": None,
    "embedding_transform_strategy": "repeat",
    "corrector_ignore_hypothesis_embedding": False,
}
# Other fields that the original requires of a config.json.
_WRITTEN: Settings = {
    "embedder_model_api": None,
    "embedder_torch_dtype": "float32",
    "embedder_no_grad": True,
    "embedder_gaussian_noise_level": 0.0,
    "use_frozen_embeddings_as_input": True,
    "encoder_dropout_disabled": False,
    "decoder_dropout_disabled": False,
}
# Hugging Face's clean-up of spaces before punctuation, which the original applies to every decoded text.
_CLEAN_UP = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"}
_CLEAN_UP |= {f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")}


class Base(NamedTuple):
    """The T5 that a pair stands on."""

    config: T5Config
    tokenizer: Tokenizer


class Pair(NamedTuple):
    """An inverter and, if there is one, its corrector; parameters are float32 on the host."""

    config: ModelConfig
    params: dict[Stage, Params]


def read_base(name: str) -> Base:
    """Sizes and tokenizer of a T5, by folder or hub name. The tokenizer decodes as the original's does."""
    folder = folder_of(name, ["config.json", "tokenizer*.json", "spiece.model"])
    config = t5_config_from_huggingface(read_json(folder / "config.json", "a T5 folder"))
    tokenizer = folder_tokenizer(folder)
    special = [tokenizer.token_to_id(piece) for piece in ("<pad>", "</s>")]
    if special != [0, 1] or tokenizer.get_vocab_size() > config.vocab_size:
        raise InputError(
            f"{folder}'s tokenizer is not that of its T5: <pad> and </s> must be pieces 0 and 1, and no piece above "
            f"{config.vocab_size - 1}."
        )
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or read_json(settings, "a T5 folder").get("clean_up_tokenization_spaces", True):
        fixes = [decoders.Replace(wrong, right) for wrong, right in _CLEAN_UP.items()]
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *fixes])
    return Base(config, tokenizer)


def read_vec2text(folders: Mapping[Stage, Path], settings: Mapping[Stage, Settings], t5: T5Config) -> Pair:
    """Reads an inverter and, if there is one, its corrector.

    Args:
        folders: by stage; at least the inverter's.
        settings: what `read_settings` returned for each.
        t5: sizes of the base.

    Raises:
        InputError: a key is missing, unknown or of an unexpected shape, or the two checkpoints are not a pair.
    """
    first = settings["inverter"]
    for name in ("num_repeat_tokens", "max_seq_length"):
        if (other := settings.get("corrector", first)[name]) != first[name]:
            raise InputError(
                f"The corrector's {name} is {other} and the inverter's {first[name]}: give two checkpoints of one pair."
            )
    names = {values["embedder_model_name"] for values in settings.values()}
    if len(names) > 1 and not first.get("embedder_model_api"):  # with an API the name is a placeholder
        raise InputError(
            f"The corrector's embedder_model_name is {settings['corrector']['embedder_model_name']!r} and the "
            f"inverter's {first['embedder_model_name']!r}: give two checkpoints of one pair."
        )
    params: dict[Stage, Params] = {}
    widths: dict[Stage, int] = {}
    old_corrector = False
    for stage, folder in folders.items():
        with progress.stage(f"reading the {stage} from {folder}"):
            tensors = open_checkpoint(folder)
            network, used = _read_network(stage, folder, tensors, t5, settings[stage])
            unknown = sorted(set(tensors) - used)
            if unknown:
                raise InputError(f"{folder} has the unknown key {unknown[0]!r}; it is not a {stage} of vec2text.")
        params[stage] = network
        widths[stage] = len(network[next(iter(_PROJECTIONS[stage]))]["hidden"]["bias"])
        old_corrector |= stage == "corrector" and "input_norm" not in network
    if len(set(widths.values())) > 1:
        raise InputError(
            f"The inverter takes embeddings {widths['inverter']} wide and the corrector {widths['corrector']}: give "
            "two checkpoints of one pair."
        )
    config = ModelConfig(
        t5=t5,
        embedding_width=widths["inverter"],
        num_pseudo_tokens=first["num_repeat_tokens"],
        max_length=first["max_seq_length"],
        projection_dropout=t5.dropout_rate,
        input_norm=not old_corrector,
    )
    return Pair(config, params)


def read_settings(stage: Stage, folder: Path) -> Settings:
    """Reads a checkpoint's config.json; refuses another stage's, missing fields and unsupported settings."""
    settings = read_json(folder / "config.json", f"a checkpoint of vec2text's {stage}")
    kinds = settings.get("architectures")
    if kinds not in (None, [], [KINDS[stage]]):
        raise InputError(
            f"{folder}/config.json has architectures {kinds!r}, not {[KINDS[stage]]!r}: give a folder of vec2text's "
            f"{stage}."
        )
    for name in _NEEDED:
        if name not in settings:
            raise InputError(f"{folder}/config.json lacks the field {name!r}; fetch the checkpoint again.")
    for name in ("model_name_or_path", "embedder_model_name", "embedder_model_api"):
        value = settings.get(name)
        if not isinstance(value, str) and not (value is None and name == "embedder_model_api") or value == "":
            raise InputError(f"{folder}/config.json has {name} {value!r}; it must be a name.")
    for name in ("max_seq_length", "num_repeat_tokens"):
        if type(settings[name]) is not int or settings[name] < 1:
            raise InputError(f"{folder}/config.json has {name} {settings[name]!r}; it must be a whole number above 0.")
    for name, supported in _SUPPORTED.items():
        if settings.get(name, supported) != supported:
            raise InputError(
                f"{folder}/config.json has {name} {settings[name]!r}, which isn't supported; only {supported!r} is."
            )
    return settings


def _read_network(
    stage: Stage, folder: Path, tensors: Mapping[str, Tensor], t5: T5Config, settings: Settings
) -> tuple[Params, set[str]]:
    """Parameters of one stage, and the keys that they come from."""
    used = {name for name in tensors if name.startswith((_T5, _EMBEDDER) if stage == "inverter" else _T5)}

    def take(name: str, shape: tuple[int | None, ...]) -> np.ndarray:
        if name not in tensors:
            raise InputError(f"{folder} lacks {name!r}; it is incomplete, or not a {stage} of vec2text.")
        found = tensors[name].shape
        if len(found) != len(shape) or any(want not in (None, size) for want, size in zip(shape, found, strict=True)):
            wanted = "x".join("any" if size is None else str(size) for size in shape)
            raise InputError(f"{folder} has {name!r} of shape {found}; its config and the T5 imply {wanted}.")
        used.add(name)
        # A copy: a view would keep the whole file mapped.
        return np.array(real_numbers(tensors[name][:], f"{folder}: {name!r}"), np.float32)

    def linear(name: str, num_in: int | None, num_out: int | None) -> Params:
        kernel = take(f"{name}.weight", (num_out, num_in))
        return {"kernel": np.ascontiguousarray(kernel.T), "bias": take(f"{name}.bias", (kernel.shape[0],))}

    def projection(name: str) -> Params:
        old = f"{name}.{_OUTPUT}.weight" not in tensors and f"{name}.{_OLD_OUTPUT}.weight" in tensors
        bias = f"{name}.{_HIDDEN}.bias"
        width = tensors[bias].shape[0] if bias in tensors else None
        return {
            "hidden": linear(f"{name}.{_HIDDEN}", width, width),
            "output": linear(
                f"{name}.{_OLD_OUTPUT if old else _OUTPUT}", width, t5.d_model * settings["num_repeat_tokens"]
            ),
        }

    state = part(tensors, _T5)
    if not state:
        raise InputError(f"{folder} lacks every key of {_T5[:-1]!r}; it is not a {stage} of vec2text.")
    try:
        params: Params = {"t5": t5_from_huggingface(state, t5)}
    except ShapeError as error:
        raise InputError(
            f"{folder} wasn't trained from this T5 ({str(error).rstrip('.')}): give the right one, as --t5 or t5=."
        ) from error
    shared = stage == "corrector" and f"{_OLD_CORRECTOR}.{_HIDDEN}.weight" in tensors
    for ours, theirs in _PROJECTIONS[stage].items():
        params[ours] = projection(_OLD_CORRECTOR if shared else theirs)
    if stage == "corrector" and f"{_NORM}.weight" in tensors:
        shape = (t5.d_model,)
        params["input_norm"] = {"scale": take(f"{_NORM}.weight", shape), "bias": take(f"{_NORM}.bias", shape)}
    return params, used


def check_embedder(inverter: Path, embedder: Path, name: str) -> None:
    """Compares the embedder that an inverter was saved with to the one in the folder `embedder`.

    Tensors are matched by the ends of their names, because the two are wrapped differently. An inverter for an API has
    none, and passes. Dense layers behind the pooling are in folders of their own and aren't compared.

    Raises:
        InputError: a tensor differs, or is in the inverter alone.
    """
    with progress.stage(f"comparing embedders with {name}"):
        inside, outside = part(open_checkpoint(inverter), _EMBEDDER), open_checkpoint(embedder)
        pairs = [(end, key) for key in outside for end in _ends(key) if end in inside]
        if inside and not pairs:
            raise InputError(
                f"The inverter was saved with another kind of embedder than {name}, which has no key like "
                f"{min(inside)!r}; give the embedder that it was trained for."
            )
        for end, key in pairs:
            if inside[end].shape != outside[key].shape or not _equal(inside[end][:], outside[key][:]):
                raise InputError(
                    f"The inverter was saved with another embedder than {name}: {end!r} differs from its {key!r}; "
                    "give the embedder that it was trained for."
                )
        missing = set(inside) - {end for end, _ in pairs}
        missing = {key for key in missing if not key.endswith(_BUFFERS) and not _BEHIND_ENCODER.match(key)}
        if missing:
            raise InputError(
                f"The inverter was saved with an embedder that has {min(missing)!r}, which {name} lacks; give the "
                "embedder that it was trained for."
            )


def _ends(key: str) -> Iterator[str]:
    """Names that a key of an embedder's folder may have inside an inverter."""
    key = re.sub(r"LayerNorm\.(gamma|beta)$", lambda found: f"LayerNorm.{_OLD_NORM[found[1]]}", key)
    names = [key]
    if not key.startswith("decoder."):  # of a whole T5: an inverter holds the encoder, whose blocks have the same names
        names.append(key.partition(".")[2])  # without the folder's own prefix, such as "encoder."
    if key == "shared.weight":
        names += ["embed_tokens.weight", "encoder.embed_tokens.weight"]
    for name in names:
        yield name
        yield f"0.auto_model.{name}"  # wrapped by sentence-transformers


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors are equal after rounding to the coarser of their dtypes, which is guessed from the values."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    if np.array_equal(a, b):
        return True
    for dtype in (np.float16, jnp.bfloat16):
        with np.errstate(over="ignore"):
            rounded_a, rounded_b = (values.astype(dtype).astype(np.float32) for values in (a, b))
        if np.array_equal(rounded_a, rounded_b) and (np.array_equal(a, rounded_a) or np.array_equal(b, rounded_b)):
            return True
    return False


def write_vec2text(
    folder: Path, config: ModelConfig, params: Mapping[Stage, Params], settings: Mapping[Stage, Settings]
) -> None:
    """Writes folder/inverter and folder/corrector for the original, completely or not at all.

    The embedder's weights, which the original saves with its inverter, are left out: it then keeps those that it loads
    by name. A tied head is written too, because the original would take a missing one from the base.

    Args:
        settings: by stage; at least `model_name_or_path` and `embedder_model_name`.

    Raises:
        InputError: the original can't express the model, a setting is missing, or the folder can't be written.
    """
    _check_expressible(config, params, settings)
    with whole_folder(folder) as building:
        for stage, network in params.items():
            values = {**_SUPPORTED, **_WRITTEN, **settings[stage]}
            values |= {"architectures": [KINDS[stage]], "max_seq_length": config.max_length}
            values |= {"num_repeat_tokens": config.num_pseudo_tokens, "torch_dtype": "float32"}
            target = building / stage
            target.mkdir()
            (target / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
            with progress.stage(f"writing the {stage} to {folder / stage}"):
                # Its loader requires this metadata.
                save_file(dict(_state(stage, network, config)), target / SAFETENSORS, metadata={"format": "pt"})


def _check_expressible(config: ModelConfig, params: Mapping[Stage, Params], settings: Mapping[Stage, Settings]) -> None:
    for option in ("standardize", "bag_of_words"):
        if getattr(config, option):
            raise InputError(f"The model was trained with model.{option}, which the original doesn't have.")
    if "corrector" in params and not config.input_norm:
        raise InputError("The corrector doesn't normalize its input, and the original's always does.")
    for stage in params:
        for name in ("model_name_or_path", "embedder_model_name"):
            if not settings[stage].get(name):
                option = "--t5" if name == "model_name_or_path" else "--embedder"
                raise InputError(f"The model doesn't say what the original's {name} should be; give it with {option}.")
    width = 1536 if settings["inverter"].get("embedder_model_api") else 768
    if "corrector" in params and config.embedding_width != width:
        raise InputError(
            f"The model's embeddings are {config.embedding_width} wide; the original's corrector takes {width} only."
        )


def _state(stage: Stage, network: Params, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a stage by the original's names."""
    state = t5_to_huggingface(network["t5"])
    for name, array in state.items():
        yield _T5 + name, array
    if config.t5.tie_word_embeddings:
        yield f"{_T5}lm_head.weight", state["shared.weight"]
    for ours, theirs in _PROJECTIONS[stage].items():
        for layer, number in (("hidden", _HIDDEN), ("output", _OUTPUT)):
            yield f"{theirs}.{number}.weight", np.ascontiguousarray(np.asarray(network[ours][layer]["kernel"]).T)
            yield f"{theirs}.{number}.bias", np.asarray(network[ours][layer]["bias"])
    if stage == "corrector":
        yield f"{_NORM}.weight", np.asarray(network["input_norm"]["scale"])
        yield f"{_NORM}.bias", np.asarray(network["input_norm"]["bias"])
