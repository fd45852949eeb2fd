"""Configuration: one schema for recipes, command line, saved models and work directories.

A recipe is a Python file with `get_config() -> Config`; every field can be overridden on the command line. msgspec
checks types and ranges where a config is built, so a config that exists can run. (pydantic would double the time that
`v2t --help` takes.)
"""

import dataclasses
import os
import re
import runpy
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import msgspec
from msgspec import Meta

from v2t_jax.errors import InputError

Dtype = Literal["float32", "bfloat16"]
Stage = Literal["inverter", "corrector", "ranker"]
DecodeLayout = Literal["batch", "model"]
STAGES: tuple[Stage, ...] = ("inverter", "corrector", "ranker")

Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0, le=sys.float_info.max)]  # both finite
NotNegative = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Share = Annotated[float, Meta(ge=0, le=1)]
BelowOne = Annotated[float, Meta(ge=0, lt=1)]

RENAMED = {"standardise": "standardize"}  # fields in configs saved by version 0.1
_WORDS = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false", "array": "a list"}


@dataclass(frozen=True)
class _Section:
    """Checks fields against their annotations; `section` is the class's name in a recipe, for error messages."""

    _section = ""

    def __init_subclass__(cls, section: str = "") -> None:
        cls._section = section

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, msgspec.convert(value, field.type))
            except msgspec.ValidationError as error:
                where = f"{self._section}.{field.name}".lstrip(".")
                raise InputError(f"{where} is {value!r}; it must be {_expected(error, field.type)}.") from None
        for message, holds in self._rules().items():
            if not holds:
                raise InputError(message)

    def _rules(self) -> dict[str, bool]:
        """Whether what must hold between fields does, by the message if it doesn't."""
        return {}


def _expected(error: msgspec.ValidationError, kind: Any) -> str:
    if str(error).startswith("Invalid enum value"):  # of a Literal, whose choices the error doesn't name
        return " or ".join(re.findall(r"'([\w-]+)'", str(kind)))
    rule = str(error).partition(" - at ")[0].removeprefix("Expected ").partition(", got ")[0]
    rule = rule.replace(f"<= {sys.float_info.max}", "that is finite").replace("`", "").replace("| null", "or None")
    return re.sub(r"[a-z]+", lambda word: _WORDS.get(word[0], word[0]), rule)


Section = TypeVar("Section", bound=_Section)


@dataclass(frozen=True)
class T5Config(_Section, section="model.t5"):
    """Sizes of a T5 encoder-decoder; the defaults are t5-small's (v1.0)."""

    vocab_size: Count = 32128
    d_model: Count = 512
    d_kv: Count = 64
    d_ff: Count = 2048
    num_heads: Count = 8
    num_encoder_layers: Count = 6
    num_decoder_layers: Count = 6
    feed_forward: Literal["relu", "gated-gelu"] = "relu"  # relu in v1.0, gated-gelu in v1.1
    tie_word_embeddings: bool = True  # True in v1.0: the output layer is the scaled token embedding
    relative_attention_num_buckets: Annotated[int, Meta(ge=4)] = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: BelowOne = 0.1
    dtype: Dtype = "float32"  # of the arithmetic; parameters, softmax and logits are always float32
    remat: Literal["none", "full", "dots"] = "none"  # what backward recomputes: nothing, everything, all but matmuls
    scan_unroll: Count = 1  # layers unrolled per iteration of the layer scan

    def _rules(self) -> dict[str, bool]:
        message = "model.t5.relative_attention_max_distance must be more than half of relative_attention_num_buckets."
        return {message: self.relative_attention_max_distance > self.relative_attention_num_buckets // 2}


# Published sizes of T5 v1.0 (Raffel et al. 2020, section 3.7).
T5_SIZES = {
    "t5-small": T5Config(),
    "t5-base": T5Config(d_model=768, d_ff=3072, num_heads=12, num_encoder_layers=12, num_decoder_layers=12),
    "t5-large": T5Config(d_model=1024, d_ff=4096, num_heads=16, num_encoder_layers=24, num_decoder_layers=24),
    "t5-3b": T5Config(d_model=1024, d_kv=128, d_ff=16384, num_heads=32, num_encoder_layers=24, num_decoder_layers=24),
    "t5-11b": T5Config(d_model=1024, d_kv=128, d_ff=65536, num_heads=128, num_encoder_layers=24, num_decoder_layers=24),
}


@dataclass(frozen=True)
class ModelConfig(_Section, section="model"):
    """Settings that inverter and corrector share."""

    t5: T5Config = T5Config()
    embedding_width: Count = 768  # E, dimensions of the embeddings to invert; training takes it from the embedder
    num_pseudo_tokens: Count = 16  # R, pseudo-tokens that an embedding is projected to
    max_length: Annotated[int, Meta(ge=2)] = 32  # L, tokens of a text, including its end token
    projection_dropout: BelowOne = 0.1  # inside the inverter's projection only, as in the original
    standardize: bool = False  # feed (e - mean) / std, with statistics of the training texts; the original does not
    bag_of_words: bool = False  # add a linear term e A E^T to the logits; the original does not
    input_norm: bool = True  # layer-normalize the corrector's input; the oldest published correctors do not
    num_ranker_layers: Count = 2
    state_width: CountOrZero = 0  # of the hidden states that the ranker reads; training takes it from the embedder


@dataclass(frozen=True)
class OptimizerConfig(_Section, section="optimizer"):
    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: Positive = 1e-3  # peak learning rate
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; linear and cosine decay to zero
    warmup_steps: CountOrZero = 1000
    weight_decay: NotNegative = 0.01  # on matrices only
    b1: BelowOne = 0.9
    b2: BelowOne = 0.999
    clip_norm: NotNegative = 1.0  # largest global gradient norm; 0 turns clipping off
    accumulate_steps: Count = 1  # micro-batches per parameter update
    skip_bad_updates: CountOrZero = 0  # updates with a non-finite loss or gradient to skip; 0 stops at the first


@dataclass(frozen=True)
class StageConfig(_Section):
    """One training run, of the inverter or of the corrector."""

    num_steps: Count = 1000
    batch_size: Count = 128
    optimizer: OptimizerConfig = OptimizerConfig()

    def _rules(self) -> dict[str, bool]:
        size, parts = self.batch_size, self.optimizer.accumulate_steps
        message = f"batch_size={size} is not divisible by optimizer.accumulate_steps={parts}; change one of them."
        return {message: size % parts == 0}


@dataclass(frozen=True)
class DataConfig(_Section, section="data"):
    sources: Annotated[tuple[str, ...], Meta(min_length=1)] = ("wordnet",)
    """wordnet (packaged); text files, folders or globs (see `v2t data build`); tfds:NAME:FIELD; or one data set made by
    `v2t data build`, given as held_out too"""
    tokenizer: str = ""
    """tokenizer of the model's texts: an embedder that `v2t embedders` lists, a folder or a hub name, such as t5-base;
    empty: the embedder's own (behind an endpoint, the data set's). If it isn't the embedder's, training retokenizes"""
    weights: tuple[NotNegative, ...] = ()  # how often each source's texts appear in an epoch; empty: once
    held_out: str = "wordnet"  # source whose held-out split is evaluated on
    vocabulary_size: CountOrZero = 0  # keep only the most frequent tokens of the sources; 0 keeps the whole vocabulary
    embeddings: str = ""  # column with the texts' embeddings (v2t data embed); empty computes them on the fly
    hypotheses: str = ""  # column with the corrector's hypotheses (v2t data hypotheses); empty computes them on the fly
    folds: Count = 1  # for out-of-fold hypotheses: parts of a built data set, of which `fold` is left out of training
    fold: CountOrZero = 0  # the part that is left out
    span_share: Share = 0.0  # share of texts cut to a random contiguous span, for variety
    bucket_lengths: tuple[int, ...] = ()  # lengths of batches, with the end token; empty pads all to model.max_length

    def _rules(self) -> dict[str, bool]:
        given, sources = len(self.weights), len(self.sources)
        return {
            f"data.weights has {given} numbers for {sources} sources; give one per source.": given in (0, sources),
            f"data.fold is {self.fold}; it must be less than data.folds={self.folds}.": self.fold < self.folds,
        }


@dataclass(frozen=True)
class BuildSettings(_Section):
    """What decides a built data set's content, beside sources and tokenizer."""

    vocabulary_size: CountOrZero = 0
    """keep the most common tokens of the training texts and drop texts with others; 0 keeps all"""
    held_out_share: Annotated[float, Meta(gt=0, lt=1)] = 0.02
    """share of the texts held out from training; with millions of texts, 0.001 is enough"""
    max_tokens: Annotated[int, Meta(ge=1, lt=2**16)] = 512  # maximum tokens of a text; the rest is cut off


@dataclass(frozen=True)
class MeshConfig(_Section, section="mesh"):
    """Devices along each axis of the mesh; -1 takes all that remain."""

    data: int = -1  # data parallelism: splits the batch; the only axis that crosses TPU slices
    fsdp: int = 1  # splits the batch and the weights, which are gathered where they are used
    model: int = 1  # tensor parallelism: splits heads, hidden units and vocabulary
    slices: CountOrZero = 0  # TPU slices along the data axis; 0 asks the devices; others form this many groups
    decode: DecodeLayout = "batch"  # weights for decoding: whole on every device, or split over the model axis


@dataclass(frozen=True)
class EvalConfig(_Section, section="evaluation"):
    """Evaluation on held-out texts, during training and at its end."""

    every_steps: CountOrZero = 1000  # 0 evaluates at the end only
    num_examples: Count = 100
    num_steps: Annotated[tuple[CountOrZero, ...], Meta(min_length=1)] = (0, 1, 8)  # correction steps, at the end
    sequence_beam_width: Annotated[tuple[Count, ...], Meta(min_length=1)] = (1, 4)


@dataclass(frozen=True)
class CheckpointConfig(_Section, section="checkpoint"):
    every_steps: Count = 1000
    keep: Count = 2


@dataclass(frozen=True)
class ApiConfig(_Section, section="api"):
    """An OpenAI-compatible embeddings endpoint, and what one run may spend on it."""

    model: str = ""  # the endpoint's name for the embedding model
    dimensions: Count | None = None  # width to ask for, where the endpoint can shorten vectors; by default its own
    key_variable: str = "OPENAI_API_KEY"  # environment variable with the key; if unset, no key is sent
    batch_size: Count | None = None  # most texts that a request may hold, for servers with a limit, whoever asks
    concurrency: Count = 4  # requests in flight
    timeout: Positive = 60.0  # seconds without a byte after which a request has failed
    retries: CountOrZero = 6  # retries of a request after 408, 429, 5xx, a timeout or a broken connection
    backoff: NotNegative = 1.0  # seconds before the first retry, with jitter; doubles with each further one
    price: NotNegative | None = None  # dollars per million tokens; needed to show and limit the cost
    max_cost: NotNegative | None = None  # dollars that a run may spend; needs the price
    max_requests: CountOrZero | None = None  # requests that a run may send, retries included
    cache: str | None = None  # folder for the vectors already paid for; by default in the user's cache folder

    def _rules(self) -> dict[str, bool]:
        return {"api.max_cost needs api.price: give both.": self.max_cost is None or self.price is not None}


def is_endpoint(embedder: object) -> TypeGuard[str]:
    """Whether the name of an embedder is an endpoint's base URL."""
    return isinstance(embedder, str) and "://" in embedder


@dataclass(frozen=True)
class Config(_Section):
    """A recipe: `v2t train configs/NAME.py --workdir DIR` runs its stages in order."""

    name: str = "unnamed"
    embedder: str = "all-MiniLM-L6-v2"  # a name that `v2t embedders` lists, a folder, or an endpoint's base URL
    embedder_dtype: Dtype = "float32"  # of the embedder's arithmetic inside the training step
    api: ApiConfig = ApiConfig()  # for an embedder behind an endpoint; asked for held-out and recovered texts only
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1)] = ("inverter", "corrector")
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    model: ModelConfig = ModelConfig()
    initial_t5: str = ""
    """folder or hub name of the T5 that both networks start from; its sizes replace those of model.t5, and its
    tokenizer must be that of the texts: GTR has it, otherwise name it as data.tokenizer"""
    initial_embedding: Literal["random", "embedder"] = "random"  # embedder: its word embeddings, centered, rescaled
    initial_embedding_std: Positive = 0.02
    initial_inverter: str = ""
    """model whose inverter the training goes on with, even for another embedder, or, if stages has none, that makes the
    corrector's hypotheses as it is"""
    initial_corrector: str = ""  # the same for the corrector; kept as it is if stages has none
    initial_ranker: str = ""  # the same for the ranker
    corrector_from_inverter: bool = False  # start the corrector's T5 from the inverter's, not the pretrained one
    shared_table: bool = False  # the corrector keeps the inverter's token embeddings, which a folder then holds once
    partial_hypotheses: bool = False  # make every other training hypothesis partly correct, as in later steps
    edited_hypotheses: bool = False
    """make every other training hypothesis of the corrector the text with random edits, as guided edits leave it; with
    partial_hypotheses, the inverter's outputs and the partial ones share the other half"""
    data: DataConfig = DataConfig()
    inverter: StageConfig = StageConfig()
    corrector: StageConfig = StageConfig()
    ranker: StageConfig = StageConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every_steps: Count = 20

    def _rules(self) -> dict[str, bool]:
        inverter_first = self.stages[0] == "inverter"
        learners = [getattr(self, stage) for stage in self.stages if stage != "inverter"]
        rows = [stage.batch_size // stage.optimizer.accumulate_steps for stage in learners]
        mixed_in = self.partial_hypotheses + self.edited_hypotheses
        return {
            "Corrector and ranker need an inverter for their hypotheses: put inverter before them in stages, or give a "
            "trained model as initial_inverter.": not learners or inverter_first or bool(self.initial_inverter),
            "partial_hypotheses need an even number of rows per (micro-)batch, edited_hypotheses too, both a "
            f"multiple of 4; it is {rows[0] if rows else 0}.": all(count % 2**mixed_in == 0 for count in rows),
            "partial_hypotheses and edited_hypotheses are made on the fly; turn them off, or leave data.hypotheses "
            "empty.": not (mixed_in and self.data.hypotheses),
            "initial_t5 has its own token embeddings: leave initial_embedding and data.vocabulary_size out.": (
                not self.initial_t5 or (self.initial_embedding == "random" and not self.data.vocabulary_size)
            ),
        }


@dataclass(frozen=True)
class DistributedConfig(_Section, section="distributed"):
    """How the processes of one run find each other; on Slurm, Open MPI, GKE and TPU VMs nothing is needed."""

    coordinator: str | None = None
    """HOST:PORT of process 0; auto, the default, asks the environment, none runs alone (or V2T_COORDINATOR)"""
    num_processes: Count | None = None  # processes in all (or V2T_NUM_PROCESSES)
    process_id: CountOrZero | None = None  # number of this process, from 0 (or V2T_PROCESS_ID)
    timeout: Positive = 300.0  # seconds to wait for the others at the start


def load_recipe(path: str) -> Config:
    """The config of a recipe file (`get_config() -> Config`)."""
    if not os.path.isfile(path):
        raise InputError(f"There is no recipe at {path}; give the path of a file such as configs/tiny.py.")
    if not path.endswith(".py"):
        raise InputError(f"{path} is not a Python file; a recipe is a .py file that defines get_config().")
    try:
        get_config = runpy.run_path(path, run_name="v2t_jax_recipe").get("get_config")
        config = get_config() if callable(get_config) else None
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's file may raise
        raise InputError(f"Recipe {path} failed to load ({type(error).__name__}: {error}); fix it.") from error
    if not isinstance(config, Config):
        raise InputError(f"Recipe {path} must define get_config() that returns a v2t_jax.config.Config.")
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON types."""
    return dataclasses.asdict(config)


def from_dict(schema: type[Section], values: dict[str, Any], where: str = "config") -> Section:
    """The inverse of `to_dict`; absent fields take their defaults. `where` names the section in error messages."""
    if not isinstance(values, dict):
        raise InputError(f"{where} must be an object with fields, not {type(values).__name__}.")
    fields = {field.name: field.type for field in dataclasses.fields(schema)}
    values = {RENAMED.get(name, name): value for name, value in values.items()}
    if unknown := sorted(set(values) - set(fields)):
        raise InputError(f"{where} has the unknown field {unknown[0]!r}; known are {', '.join(fields)}.")
    for name, value in values.items():
        kind = fields[name]
        if isinstance(kind, type) and issubclass(kind, _Section):
            values[name] = from_dict(kind, value, f"{where}.{name}")
    return schema(**values)
