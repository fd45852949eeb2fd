"""A trained inverter as one object, and as a folder.

    DIR/config.json               sizes, embedder (name and hash of its weights), hashes of the files beside it
    DIR/{inverter,corrector}.safetensors    parameters, flat names joined by "/"; large tables as int8 rows with scales
    DIR/pieces.safetensors        model id -> tokenizer id
    DIR/tokenizer.json            the model's own tokenizer; models that share their embedder's have none
    DIR/README.md                 model card

Nothing is unpickled; every file's sha256 is checked before it is used.
"""

import dataclasses
import json
import os
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.config import DecodeLayout, ModelConfig, Stage, from_dict, to_dict
from v2t_jax.data.vocabulary import Vocabulary, read_tokenizer
from v2t_jax.embedders.base import EmbedderIdentity, JaxEmbedder, TextEmbedder, check_identity, named_or_embedder
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.interop.files import open_weights, read_json, sha256_of, whole_folder
from v2t_jax.interop.hub import download, is_hub_name
from v2t_jax.inversion.confidence import Weights
from v2t_jax.inversion.correction import STEPS, CorrectionLoop, CorrectionSettings, Mode, Search
from v2t_jax.inversion.edits import BLACK_BOX, GRADIENT_CALLS, EditCounts, embedder_gain, guided_edits
from v2t_jax.inversion.embed_hypotheses import embed_hypotheses
from v2t_jax.inversion.parts import CORRECTED, EDITED
from v2t_jax.inversion.proposals import initial_hypotheses, propose_corrections
from v2t_jax.inversion.upstream import topk_order, upstream_lengths
from v2t_jax.models.layers import Params
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.models.t5 import TABLE, round_weights, unstack_decoder
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import DECODING_RULES, param_specs, replicated, state_shardings

FORMAT_VERSION = 1
QUANTIZED_SIZE = 4096  # numbers of a parameter from which on it is quantized
PACKAGED = Path(__file__).parent.parent / "assets" / "models"
TOKENIZER = "tokenizer.json"
CARD_HEAD = "---\nlibrary_name: v2t_jax\ntags: [embedding-inversion, privacy]\n---\n"  # what the hub files models by


@dataclasses.dataclass
class InversionPipeline:
    """Networks, embedder and vocabulary that belong together: what `v2t_jax.load` returns.

    Where it `shares_vocabulary`, the model writes its embedder's own tokens, and the correction loop never leaves the
    device. Otherwise its tokenizer is its own, and hypotheses reach the embedder as text, through a host callback.

    With a `mesh` of all devices, the parameters are sharded over it, and all processes make the same calls together.
    Without, each process decodes on its own devices.
    """

    name: str
    config: ModelConfig
    params: dict[Stage, Params]  # "inverter" always, others where there are
    embedder: TextEmbedder
    vocabulary: Vocabulary
    shares_vocabulary: bool = True
    embedding_norm: tuple[float, float] | None = None  # mean and deviation of the training vectors' lengths
    calibration: Weights | None = None  # how likely its texts are exact
    sha256: tuple[str, ...] = ()  # of the files it was read from
    mesh: Mesh | None = None
    decode: DecodeLayout = "batch"

    def __post_init__(self) -> None:
        self._loops: dict[tuple[CorrectionSettings, Search], CorrectionLoop] = {}
        self._weights: dict[Mesh | None, Any] = {}
        self._weights_of: Any = None
        if self.config.embedding_width != self.embedder.width:
            raise InputError(
                f"The model {self.name} inverts embeddings of width {self.config.embedding_width}, but those of "
                f"{self.embedder.name} are {self.embedder.width} wide; pass the embedder that it was trained for."
            )

    @property
    def has_corrector(self) -> bool:
        return "corrector" in self.params

    def loop_params(self, devices: Mesh | None = None) -> dict[str, Any]:
        """The weights that a correction loop takes: in the arithmetic's dtype, layer by layer, laid out for decoding.

        Kept until `params` are replaced or `release` is called. Without a mesh of the pipeline's own they lie on the
        first device, or whole on each of `devices`.
        """
        if self._weights_of is not self.params:
            self._weights, self._weights_of = {}, self.params
        if devices not in self._weights:
            one = self._weights.get(None) or self._prepared()
            self._weights = {None: one}
            if devices is not None:
                self._weights[devices] = jax.device_put(one, replicated(devices))
        return self._weights[devices]

    def release(self) -> None:
        """Frees what `loop_params` keeps: a second copy of the networks."""
        self._weights = {}

    def _prepared(self) -> dict[str, Any]:
        weights: dict[str, Any] = {}
        for stage, params in self.params.items():
            if "t5" in params:
                params = {**params, "t5": round_weights(self.config.t5, params["t5"])}  # in the end it would be anyway
            if self.mesh is not None:
                specs = param_specs(params, NETWORKS[stage].PARAM_AXES, DECODING_RULES[self.decode])
                params = processes.put(params, state_shardings(self.mesh, params, specs))
            weights[stage] = {**params, "t5": unstack_decoder(params["t5"])} if "t5" in params else params
        embedder = self.embedder.params if isinstance(self.embedder, JaxEmbedder) else {}
        others = {"embedder": embedder, "pieces": jnp.asarray(self.vocabulary.vocab_map)}
        return weights | (others if self.mesh is None else processes.put(others, replicated(self.mesh)))

    def default_search(self, mode: Mode = "best") -> Search:
        """Edits too, where a ranker guides them and asking the embedder costs nothing."""
        edits = "ranker" in self.params and isinstance(self.embedder, JaxEmbedder) and mode == "best"
        return "both" if edits else "corrector"

    def default_steps(self, search: Search) -> int:
        """Of correction, in this search; says so where there is no corrector for them."""
        if STEPS[search] and not self.has_corrector:
            progress.note(f"The model {self.name} has no corrector, so it takes 0 correction steps.")
            return 0
        return STEPS[search]

    def correction_loop(
        self, sequence_beam_width: int = 4, mode: Mode = "best", patience: int = 0, search: Search = "corrector"
    ) -> CorrectionLoop:
        """The compiled loop for these settings, made once."""
        cuts = mode == "upstream" and not self.shares_vocabulary
        config, guess_length = upstream_lengths(self.config) if cuts else (self.config, None)
        settings = CorrectionSettings(sequence_beam_width, mode, patience, guess_length)
        if (settings, search) not in self._loops:
            devices = jax.local_device_count() if self.mesh is None else self.mesh.size
            embed, check = embed_hypotheses(config, self.embedder, self.vocabulary, self.shares_vocabulary, devices)
            corrects = search == "corrector" or (search == "both" and self.has_corrector)
            proposers = (propose_corrections(config, mode),) if corrects else ()
            more: dict[str, Any] = {} if search == "corrector" else self._edits(mode)
            more |= {"devices": devices, "rank": topk_order, "check": check}
            if isinstance(self.embedder, JaxEmbedder):  # of others everything is asked at once
                more["step_rows"] = CORRECTED.rows(sequence_beam_width**2)
            functions = initial_hypotheses(config), proposers, embed
            self._loops[settings, search] = CorrectionLoop(*functions, settings, **more)
        return self._loops[settings, search]

    def _edits(self, mode: Mode) -> dict[str, Any]:
        if mode == "upstream":
            raise InputError('Mode "upstream" knows no edits; use search="corrector".')
        counts, gain, calls = BLACK_BOX, None, sum(BLACK_BOX)
        if isinstance(self.embedder, JaxEmbedder) and self.shares_vocabulary:
            counts, gain = EditCounts(), embedder_gain(self.embedder.config, self.embedder.token_map())
            calls = sum(counts) + GRADIENT_CALLS
        edit = guided_edits(self.config, jnp.asarray(self.vocabulary.writable), counts, gain)
        return {"edit": edit, "edit_calls": calls, "edit_rows": EDITED.rows(calls) if gain else None}

    def save(self, folder: Path, record: dict[str, Any], quantize: bool = False, card: str = "") -> None:
        """Writes the model folder, whole or not at all; `record` (recipe, scores) is kept in its config.json."""
        if folder.exists() and not (folder / "pieces.safetensors").is_file() and any(folder.iterdir()):
            raise InputError(f"{folder} holds files that aren't a model's and would be lost; pass another folder.")
        with whole_folder(folder, replace=True) as building:
            for stage, params in self.params.items():
                save_file(self._stored(stage, params, quantize), building / f"{stage}.safetensors")
            save_file({"pieces": self.vocabulary.vocab_map}, building / "pieces.safetensors")
            if not self.shares_vocabulary:
                (building / TOKENIZER).write_text(self.vocabulary.tokenizer.to_str(), encoding="utf-8")
            config = {
                "format_version": FORMAT_VERSION,
                "name": self.name,
                "embedder": self.embedder.identity.to_dict(),
                "embedding_norm": self.embedding_norm,
                "calibration": self.calibration,
                "model": to_dict(self.config),
                "files": {file.name: sha256_of([file]) for file in sorted(building.iterdir())},
                "record": record,
            }
            (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (building / "README.md").write_text(CARD_HEAD + (card or f"# {self.name}\n\nNot evaluated yet.\n"))

    def _stored(self, stage: Stage, params: Params, quantize: bool) -> dict[str, np.ndarray]:
        """A stage's parameters for its file, but for token embeddings that are the inverter's."""
        if stage == "corrector" and np.array_equal(params["t5"][TABLE], self.params["inverter"]["t5"][TABLE]):
            params = {**params, "t5": {name: p for name, p in params["t5"].items() if name != TABLE}}
        return _flatten(params, quantize)


Inverter = InversionPipeline  # its name in version 0.1; to be removed in 0.3


class Header(msgspec.Struct):
    """A model's config.json."""

    format_version: Literal[1]
    name: str
    embedder: EmbedderIdentity
    model: Any  # of `from_dict`
    files: dict[str, str]
    embedding_norm: tuple[float, float] | None = None
    calibration: Weights | None = None
    record: dict[str, Any] = {}  # recipe, scores, or what it was converted from


class StoredModel(NamedTuple):
    """What a model folder holds: all but the embedder."""

    header: Header
    config: ModelConfig
    params: dict[Stage, Params]
    vocab_map: np.ndarray
    tokenizer: Tokenizer | None  # the model's own; None: it shares its embedder's vocabulary


def packaged_models() -> list[str]:
    return sorted(path.name for path in PACKAGED.glob("*") if path.is_dir())


def locate_model(name: str) -> Path:
    """The folder of a model: see `load`."""
    if os.path.isdir(name):
        return Path(name)
    if name in packaged_models():
        return PACKAGED / name
    if not is_hub_name(name):
        packaged = ", ".join(packaged_models()) or "none"
        advice = f"pass a model folder, a packaged name ({packaged}), or owner/name on the hub."
        raise InputError(f"There is no model {name!r}: {advice}")
    try:
        return download(name)
    except InputError as error:
        raise InputError(f"There is no model folder {name!r} here, and from the hub: {error}") from error


def read_model(name: str, put: Callable[[np.ndarray], Any] = jnp.asarray) -> StoredModel:
    """A model's folder without its embedder: see `load`."""
    folder = locate_model(name)
    header = read_header(folder)
    config = from_dict(ModelConfig, header.model, "model")
    with progress.stage(f"loading the model {header.name}"):
        files = _checked_files(folder, header.files)
        if not {"inverter.safetensors", "pieces.safetensors"} <= set(files):
            raise InputError(f"{folder} lacks inverter.safetensors or pieces.safetensors; download the model again.")
        tokenizer = read_tokenizer(files[TOKENIZER]) if TOKENIZER in files else None
        params: dict[Stage, Params] = {}
        for stage, network in NETWORKS.items():
            if (file := f"{stage}.safetensors") in files:
                like, shared = network(config).abstract_params(), params["inverter"]["t5"] if params else {}
                params[stage] = _unflatten(open_weights([files[file]]), like, stage, put, shared)
    return StoredModel(header, config, params, read_pieces(folder), tokenizer)


def read_header(folder: Path) -> Header:
    settings = read_json(folder / "config.json", "a model folder")
    if "embedder_model_name" in settings:
        name = str(folder)
        pair = ("DIR", name) if settings.get("architectures") == ["CorrectorEncoderModel"] else (name, "DIR")
        advice = "v2t convert --from vec2text --inverter {} --corrector {} OUT".format(*map(shlex.quote, pair))
        raise InputError(f"{name} is a checkpoint of the original vec2text; convert it first: {advice}.")
    try:
        return msgspec.convert(settings, Header)
    except msgspec.ValidationError as error:
        raise InputError(f"{folder}/config.json isn't a model's ({error}); download the model again.") from error


def read_pieces(folder: Path) -> np.ndarray:
    """A model's vocab_map: see Vocabulary."""
    file = folder / "pieces.safetensors"
    if not file.is_file():
        raise InputError(f"{folder} holds no model: it lacks {file.name}.")
    pieces = open_weights([file])
    vocab_map = pieces["pieces"][:] if "pieces" in pieces else np.empty(())
    if vocab_map.ndim != 1 or not np.issubdtype(vocab_map.dtype, np.integer):
        raise InputError(f"{folder}/pieces.safetensors doesn't hold a row of integers; download the model again.")
    return vocab_map


def _checked_files(folder: Path, files: dict[str, str]) -> dict[str, Path]:
    """A folder's recorded files by name, their sha256 compared."""
    paths = {}
    for file, sha256 in files.items():
        path = folder / Path(file).name
        if not os.access(path, os.R_OK) or not path.is_file():
            raise InputError(f"{path} is missing or unreadable; download the model again.")
        if sha256_of([path]) != sha256:
            raise InputError(f"{path} is truncated or altered (its sha256 is another one); download the model again.")
        paths[path.name] = path
    return paths


def load(
    name: str | Path = "minilm-wordnet",
    embedder: str | Path | TextEmbedder | None = None,
    *,
    put: Callable[[np.ndarray], Any] = jnp.asarray,
) -> InversionPipeline:
    """A model by folder, packaged name, or name on the Hugging Face hub (owner/name), with its embedder.

    Args:
        embedder: where the model's embedder lies now, or the embedder itself; by default by the name recorded.
        put: takes each parameter; by default to this process's first device.

    Raises:
        InputError: no such model, a damaged file, or not the embedder it was trained on.
    """
    embedder = embedder if embedder is None else named_or_embedder(embedder)
    header, config, params, vocab_map, tokenizer = read_model(str(name), put)
    recorded, whose = header.embedder, f"The model {header.name}"
    if embedder is None and not recorded.weights_sha256:
        known = f"{whose} was trained for {recorded.name}, whose weights aren't known"
        raise InputError(f"{known}: pass that embedder, as embedder=...")
    if embedder is None or isinstance(embedder, str):
        # By name alone a prefix may be the table's, the folder's, or one that was asked for.
        embedder = load_embedder(embedder or recorded.name, prefix=recorded.prefix)
    longest = recorded.max_length
    if isinstance(embedder, JaxEmbedder) and longest and longest < embedder.config.max_length:
        embedder = embedder.shortened(longest)
    # Another name draws a warning, below, and another width the pipeline's own error. Training may round the
    # embedder's arithmetic; the vectors to invert are the exact embedder's.
    check_identity(recorded.to_dict(), embedder.identity, whose, ignored=("name", "width", "dtype"))
    shares_vocabulary = tokenizer is None
    if tokenizer is None:
        if not isinstance(embedder, JaxEmbedder):
            raise InputError(
                f"{whose} shares its embedder's vocabulary, so it can't use {embedder.name}, which takes only text; "
                "leave the embedder out, or train a model with a tokenizer of its own."
            )
        check_length(config.max_length, embedder)
        tokenizer = embedder.tokenizer
    if not (recorded.weights_sha256 and embedder.weights_sha256) and embedder.name != recorded.name:
        warnings.warn(
            f"{whose} was trained for {recorded.name}; that {embedder.name} is the same embedder can't be checked.",
            stacklevel=2,
        )
    made_of = header.name, config, params, embedder, Vocabulary(tokenizer, vocab_map)
    learned = header.embedding_norm, header.calibration, tuple(header.files.values())
    return InversionPipeline(*made_of, shares_vocabulary, *learned)


def norm_statistics(vectors: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the lengths of `vectors` [n, E]: a pipeline's `embedding_norm`."""
    lengths = np.linalg.norm(vectors, axis=1)
    return float(lengths.mean()), float(lengths.std())


def check_length(max_length: int, embedder: JaxEmbedder) -> None:
    """Refuses a model of longer texts than its embedder reads."""
    room = embedder.config.max_length - len(embedder.token_map().before)
    if max_length > room:
        raise InputError(f"model.max_length is {max_length}, but {embedder.name} reads texts of {room} at most.")


def _flatten(params: Params, quantize: bool) -> dict[str, np.ndarray]:
    """Parameters -> flat names. Quantized: matrices int8, a scale per column (tables: row), long vectors float16."""
    flat: dict[str, np.ndarray] = {}
    for name, leaf in flatten_dict(params, sep="/").items():
        array = np.asarray(leaf, np.float32)
        quantized = quantize and array.size >= QUANTIZED_SIZE
        if not quantized or array.ndim < 2:
            flat[name] = array.astype(np.float16) if quantized else array
            continue
        axis = -1 if name.endswith(TABLE) else -2
        scale = np.maximum(np.abs(array).max(axis=axis, keepdims=True), 1e-12) / 127
        flat[name] = np.round(array / scale).astype(np.int8)
        flat[f"{name}.scale"] = scale
    return flat


def _unflatten(
    flat: dict[str, Any], like: Params, stage: str, put: Callable[[np.ndarray], Any], inverters: Params
) -> Params:
    """The inverse of `_flatten`, float32, checked against the shapes of `like`; a table left out is the inverter's."""
    shapes: dict[str, Any] = flatten_dict(like, sep="/")
    params: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name not in flat and name == f"t5/{TABLE}" and TABLE in inverters:
            params[name] = inverters[TABLE]
            continue
        if name not in flat:
            raise InputError(f"The {stage} lacks the parameter {name!r}; download the model again.")
        array = flat[name][:].astype(np.float32)
        if f"{name}.scale" in flat:
            array *= flat[f"{name}.scale"][:]
        if array.shape != shape.shape:
            raise InputError(f"The {stage}'s {name!r} has shape {array.shape}; config.json implies {shape.shape}.")
        params[name] = put(array)
    unknown = sorted(set(flat) - {key for name in shapes for key in (name, f"{name}.scale")})
    if unknown:
        raise InputError(f"The {stage} holds the unknown parameter {unknown[0]!r}; download the model again.")
    return unflatten_dict(params, sep="/")
