"""What a recipe trains with: embedder, tokenizer, texts, columns, and the parameters it starts from."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from v2t_jax import progress
from v2t_jax.config import STAGES, ApiConfig, Config, ModelConfig, Stage, T5Config, is_endpoint
from v2t_jax.data.batches import Batches
from v2t_jax.data.columns import Column, open_column
from v2t_jax.data.dataset import TokenDataset, tokenizer_sha256
from v2t_jax.data.recipe import open_texts, texts_sha256
from v2t_jax.data.vocabulary import Vocabulary, read_tokenizer
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, differing_field, shares_vocabulary
from v2t_jax.embedders.black_box import HttpEmbedder, embed_once
from v2t_jax.embedders.load import KNOWN, load_embedder, load_tokenizer
from v2t_jax.errors import InputError
from v2t_jax.interop.files import folder_tokenizer, sha256_of, weight_files
from v2t_jax.interop.hf_t5 import load_t5
from v2t_jax.interop.hub import folder_of
from v2t_jax.inversion.embed_hypotheses import retokenizer
from v2t_jax.inversion.pipeline import (
    TOKENIZER,
    InversionPipeline,
    check_length,
    load,
    locate_model,
    read_header,
    read_model,
    read_pieces,
)
from v2t_jax.models.layers import Params
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.models.t5 import TABLE
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import make_mesh, param_specs, state_shardings
from v2t_jax.train.precompute import EMBEDDING, check_column
from v2t_jax.train.step import FrozenParams, Task, Tokens

STATISTICS_TEXTS = 4096  # for the mean and deviation that `standardize` uses
NORM_TEXTS = 256  # for the vectors' lengths, by which a model recognizes vectors of another embedder


@dataclasses.dataclass
class TrainContext:
    """What both stages work with."""

    config: Config
    model: ModelConfig  # with the embedder's width and the vocabulary's size filled in
    embedder: TextEmbedder
    vocabulary: Vocabulary
    datasets: list[TokenDataset]
    columns: dict[str, Column]  # by name: what the stages read instead of computing it
    held_out: list[str]  # normalized, short enough for the model

    def __post_init__(self) -> None:
        # The embedder if its network runs inside the training step; None: all its vectors come from columns.
        self.in_step = self.embedder if isinstance(self.embedder, JaxEmbedder) else None
        # Whether the model's ids reach the embedder without becoming text; if not, the host retokenizes them.
        self.shares_vocabulary = shares_vocabulary(self.embedder, self.vocabulary.tokenizer)
        self.retokenizes = self.in_step is not None and not self.shares_vocabulary
        embedder: Any = self.in_step
        self._retokenizer = functools.cache(lambda length: retokenizer(self.vocabulary, embedder, length)[0])

    def task(self, stage: Stage) -> Task:
        """What a stage's step computes."""
        embedder = self.in_step
        network = embedder.config if embedder else None
        token_map = embedder.token_map() if embedder and self.shares_vocabulary else None
        config, shared = self.config, self.config.shared_table and stage == "corrector"
        mixed_in = config.partial_hypotheses, config.edited_hypotheses
        return Task(stage, self.model, network, token_map, *mixed_in, config.mesh.decode, shared)

    def frozen(self, inverter: Params | None = None) -> FrozenParams:
        """What a step reads but doesn't train, on the host."""
        weights = self.in_step and self.in_step.params
        return FrozenParams(weights, jnp.asarray(self.vocabulary.vocab_map), inverter)

    def inverter(self, params: dict[Stage, Params]) -> InversionPipeline:
        """A pipeline with these networks; it decodes on the recipe's mesh, or where hosts embed, host by host."""
        return InversionPipeline(
            *(self.config.name, self.model, self.decodable(params), self.embedder, self.vocabulary),
            shares_vocabulary=self.shares_vocabulary,
            mesh=make_mesh(self.config.mesh) if self.shares_vocabulary else None,
            decode=self.config.mesh.decode,
        )

    def decodable(self, params: dict[Stage, Params]) -> dict[Stage, Params]:
        """Parameters in training as the pipeline takes them."""
        return params if self.shares_vocabulary else processes.fetch(params)

    def retokenize(self, ids: np.ndarray) -> Tokens:
        """Texts of model ids [n, L] in the embedder's tokens [n, M]; M depends on L alone."""
        return self._retokenizer(ids.shape[1])(ids)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Ids [n, L] -> embeddings [n, E] as the training step computes them."""
        embed, frozen = jax.jit(self.task("inverter").embed), self.frozen()
        parts = np.split(ids, range(256, len(ids), 256))
        return np.concatenate([embed(frozen, x, self.retokenize(x) if self.retokenizes else None) for x in parts])

    def hashes(self) -> dict[str, Any]:
        """Identifies everything that the config names but doesn't contain."""
        config = self.config
        found = {
            "identity": self.embedder.identity.to_dict(),
            "embedder": self.embedder.weights_sha256 or self.embedder.name,
            "pieces": hashlib.sha256(self.vocabulary.vocab_map.tobytes()).hexdigest(),
            "tokens": texts_sha256(self.datasets),
        }
        for name, column in self.columns.items():
            found[f"column {name}"] = hashlib.sha256(json.dumps(column.made_by).encode()).hexdigest()
        for stage, name in _initial_models(config).items():
            file = locate_model(name) / f"{stage}.safetensors"
            if not file.is_file():
                raise InputError(f"{name} has no {stage}; leave initial_{stage} empty.")
            found[f"initial_{stage}"] = sha256_of([file])
        if config.initial_t5:
            found["initial_t5"] = sha256_of(weight_files(folder_of(config.initial_t5)))
        return found


def check_batches(config: Config, mesh: Mesh) -> None:
    """Checks that micro-batches and devices divide every stage's batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for stage in config.stages:
        size, count = getattr(config, stage).batch_size, getattr(config, stage).optimizer.accumulate_steps
        if size % (parts * count):
            raise InputError(
                f"{stage}.batch_size={size} is not divisible by {count} micro-batches over {parts} devices: make it a "
                "multiple of their product."
            )


def prepare(config: Config) -> TrainContext:
    """Loads embedder and tokenizer, reads and tokenizes the text, opens columns, settles vocabulary and widths."""
    local = None if is_endpoint(config.embedder) else load_embedder(config.embedder, config.embedder_dtype)
    if local is None:  # which a training step can't ask: columns must hold its vectors
        needed = {"embeddings": "texts' vectors with 'v2t data embed' or 'import'"}
        if "corrector" in config.stages:
            needed["hypotheses"] = "corrector's hypotheses and their vectors with 'v2t data hypotheses'"
        for column, what in needed.items():
            if not getattr(config.data, column):
                raise InputError(
                    f"{config.embedder} isn't asked while training: make the {what}, and name that column as "
                    f"data.{column}."
                )
    elif config.api != ApiConfig():
        raise InputError("api is for an embedder behind an endpoint: give its URL as embedder.")
    tokenizer, name = local.tokenizer if local else None, config.data.tokenizer
    if name:
        files = ("*.json", "*.model", "*.txt")
        tokenizer = load_tokenizer(name) if name in KNOWN else folder_tokenizer(folder_of(name, files))
    num_held_out = max(config.evaluation.num_examples, NORM_TEXTS)
    initial = {name: _vocabulary_of(name, local) for name in _initial_models(config).values()}
    for name, theirs in initial.items() if tokenizer else ():  # now, because tokenizing takes a while
        _check_vocabulary(name, theirs, tokenizer, theirs.vocab_map)
    vocab_map = next((theirs.vocab_map for theirs in initial.values()), None)
    vocabulary, datasets, held_out = open_texts(config, tokenizer, num_held_out, vocab_map)
    for name, theirs in initial.items():
        _check_vocabulary(name, theirs, vocabulary.tokenizer, vocabulary.vocab_map)
    columns: dict[str, Column] = {}
    for stage in config.stages:
        columns |= {name: open_column(datasets[0], name) for name in column_names(config, stage).values()}
    embedder: TextEmbedder = local or HttpEmbedder(
        config.embedder, config.api, width=columns[config.data.embeddings].values.shape[1]
    )
    for name, stored in columns.items():
        kind = "embeddings" if name == config.data.embeddings else "hypotheses"
        check_column(stored, kind, embedder, config.model.max_length)
    resized = dataclasses.replace(config.model.t5, vocab_size=vocabulary.size)
    t5 = check_t5(config, vocabulary) if config.initial_t5 else resized
    model = dataclasses.replace(config.model, t5=t5, embedding_width=embedder.width)
    if local is not None and shares_vocabulary(local, vocabulary.tokenizer):
        model = dataclasses.replace(model, state_width=local.config.state_width)
    context = TrainContext(config, model, embedder, vocabulary, datasets, columns, held_out)
    if local is not None and context.shares_vocabulary:
        check_length(model.max_length, local)
    if config.initial_embedding == "embedder" and not context.shares_vocabulary:
        raise InputError(
            f"initial_embedding=embedder needs the tokenizer and the weights of {embedder.name}: set it to random, or "
            "leave data.tokenizer empty."
        )
    if local is None:  # now, so that a wrong key or limit shows before training; the answers are cached
        embed_once(embedder, held_out)
    return context


def _initial_models(config: Config) -> dict[Stage, str]:
    """The models that a recipe names, by the stage that it takes from each."""
    return {stage: name for stage in STAGES if (name := getattr(config, f"initial_{stage}"))}


def _vocabulary_of(name: str, embedder: TextEmbedder | None) -> Vocabulary:
    """A model's vocabulary; if it is its embedder's and that isn't `embedder`, by the name on record."""
    folder = locate_model(name)
    header = read_header(folder)
    if TOKENIZER in header.files:
        tokenizer = read_tokenizer(folder / TOKENIZER)
    elif isinstance(embedder, JaxEmbedder) and embedder.weights_sha256 == header.embedder.weights_sha256:
        tokenizer = embedder.tokenizer
    else:
        try:
            tokenizer = load_tokenizer(header.embedder.name)
        except InputError as error:
            raise InputError(
                f"{name} writes the tokens of its embedder, whose tokenizer isn't here: {error}"
            ) from error
    return Vocabulary(tokenizer, read_pieces(folder))


def _check_vocabulary(name: str, theirs: Vocabulary, tokenizer: Any, vocab_map: np.ndarray) -> None:
    same = tokenizer_sha256(theirs.tokenizer) == tokenizer_sha256(tokenizer)
    if not same or not np.array_equal(theirs.vocab_map, vocab_map):
        raise InputError(
            f"{name} writes another vocabulary than this recipe's texts have: give its tokenizer as data.tokenizer, "
            "and data.sources that are text files or were built with its vocabulary, or train a new model."
        )


def column_names(config: Config, stage: Stage) -> dict[str, str]:
    """The data set's columns that a stage reads, by the batch's field that each fills."""
    found = {"embedding": config.data.embeddings}
    if stage != "inverter" and config.data.hypotheses:
        found |= {"hypothesis": config.data.hypotheses, "hypothesis_embedding": config.data.hypotheses + EMBEDDING}
    return {field: name for field, name in found.items() if name}


def check_t5(config: Config, vocabulary: Vocabulary) -> T5Config:
    """Sizes of the recipe's initial T5, with the recipe's own dtype, dropout, remat and unrolling."""
    loaded, _ = load_t5(config.initial_t5, put=lambda _: None)  # read once to find damage early
    tokenizer = folder_tokenizer(folder_of(config.initial_t5))
    in_order = np.array_equal(vocabulary.vocab_map, np.arange(vocabulary.size)) and vocabulary.size <= loaded.vocab_size
    if not in_order or tokenizer.get_vocab() != vocabulary.tokenizer.get_vocab():
        raise InputError(
            f"{config.initial_t5} has another tokenizer than the texts, which have that of "
            f"{config.data.tokenizer or config.embedder}: set data.tokenizer={config.initial_t5} (and build data sets "
            "with it), or leave initial_t5 empty."
        )
    kept = {name: getattr(config.model.t5, name) for name in ("dropout_rate", "dtype", "remat", "scan_unroll")}
    return dataclasses.replace(loaded, **kept)


def trained_network(context: TrainContext, stage: Stage, mesh: Mesh) -> Params:
    """The parameters, sharded over the mesh, of a network that isn't trained: that of a model for the same embedder."""
    name, network = getattr(context.config, f"initial_{stage}"), NETWORKS[stage]
    params = load(name, context.embedder, put=lambda array: array).params[stage]
    _check_sizes(name, stage, params, context.model)
    return processes.put(params, state_shardings(mesh, params, param_specs(params, network.PARAM_AXES)))


def _check_sizes(name: str, stage: Stage, params: Params, model: ModelConfig) -> None:
    shapes = [jax.tree.map(lambda p: p.shape, tree) for tree in (params, NETWORKS[stage](model).abstract_params())]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"The {stage} of {name} has other sizes than this recipe: give the recipe the model's (its config.json has "
            "them as model), or train a new one."
        )


def adapted_network(context: TrainContext, stage: Stage, batches: Batches, random: Callable[[], Params]) -> Params:
    """The parameters that training goes on with, of a model whose embedder may be another one.

    Then the statistics are those of the new embedder's vectors; and if these have another width, what depends on it is
    taken from `random()`.
    """
    name, model, new = getattr(context.config, f"initial_{stage}"), context.model, context.embedder
    stored = read_model(name, put=lambda array: array)
    widths = {field: getattr(stored.config, field) for field in ("embedding_width", "state_width")}
    _check_sizes(name, stage, stored.params[stage], dataclasses.replace(model, **widths))
    kept: dict[str, Any] = flatten_dict(stored.params[stage], sep="/")
    shapes: dict[str, Any] = flatten_dict(NETWORKS[stage](model).abstract_params(), sep="/")
    fresh = {path for path, leaf in shapes.items() if path not in kept or kept[path].shape != leaf.shape}
    drawn = flatten_dict(random(), sep="/") if fresh else {}
    params = unflatten_dict({path: (drawn if path in fresh else kept)[path] for path in shapes}, sep="/")
    old = stored.header.embedder
    differs = differing_field(old.to_dict(), new.identity, ignored=("dtype", "max_length"))
    if differs or fresh:
        what = "all but what depends on the width of its vectors" if fresh else "all of its weights"
        progress.note(f"the {stage} keeps {what} of {name}, which was trained for {old.name}, and learns {new.name}")
    if differs and "statistics" in params:
        params["statistics"] = input_statistics(context, batches)
    return params


def random_params(stage: Stage, model: ModelConfig, mesh: Mesh) -> tuple[Any, Any]:
    """`program(key data) -> parameters`, sharded over a mesh, and their shardings; each device computes its own shards.

    Up to rounding they are the same numbers on any mesh (jax_threefry_partitionable).
    """
    network = NETWORKS[stage](model)
    abstract = network.abstract_params()
    shardings = state_shardings(mesh, abstract, param_specs(abstract, network.PARAM_AXES))
    program = jax.jit(lambda data: network.init_params(jax.random.wrap_key_data(data)), out_shardings=shardings)
    return program, shardings


def input_statistics(context: TrainContext, batches: Batches) -> Params:
    """Mean and standard deviation [E] of the first training texts' embeddings; all processes get process 0's bits."""
    mean, std = np.zeros((2, context.embedder.width), np.float32)
    if processes.is_main():
        name, longest = context.config.data.embeddings, context.model.max_length
        steps = range(-(-STATISTICS_TEXTS // batches.batching.batch_size))
        if name:
            e = np.concatenate([batches.columns(step)[name].astype(np.float32) for step in steps])[:STATISTICS_TEXTS]
        else:
            ids = [np.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in map(batches, steps)]
            e = context.embed(np.concatenate(ids)[:STATISTICS_TEXTS])
        mean, std = e.mean(axis=0), e.std(axis=0)
    mean, std = processes.broadcast((mean, std))
    # Some embedders have constant dimensions, whose deviation is only rounding.
    return {"mean": mean, "std": np.maximum(std, 0.1 * std.mean())}


def initial_params(
    context: TrainContext, stage: Stage, trained: dict[Stage, Params], batches: Batches, mesh: Mesh
) -> Params:
    """A stage's parameters before the first step, sharded over the mesh: random where the recipe names no source."""
    config, model = context.config, context.model
    key = jax.random.fold_in(jax.random.key(config.seed), 1 + config.stages.index(stage))
    program, shardings = random_params(stage, model, mesh)
    random = functools.partial(program, np.asarray(jax.random.key_data(key)))
    if getattr(config, f"initial_{stage}"):
        params = adapted_network(context, stage, batches, random)
        return processes.put(_with_table(config, stage, params, trained), shardings)
    params = random()
    if stage == "ranker":
        return params
    if config.initial_t5:
        places = iter(jax.tree.leaves(shardings["t5"]))  # arrays are read one at a time, in this order
        _, params["t5"] = load_t5(config.initial_t5, put=lambda array: processes.put(array, next(places)))
    if config.initial_embedding == "embedder" and context.in_step is not None:  # `prepare` has checked the vocabulary
        words = context.in_step.params["encoder"]["word_embedding"][context.vocabulary.vocab_map]
        if words.shape[1] != model.t5.d_model:
            raise InputError(
                f"initial_embedding=embedder needs model.t5.d_model={words.shape[1]}, the embedder's width; "
                f"it is {model.t5.d_model}."
            )
        words = words - words.mean(axis=0, keepdims=True)
        params["t5"]["token_embedding"] = words * (config.initial_embedding_std / words.std())
        # Small embeddings under a tied head scaled by 1/sqrt(D) would start with logits near zero.
        params["t5"]["decoder"]["final_norm"]["scale"] *= model.t5.d_model**0.5
    if model.standardize:
        params["statistics"] = input_statistics(context, batches)
    if stage == "corrector" and config.corrector_from_inverter:
        source = trained["inverter"]
        params |= {"t5": source["t5"], "projection_target": source["projection"]}
        params |= {name: source[name] for name in ("statistics", "bag_of_words") if name in source}
    return processes.put(_with_table(config, stage, params, trained), shardings)


def _with_table(config: Config, stage: Stage, params: Params, trained: dict[Stage, Params]) -> Params:
    """A stage's parameters, with the inverter's token embeddings where the recipe says that they are shared."""
    if stage != "corrector" or not config.shared_table:
        return params
    return {**params, "t5": {**params["t5"], TABLE: trained["inverter"]["t5"][TABLE]}}
