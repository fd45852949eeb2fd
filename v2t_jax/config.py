"""The configuration of everything, as plain dataclasses: one schema for recipes, command line and checkpoints.

A recipe is a Python file with `get_config() -> Config`; every field can be overridden on the command line. Values are
checked where they are built: a config that exists is a config that can run.
"""

import dataclasses
import importlib.util
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeGuard, get_args, get_origin

from v2t_jax.errors import InputError

Dtype = Literal["float32", "bfloat16"]
Stage = Literal["inverter", "corrector"]
DecodeLayout = Literal["batch", "model"]
STAGES: tuple[Stage, ...] = ("inverter", "corrector")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder-decoder. The defaults are t5-small's (v1.0)."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    feed_forward: Literal["relu", "gated-gelu"] = "relu"
    """relu is v1.0, gated-gelu is v1.1"""
    tie_word_embeddings: bool = True
    """True is v1.0: the head is the scaled token embedding"""
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    dtype: Dtype = "float32"
    """of the arithmetic; parameters, softmax and logits are float32"""
    remat: Literal["none", "full", "dots"] = "none"
    """what the backward pass recomputes of a layer: nothing, all of it, all but matrix products"""
    scan_unroll: int = 1
    """layers laid out per iteration of the layer scan"""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "num_heads",
            "num_encoder_layers",
            "num_decoder_layers",
        ):
            _require(getattr(self, name) > 0, f"t5.{name} is {getattr(self, name)}; it must be at least 1.")
        _require(self.scan_unroll >= 1, f"t5.scan_unroll is {self.scan_unroll}; it must be at least 1.")
        _require(0 <= self.dropout_rate < 1, f"t5.dropout_rate is {self.dropout_rate}; it must be in [0, 1).")
        _require(
            self.relative_attention_num_buckets >= 4
            and self.relative_attention_max_distance > self.relative_attention_num_buckets // 2,
            "t5.relative_attention_num_buckets must be at least 4, relative_attention_max_distance above half of it.",
        )


# The published sizes of T5 v1.0 (Raffel et al. 2020, section 3.7).
T5_SIZES = {
    "t5-small": T5Config(),
    "t5-base": T5Config(d_model=768, d_ff=3072, num_heads=12, num_encoder_layers=12, num_decoder_layers=12),
    "t5-large": T5Config(d_model=1024, d_ff=4096, num_heads=16, num_encoder_layers=24, num_decoder_layers=24),
    "t5-3b": T5Config(d_model=1024, d_kv=128, d_ff=16384, num_heads=32, num_encoder_layers=24, num_decoder_layers=24),
    "t5-11b": T5Config(d_model=1024, d_kv=128, d_ff=65536, num_heads=128, num_encoder_layers=24, num_decoder_layers=24),
}


@dataclass(frozen=True)
class ModelConfig:
    """What inverter and corrector share. Symbols as in upstream's paper: R pseudo-tokens, L tokens."""

    t5: T5Config = field(default_factory=T5Config)
    embedding_width: int = 768
    """E, the width of the vectors to invert; training takes it from the embedder"""
    num_pseudo_tokens: int = 16
    """R: pseudo-tokens that an embedding is projected to"""
    max_length: int = 32
    """L: tokens of a text, its end token included"""
    projection_dropout: float = 0.1
    """inside the inverter's projection only, as in the original"""
    standardize: bool = False
    """option: inputs as (e - mean) / std with statistics of the training texts; off is the original's maths"""
    bag_of_words: bool = False
    """option: adds a linear term e A E^T to the logits; off is the original's maths"""
    input_norm: bool = True
    """the corrector's layer normalization of its input; the oldest published correctors have none"""

    def __post_init__(self) -> None:
        _require(0 <= self.projection_dropout < 1, "model.projection_dropout must be in [0, 1).")
        _require(self.num_pseudo_tokens > 0, "model.num_pseudo_tokens must be at least 1.")
        _require(self.max_length >= 2, "model.max_length must be at least 2: one token and the end token.")
        _require(self.embedding_width > 0, "model.embedding_width must be at least 1.")


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    """at its peak"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """after the warm-up; linear and cosine end at zero"""
    warmup_steps: int = 1000
    weight_decay: float = 0.01
    """on matrices only"""
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0
    """global gradient norm; 0 does not clip"""
    accumulate_steps: int = 1
    """micro-batches a parameter update"""
    skip_bad_updates: int = 0
    """updates whose loss or gradient isn't finite that a run leaves out, counted in its log, before it stops; 0 stops
    at the first"""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate must be above 0.")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative.")
        _require(self.accumulate_steps >= 1, "optimizer.accumulate_steps must be at least 1.")
        _require(self.skip_bad_updates >= 0, "optimizer.skip_bad_updates must not be negative; 0 stops at the first.")
        _require(self.weight_decay >= 0, "optimizer.weight_decay must not be negative.")
        _require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "optimizer.b1 and b2 must lie in [0, 1).")
        _require(self.clip_norm >= 0, "optimizer.clip_norm must not be negative; 0 switches clipping off.")


@dataclass(frozen=True)
class StageConfig:
    """One training run: of the inverter, or of the corrector."""

    num_steps: int = 1000
    batch_size: int = 128
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, "num_steps must be at least 1.")
        _require(self.batch_size >= 1, "batch_size must be at least 1.")
        _require(
            self.batch_size % self.optimizer.accumulate_steps == 0,
            f"batch_size {self.batch_size} can't be cut into {self.optimizer.accumulate_steps} micro-batches: "
            "make it a multiple of optimizer.accumulate_steps.",
        )


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[str, ...] = ("wordnet",)
    """wordnet (packaged), paths of .txt, .jsonl, .tsv (each also .gz) and .parquet files, folders or globs of such, or
    tfds:NAME:FIELD; or the one folder of a data set that `v2t data build` made, given as held_out too"""
    weights: tuple[float, ...] = ()
    """times that a source's texts appear in an epoch, for each source; empty is once each"""
    held_out: str = "wordnet"
    """source whose held-out split is evaluated on"""
    vocabulary_size: int = 0
    """commonest word-pieces of the sources to keep; 0 keeps the embedder's whole vocabulary"""
    embeddings: str = ""
    """column of a built data set with the texts' embeddings (v2t data embed); empty makes them on the fly"""
    hypotheses: str = ""
    """column with what the corrector is to correct (v2t data hypotheses); empty makes it on the fly"""
    folds: int = 1
    """with 2 or more, a built data set's texts are K parts, of which `fold` is left out; for hypotheses out of fold"""
    fold: int = 0
    """the part that is left out"""
    span_share: float = 0.0
    """share of texts cut to a random contiguous span, for variety"""
    bucket_lengths: tuple[int, ...] = ()
    """batch lengths (tokens, end token included); empty pads all to model.max_length"""

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "data.sources is empty: name at least one source of text.")
        _require(
            len(self.weights) in (0, len(self.sources)) and all(0 <= weight < math.inf for weight in self.weights),
            "data.weights must hold one finite number, 0 or more, for each of data.sources.",
        )
        _require(0 <= self.span_share <= 1, "data.span_share must lie between 0 and 1.")
        _require(0 <= self.fold < self.folds, f"There is no fold {self.fold} of {self.folds}: data.fold counts from 0.")
        _require(self.vocabulary_size >= 0, "data.vocabulary_size must not be negative; 0 keeps all.")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes what the others leave."""

    data: int = -1
    """each has part of the batch; the only axis that goes from slice to slice, over the data-centre network"""
    fsdp: int = 1
    """each has part of the batch and of the weights, which are gathered where they are used"""
    model: int = 1
    """each has some of the heads, hidden units and words"""
    slices: int = 0
    """slices of TPUs that the data axis is laid over; 0 takes what the devices say. Other devices are cut into so many
    groups of neighbours"""
    decode: DecodeLayout = "batch"
    """how a run decodes, for hypotheses and evaluation. batch: whole weights on every device, rows over all axes;
    model: weights stay cut over the model axis, which must be above 1 for that, for networks that don't fit a device"""

    def __post_init__(self) -> None:
        _require(self.slices >= 0, f"mesh.slices is {self.slices}; it must not be negative (0: what the devices say).")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation with generation, during training and at its end."""

    every_steps: int = 1000
    """0 evaluates at the end only"""
    num_examples: int = 100
    num_steps: tuple[int, ...] = (0, 1, 8)
    """correction steps of the final evaluation"""
    sequence_beam_width: tuple[int, ...] = (1, 4)

    def __post_init__(self) -> None:
        _require(self.every_steps >= 0, "evaluation.every_steps must not be negative; 0 evaluates at the end only.")
        _require(self.num_examples >= 1, "evaluation.num_examples must be at least 1.")
        _require(min(self.num_steps, default=-1) >= 0, "evaluation.num_steps must hold numbers of steps, 0 or more.")
        _require(
            min(self.sequence_beam_width, default=0) >= 1,
            "evaluation.sequence_beam_width must hold widths of 1 or more.",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "checkpoint.every_steps must be at least 1.")
        _require(self.keep >= 1, "checkpoint.keep must be at least 1.")


@dataclass(frozen=True)
class ApiConfig:
    """How an OpenAI-compatible endpoint is asked for embeddings, and what that may cost in one run."""

    model: str = ""
    """the endpoint's name for the embedding model"""
    dimensions: int | None = None
    """ask for vectors of this width, where the endpoint can cut them; by default it decides"""
    key_variable: str = "OPENAI_API_KEY"
    """the environment variable that holds the key; where it is not set, no key is sent"""
    concurrency: int = 4
    """requests at a time"""
    timeout: float = 60.0
    """seconds without a byte after which a request has failed"""
    retries: int = 6
    """how often a request is repeated after 408, 429, 5xx, a timeout or a broken connection"""
    backoff: float = 1.0
    """seconds before the first repetition, give or take; each further one waits twice as long"""
    price: float | None = None
    """dollars for a million tokens; with it, the cost is shown and can be limited"""
    max_cost: float | None = None
    """dollars that a run must not exceed; needs the price"""
    max_requests: int | None = None
    """requests that a run must not exceed, repetitions included"""
    cache: str | None = None
    """folder for the vectors that were paid for; by default one in the user's cache folder"""

    def __post_init__(self) -> None:
        _require(self.dimensions is None or self.dimensions >= 1, "api.dimensions must be at least 1.")
        _require(self.concurrency >= 1, "api.concurrency must be at least 1.")
        _require(0 < self.timeout < math.inf, "api.timeout must be a number of seconds above 0.")
        _require(self.retries >= 0, "api.retries must not be negative; 0 repeats nothing.")
        _require(0 <= self.backoff < math.inf, "api.backoff must be a number of seconds, 0 or more.")
        _require(self.price is None or 0 <= self.price < math.inf, "api.price must be a finite number, 0 or more.")
        _require(self.max_requests is None or self.max_requests >= 0, "api.max_requests must not be negative.")
        _require(self.max_cost is None or 0 <= self.max_cost < math.inf, "api.max_cost must be finite, 0 or more.")
        _require(self.max_cost is None or self.price is not None, "api.max_cost needs api.price: give both.")


def is_endpoint(embedder: object) -> TypeGuard[str]:
    """Whether what names an embedder is an endpoint's base URL."""
    return isinstance(embedder, str) and "://" in embedder


@dataclass(frozen=True)
class Config:
    """A recipe: `v2t train configs/NAME.py --workdir DIR` runs its stages one after the other."""

    name: str = "unnamed"
    embedder: str = "all-MiniLM-L6-v2"
    """a name that `v2t embedders` lists, a folder, or an endpoint's base URL: its vectors are read from columns of a
    built data set, and the model gets the data set's tokenizer"""
    embedder_dtype: Dtype = "float32"
    """of the embedder's arithmetic inside the training step"""
    api: ApiConfig = field(default_factory=ApiConfig)
    """of an embedder behind an endpoint; a run asks it for held-out texts and what is made of them, in no step"""
    stages: tuple[Stage, ...] = STAGES
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    initial_t5: str = ""
    """folder or hub name of a T5 that both networks start from, as the original's do; its sizes replace those of
    model.t5, and the embedder (behind an endpoint: the data set) must share its tokenizer, as GTR does"""
    initial_embedding: Literal["random", "embedder"] = "random"
    """embedder: token embeddings start from the embedder's own word embeddings, centred and rescaled"""
    initial_embedding_std: float = 0.02
    initial_inverter: str = ""
    """a trained model (folder or name) whose inverter makes the corrector's hypotheses, where stages has none"""
    corrector_from_inverter: bool = False
    """start the corrector's T5 from the trained inverter's, where the original starts it from pretrained T5"""
    partial_hypotheses: bool = False
    """option: every other hypothesis that the corrector is trained on is partly right, as those of later steps are;
    off, the original's way, all are the inverter's guesses"""
    data: DataConfig = field(default_factory=DataConfig)
    inverter: StageConfig = field(default_factory=StageConfig)
    corrector: StageConfig = field(default_factory=StageConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every_steps: int = 20

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0, "stages is empty: name inverter, corrector or both.")
        _require(
            "corrector" not in self.stages
            or "inverter" in self.stages[: self.stages.index("corrector")]
            or (bool(self.initial_inverter) and "inverter" not in self.stages),
            "The corrector needs an inverter for its hypotheses: put inverter before it in stages, or give a trained "
            "model as initial_inverter.",
        )
        _require(
            not self.initial_inverter or "inverter" not in self.stages,
            "initial_inverter is for a recipe whose stages are corrector alone: leave it empty, or take inverter out.",
        )
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be a number from 0 to {2**32 - 1}.")
        _require(self.log_every_steps >= 1, "log_every_steps must be at least 1.")
        rows = self.corrector.batch_size // self.corrector.optimizer.accumulate_steps
        _require(
            not self.partial_hypotheses or rows % 2 == 0,
            f"partial_hypotheses needs an even number of rows in the corrector's (micro-)batches, not {rows}.",
        )
        _require(
            not (self.partial_hypotheses and self.data.hypotheses),
            "partial_hypotheses are made on the fly: leave it off, or data.hypotheses empty.",
        )
        _require(self.initial_embedding_std > 0, "initial_embedding_std must be above 0.")
        _require(
            not self.initial_t5 or (self.initial_embedding == "random" and not self.data.vocabulary_size),
            "initial_t5 brings its own token embeddings: leave initial_embedding and data.vocabulary_size as they are.",
        )
        if is_endpoint(self.embedder):
            self._check_endpoint()
        else:
            _require(self.api == ApiConfig(), "api is for an embedder behind an endpoint: give its URL as embedder.")

    def _check_endpoint(self) -> None:
        """An endpoint isn't asked inside a training step, so all that comes of it must have been made before."""
        data = self.data
        _require(
            bool(data.embeddings),
            f"{self.embedder} isn't asked while training: make the texts' vectors with 'v2t data embed', and name "
            "that column as data.embeddings.",
        )
        _require(
            "corrector" not in self.stages or bool(data.hypotheses),
            f"{self.embedder} isn't asked while training: make the corrector's hypotheses and their vectors with "
            "'v2t data hypotheses', and name that column as data.hypotheses.",
        )
        _require(
            data.span_share == 0,
            f"data.span_share is {data.span_share}, but {self.embedder} isn't asked for the vectors of random spans: "
            "set it to 0.",
        )
        _require(
            not self.partial_hypotheses,
            f"partial_hypotheses are made on the fly, and {self.embedder} isn't asked for their vectors: leave it off.",
        )
        _require(
            self.initial_embedding == "random",
            f"initial_embedding=embedder needs weights, and {self.embedder} shows none: set it to random.",
        )


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one run find each other; under Slurm, Open MPI, GKE and on TPU VMs nothing is needed."""

    coordinator: str | None = None
    """HOST:PORT of process 0; auto, the default, asks the environment, none runs alone (or V2T_COORDINATOR)"""
    num_processes: int | None = None
    """processes in all (or V2T_NUM_PROCESSES)"""
    process_id: int | None = None
    """this one's number, from 0 (or V2T_PROCESS_ID)"""
    timeout: float = 300.0
    """seconds to wait for the others at the start"""

    def __post_init__(self) -> None:
        _require(self.num_processes is None or self.num_processes >= 1, "distributed.num_processes must be at least 1.")
        _require(self.process_id is None or self.process_id >= 0, "distributed.process_id must not be negative.")
        _require(0 < self.timeout < math.inf, "distributed.timeout must be a number of seconds above 0.")


def load_recipe(path: str) -> Config:
    """The config of a recipe file (`get_config() -> Config`).

    Raises:
        InputError: no such file, or it has no working `get_config`.
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise InputError(f"There is no recipe at {path}; give the path of a file such as configs/tiny.py.")
    spec = importlib.util.spec_from_file_location("v2t_jax_recipe", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file; a recipe is a .py file that defines get_config().")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = get_config() if callable(get_config) else None
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's file may raise
        raise InputError(f"The recipe {path} doesn't run ({type(error).__name__}: {error}); mend it.") from error
    if not isinstance(config, Config):
        raise InputError(f"The recipe {path} must define get_config() that returns a v2t_jax.config.Config.")
    return from_dict(Config, to_dict(config), "config")  # a dataclass doesn't look at its fields' types


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON types."""
    return dataclasses.asdict(config)


RENAMED = {"standardise": "standardize"}  # fields of configs that were saved by version 0.1


def from_dict(schema: type, values: dict[str, Any], where: str = "config") -> Any:
    """The inverse of `to_dict`: builds dataclass `schema`, refusing fields it doesn't have.

    Raises:
        InputError: an unknown field, a missing one without default, or a value of the wrong kind.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} must be an object with fields, not {type(values).__name__}.")
    fields = {f.name: f for f in dataclasses.fields(schema)}
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where} has the unknown field {unknown[0]!r}; known are {', '.join(fields)}.")
    built = {}
    for name, value in values.items():
        kind = fields[name].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            value = from_dict(kind, value, f"{where}.{name}")
        else:
            value = tuple(value) if isinstance(value, list) else value
            if not _fits(value, kind):
                allowed = getattr(kind, "__name__", "") if isinstance(kind, type) else str(kind)
                raise InputError(f"{where}.{name} is {value!r}; it must be {allowed.replace('typing.', '')}.")
        built[name] = value
    return schema(**built)


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:  # all of this schema's are tuple[kind, ...]
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
