"""Checkpoints of the original (vec2text, PyTorch): read into our parameters, compared, and written back.

A pair is two folders, of the inverter and of the corrector, each with a flat config.json and its weights. The sizes of
their T5 and its tokenizer are in neither: they come from that T5's own folder, here called the base.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import msgspec
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders

from v2t_jax import progress
from v2t_jax.config import Count, ModelConfig, Stage, T5Config
from v2t_jax.errors import InputError
from v2t_jax.interop.files import (
    SAFETENSORS,
    ShapeError,
    fill,
    folder_tokenizer,
    named,
    open_checkpoint,
    part,
    places,
    read_json,
    whole_folder,
)
from v2t_jax.interop.hf_t5 import t5_config_from_huggingface, t5_from_huggingface, t5_to_huggingface
from v2t_jax.interop.hub import folder_of
from v2t_jax.models.layers import Params
from v2t_jax.models.ranker import NETWORKS

Settings = dict[str, Any]  # a checkpoint's config.json
KINDS: dict[Stage, str] = {"inverter": "InversionModel", "corrector": "CorrectorEncoderModel"}
# Our projection -> theirs. The oldest correctors have one, named like the inverter's, in place of the three.
_TRANSFORM = "embedding_transform"
_PROJECTIONS: dict[Stage, dict[str, str]] = {
    "inverter": {"projection": _TRANSFORM},
    "corrector": {
        f"projection_{x}": f"{_TRANSFORM}_{i}" for i, x in enumerate(("target", "difference", "hypothesis"), 1)
    },
}
_T5, _EMBEDDER, _NORM = "encoder_decoder.", "embedder.", "layernorm"
# In an embedder inside an inverter: buffers, which are computed; and modules of sentence-transformers behind it.
_NOT_COMPARED = re.compile(r"(position_ids|inv_freq)$|^[1-9]\d*\.linear\.")
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
# Hugging Face's clean-up of spaces before punctuation, which the original applies to every decoded text.
_CLEAN_UP = {" .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'"}
_CLEAN_UP |= {f" {end}": end for end in ("n't", "'m", "'s", "'ve", "'re")}

_Name = Annotated[str, msgspec.Meta(min_length=1)]


class _Needed(msgspec.Struct):
    """The fields of a checkpoint's config.json that are read here."""

    model_name_or_path: _Name
    embedder_model_name: _Name
    max_seq_length: Count
    num_repeat_tokens: Count
    embedder_model_api: _Name | None = None


class Pair(NamedTuple):
    """An inverter and, if there is one, its corrector; parameters are float32 on the host."""

    config: ModelConfig
    params: dict[Stage, Params]


def read_base(name: str) -> tuple[T5Config, Tokenizer]:
    """Sizes and tokenizer of the T5 that a pair stands on. The tokenizer decodes as the original's does."""
    folder = folder_of(name, ["config.json", "tokenizer*.json", "spiece.model"])
    config = t5_config_from_huggingface(read_json(folder / "config.json", "a T5 folder"))
    tokenizer = folder_tokenizer(folder)
    special = [tokenizer.token_to_id(piece) for piece in ("<pad>", "</s>")]
    if special != [0, 1] or tokenizer.get_vocab_size() > config.vocab_size:
        pieces = f"<pad> and </s> must be pieces 0 and 1, and no piece above {config.vocab_size - 1}"
        raise InputError(f"{folder}'s tokenizer is not that of its T5: {pieces}.")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file() or read_json(settings, "a T5 folder").get("clean_up_tokenization_spaces", True):
        fixes = [decoders.Replace(wrong, right) for wrong, right in _CLEAN_UP.items()]
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *fixes])
    return config, tokenizer


def read_vec2text(folders: Mapping[Stage, Path], settings: Mapping[Stage, Settings], t5: T5Config) -> Pair:
    """Reads an inverter and, if there is one, its corrector; `t5` is the base's, `settings` are by `read_settings`."""
    first = settings["inverter"]
    second = settings.get("corrector", first)
    for name in ("num_repeat_tokens", "max_seq_length", "embedder_model_name"):
        placeholder = name == "embedder_model_name" and first.get("embedder_model_api")
        if second[name] != first[name] and not placeholder:
            raise InputError(
                f"The corrector's {name} is {second[name]!r} and the inverter's {first[name]!r}: give two checkpoints "
                "of one pair."
            )
    checkpoints = {stage: open_checkpoint(folder) for stage, folder in folders.items()}
    key = f"{_TRANSFORM}.0.bias"
    bias = checkpoints["inverter"].get(key)
    if bias is None or len(bias.shape) != 1:
        raise InputError(f"{folders['inverter']} lacks {key!r}; it is incomplete, or not an inverter of vec2text.")
    config = ModelConfig(
        t5=t5,
        embedding_width=bias.shape[0],
        num_pseudo_tokens=first["num_repeat_tokens"],
        max_length=first["max_seq_length"],
        projection_dropout=t5.dropout_rate,
        input_norm="corrector" not in checkpoints or f"{_NORM}.weight" in checkpoints["corrector"],
    )
    params: dict[Stage, Params] = {}
    for stage, tensors in checkpoints.items():
        with progress.stage(f"reading the {stage} from {folders[stage]}"):
            try:
                t5_params = t5_from_huggingface(part(tensors, _T5), t5)
            except ShapeError as error:
                raise InputError(
                    f"{folders[stage]} wasn't trained from this T5 ({str(error).rstrip('.')}): give the right one, as "
                    "t5=DIR."
                ) from error
            abstract = _without_t5(NETWORKS[stage](config).abstract_params())
            beside = fill(abstract, _table(stage, tensors), tensors, stage, ignored=r"(encoder_decoder|embedder)\..*")
            params[stage] = beside | {"t5": t5_params}
    return Pair(config, params)


def _without_t5(params: Params) -> Params:
    return {name: tree for name, tree in params.items() if name != "t5"}


def read_settings(stage: Stage, folder: Path) -> Settings:
    """Reads a checkpoint's config.json; refuses another stage's, missing fields and unsupported settings."""
    settings = read_json(folder / "config.json", f"a checkpoint of vec2text's {stage}")
    kinds = settings.get("architectures")
    if kinds not in (None, [], [KINDS[stage]]):
        wrong = f"{folder}/config.json has architectures {kinds!r}, not {[KINDS[stage]]!r}"
        raise InputError(f"{wrong}: give a folder of vec2text's {stage}.")
    try:
        msgspec.convert(settings, _Needed)
    except msgspec.ValidationError as error:
        raise InputError(f"{folder}/config.json isn't usable ({error}); fetch the checkpoint again.") from error
    for name, supported in _SUPPORTED.items():
        if settings.get(name, supported) != supported:
            raise InputError(
                f"{folder}/config.json has {name} {settings[name]!r}, which isn't supported; only {supported!r} is."
            )
    return settings


def _table(stage: Stage, keys: Collection[str] = ()) -> dict[str, str]:
    """Our modules beside the T5 -> their keys; `keys`, a checkpoint's, show which of them have old names."""
    table, shared = {"input_norm": _NORM}, f"{_TRANSFORM}.0.weight" in keys
    for ours, theirs in _PROJECTIONS[stage].items():
        theirs = _TRANSFORM if shared else theirs
        output = "2" if f"{theirs}.2.weight" in keys else "3"  # 2, before a dropout was put between the two layers
        table |= {f"{ours}/hidden": f"{theirs}.0", f"{ours}/output": f"{theirs}.{output}"}
    return table


def check_embedder(inverter: Path, embedder: Path, name: str) -> None:
    """Compares the embedder that an inverter was saved with to the one in the folder `embedder`.

    Tensors are matched by the ends of their names, because the two are wrapped differently. An inverter for an API has
    none, and passes. Dense layers behind the pooling are in folders of their own and aren't compared.
    """
    advice = "give the embedder that it was trained for."
    with progress.stage(f"comparing embedders with {name}"):
        inside, outside = part(open_checkpoint(inverter), _EMBEDDER), open_checkpoint(embedder)
        missing = {key for key in inside if not _NOT_COMPARED.search(key)}
        for key, tensor in outside.items():
            for end in _ends(key) & inside.keys():
                if inside[end].shape != tensor.shape or not _equal(inside[end][:], tensor[:]):
                    raise InputError(
                        f"The inverter was saved with another embedder than {name}: {end!r} differs from its {key!r}; "
                        f"{advice}"
                    )
                missing.discard(end)
        if missing:
            raise InputError(
                f"The inverter was saved with an embedder that has {min(missing)!r}, which {name} lacks; {advice}"
            )


def _ends(key: str) -> set[str]:
    """Names that a key of an embedder's folder may have inside an inverter."""
    key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    names = {key}
    if not key.startswith("decoder."):  # of a whole T5: an inverter holds the encoder, whose blocks have the same names
        names.add(key.partition(".")[2])  # without the folder's own prefix, such as "encoder."
    if key == "shared.weight":
        names |= {"embed_tokens.weight", "encoder.embed_tokens.weight"}
    return names | {f"0.auto_model.{name}" for name in names}  # wrapped by sentence-transformers


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tensors are equal, or one is the other rounded to half precision."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    with np.errstate(over="ignore"):
        return np.array_equal(a, b) or any(
            np.array_equal(one.astype(half).astype(np.float32), other)
            for half in (np.float16, jnp.bfloat16)
            for one, other in ((a, b), (b, a))
        )


def write_vec2text(
    folder: Path, config: ModelConfig, params: Mapping[Stage, Params], settings: Mapping[Stage, Settings]
) -> None:
    """Writes folder/inverter and folder/corrector for the original, completely or not at all.

    The embedder's weights, which the original saves with its inverter, are left out: it then keeps those that it loads
    by name. A tied head is written too, because the original would take a missing one from the base.
    """
    if "corrector" in params and not config.input_norm:
        raise InputError("The corrector doesn't normalize its input, and the original's always does.")
    with whole_folder(folder) as building:
        for stage, network in params.items():
            values = {**settings[stage], "architectures": [KINDS[stage]], "torch_dtype": "float32"}
            target = building / stage
            target.mkdir()
            (target / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
            with progress.stage(f"writing the {stage} to {folder / stage}"):
                state = {_T5 + name: array for name, array in t5_to_huggingface(network["t5"]).items()}
                if config.t5.tie_word_embeddings:
                    state[f"{_T5}lm_head.weight"] = state[f"{_T5}shared.weight"]
                table = _table(stage)
                for name, array in named(_without_t5(network)).items():
                    found = places(table, name, np.asarray(array))
                    state |= {place.key: np.ascontiguousarray(place.target) for place in found}
                # Its loader requires this metadata.
                save_file(state, target / SAFETENSORS, metadata={"format": "pt"})
