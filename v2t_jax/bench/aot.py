"""Compiles a recipe for TPUs that aren't here: does it fit, what does it send, how fast could it be.

The compiler in `libtpu` needs a topology's name and no TPU. Nothing is run: this proves compilation, memory and
collectives, not speed and not results. The least time that a step can take comes from our count of its matrix products
and from the chip's published peaks; real programs take two to three times as long.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from v2t_jax import progress
from v2t_jax.bench.roofline import Report, Topology, memory_of, nbytes, totals, work
from v2t_jax.config import T5_SIZES, Config, ModelConfig, Stage, StageConfig, T5Config, is_endpoint
from v2t_jax.embedders.known import KNOWN
from v2t_jax.embedders.load import locate
from v2t_jax.errors import InputError
from v2t_jax.interop.files import complete_config, read_json
from v2t_jax.interop.hf_encoders import encoder_config
from v2t_jax.inversion.correction import CorrectionLoop, CorrectionSettings
from v2t_jax.inversion.embed_hypotheses import shared_embedder
from v2t_jax.inversion.proposals import initial_hypotheses, propose_corrections
from v2t_jax.models.embedder import Activation, EmbedderConfig, TokenMap
from v2t_jax.models.encoders import BertConfig, EncoderConfig, encoder_network
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.models.t5 import round_weights
from v2t_jax.parallel import mesh as layouts
from v2t_jax.parallel.mesh import DECODING_RULES, RULES, OnMesh
from v2t_jax.train import step as training
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.setup import check_batches, column_names

Program = Literal["train", "hypotheses", "correct"]
# Sizes of embedders whose weights needn't be here; of others the config.json must be.
ENCODERS: dict[str, EncoderConfig] = {
    **dict.fromkeys(("gtr-base", "gtr-base-st", "sentence-t5-base"), T5_SIZES["t5-base"]),
    **{f"all-MiniLM-L{n}-v2": BertConfig(30522, 384, n, 12, 1536, 512) for n in (6, 12)},
    **dict.fromkeys(
        ("bge-base-en-v1.5", "e5-base-v2", "gte-base", "contriever"), BertConfig(30522, 768, 12, 12, 3072, 512)
    ),
}
ROWS_A_CHIP = 32  # texts that a chip, or those that share a network, correct at a time
_array: Any = jax.ShapeDtypeStruct


def compile_recipe(config: Config, topology: Topology, programs: Sequence[Program], beam: int = 4) -> Iterator[Report]:
    """Compiles what the recipe runs, one program after the other."""
    recipe = _Recipe(config, topology)
    if "train" in programs:
        check_batches(config, recipe.mesh)
        yield from map(recipe.train, config.stages)
    if "hypotheses" in programs:
        yield recipe.hypotheses()
    if "correct" in programs and recipe.embedder is None:
        progress.note("The correction loop asks the endpoint over the host at every step, so it isn't compiled.")
    elif "correct" in programs:
        yield recipe.correct(beam)


def embedder_sizes(config: Config) -> tuple[EmbedderConfig, TokenMap]:
    """The embedder without its weights: by name, or by the config.json in its folder."""
    name, _, dimensions = config.embedder.partition(":")
    if name in ENCODERS:
        encoder, dense, normalize = ENCODERS[name], KNOWN[name].dense, KNOWN[name].normalize
    else:
        try:
            folder = locate(config.embedder)
        except InputError as error:
            raise InputError(
                f"The sizes of the embedder {config.embedder} aren't known here: give one of {', '.join(ENCODERS)}, or "
                "a folder with its config.json."
            ) from error
        encoder = encoder_config(complete_config(read_json(folder / "config.json", "an embedder's folder")))
        dense, normalize = 0, True
    width = encoder.d_model if isinstance(encoder, T5Config) else encoder.hidden_size
    encoder = dataclasses.replace(encoder, dtype=config.embedder_dtype)
    layers: tuple[Activation, ...] = tuple("identity" for _ in range(dense))
    sizes = EmbedderConfig(encoder, dense=layers, normalize=normalize, width=int(dimensions or width))
    return sizes, TokenMap(() if isinstance(encoder, T5Config) else (0,), 1)


def recipe_sizes(config: Config) -> tuple[ModelConfig, EmbedderConfig | None, TokenMap | None]:
    """The sizes of a recipe's networks, and of its embedder unless that is behind an endpoint."""
    if config.data.tokenizer:
        raise InputError(
            "A recipe with data.tokenizer retokenizes on the host, which can't be compiled here: leave "
            "data.tokenizer empty to see what the networks need."
        )
    if is_endpoint(config.embedder):  # of whose vectors the recipe must say the width
        return config.model, None, None
    embedder, token_map = embedder_sizes(config)
    t5 = config.model.t5
    if not config.initial_t5:
        t5 = dataclasses.replace(t5, vocab_size=config.data.vocabulary_size or embedder.encoder.vocab_size)
    width, states = embedder.width, embedder.state_width
    return dataclasses.replace(config.model, t5=t5, embedding_width=width, state_width=states), embedder, token_map


def recipe_loop(
    model: ModelConfig, embedder: EmbedderConfig, token_map: TokenMap, beam: int, step_rows: int | None = None
) -> CorrectionLoop:
    """The correction loop of a model that shares its embedder's vocabulary."""
    functions = initial_hypotheses(model), (propose_corrections(model, "best"),), shared_embedder(embedder, token_map)
    return CorrectionLoop(*functions, CorrectionSettings(sequence_beam_width=beam), step_rows=step_rows)


def loop_work(loop: CorrectionLoop, params: Any, e: Any, num_steps: int, length: int) -> np.ndarray:
    """[FLOPs, bytes] of first guesses and steps for targets e [B, E], if each of them decodes all `length` tokens."""
    one = _array((), jnp.int32)
    beam = jax.eval_shape(loop.first_beam, params, e, one, one)
    first = work(jax.make_jaxpr(loop.first_beam)(params, e, one, one).jaxpr, length)
    return first + num_steps * work(jax.make_jaxpr(loop.step)(params, e, beam, one, one).jaxpr, length)


def _placed(tree: Any, shardings: Any) -> Any:
    """Shapes of arrays that lie as `shardings` say: a tree like them, or one for all."""
    return jax.tree.map(lambda x, s: _array(x.shape, x.dtype, sharding=s), tree, jax.tree.broadcast(shardings, tree))


def _bytes_a_chip(tree: Any) -> int:
    return sum(nbytes(x, x.sharding and x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


class RecipeShapes:
    """The shapes of what a recipe's programs are given on these devices."""

    def __init__(self, config: Config, devices: Sequence[jax.Device]) -> None:
        self.config = config
        self.mesh = layouts.make_mesh(dataclasses.replace(config.mesh, slices=0), devices)
        self.model, self.embedder, self.token_map = recipe_sizes(config)
        # Chips that share a network's weights while decoding do the same on the same rows.
        self.sharing = self.mesh.shape["model"] if config.mesh.decode == "model" else 1

    def _network(self, stage: Stage, decoding: bool = False) -> Any:
        """A network's parameters; `decoding`, as a correction loop takes them: see `InversionPipeline.loop_params`."""
        network, t5, rules = NETWORKS[stage], self.model.t5, RULES
        params: Any = network(self.model).abstract_params()
        if decoding:
            rules = DECODING_RULES[self.config.mesh.decode]
            params |= {"t5": jax.eval_shape(lambda params: round_weights(t5, params), params["t5"])}
        specs = layouts.param_specs(params, network.PARAM_AXES, rules)
        params = _placed(params, layouts.state_shardings(self.mesh, params, specs))
        if not decoding:
            return params
        decoder = params["t5"]["decoder"]
        layer = jax.tree.map(lambda x: _array(x.shape[1:], x.dtype), decoder["layers"])
        cut = jax.tree.map(lambda x: NamedSharding(self.mesh, PartitionSpec(*x.sharding.spec[1:])), decoder["layers"])
        decoder["layers"] = [_placed(layer, cut)] * t5.num_decoder_layers
        return params

    def _frozen(self, with_inverter: bool) -> training.FrozenParams:
        params: Any = None
        if self.embedder is not None:
            width = self.embedder.width
            params = {"encoder": encoder_network(self.embedder.encoder).abstract_params()}
            if self.embedder.dense:
                params["dense"] = [{"kernel": _array((width, width), jnp.float32)} for _ in self.embedder.dense]
            # Matrices are kept in the arithmetic's dtype, as where an embedder is loaded.
            dtype = jnp.dtype(self.config.embedder_dtype)
            params = jax.tree.map(lambda x: _array(x.shape, dtype if x.ndim > 1 else x.dtype), params)
        vocab_map = _array((self.model.t5.vocab_size,), jnp.int32)
        frozen = training.FrozenParams(params, vocab_map, self._network("inverter") if with_inverter else None)
        return _placed(frozen, training.frozen_shardings(self.mesh, frozen))

    def _batch(self, stage: Stage, rows: int) -> training.Batch:
        """What a step is given: the texts, with what the recipe has in columns."""
        ids = _array((rows, self.model.max_length), jnp.int32)
        vector = _array((rows, self.model.embedding_width), jnp.float16)
        stored = {"embedding": vector, "hypothesis": ids, "hypothesis_embedding": vector}
        return training.Batch(ids, **{name: stored[name] for name in column_names(self.config, stage)})

    def _work(self, run: Callable, *arguments: Any) -> np.ndarray:
        return work(jax.make_jaxpr(run)(*arguments).jaxpr, self.model.max_length)

    def _stage(self, stage: Stage) -> tuple[Callable[[ModelConfig], Callable], training.TrainState, Any]:
        """A stage's step for a model's config, its state (not yet laid out) and what it reads beside."""
        settings: StageConfig = getattr(self.config, stage)
        shared = self.config.shared_table and stage == "corrector"
        optimizer, params = make_optimizer(settings.optimizer, settings.num_steps, shared), self._network(stage)

        def step_of(model: ModelConfig) -> Callable:
            options = self.config.partial_hypotheses, self.config.edited_hypotheses, self.config.mesh.decode
            task = training.Task(stage, model, self.embedder, self.token_map, *options, shared)
            return training.make_step(task.loss, optimizer, settings.optimizer.accumulate_steps, self.config.seed)

        zero = _array((), jnp.int32)
        state = training.TrainState(zero, params, jax.eval_shape(optimizer.init, params), zero)
        return step_of, state, self._frozen(stage != "inverter" and not self.config.data.hypotheses)

    def train_work(self, stage: Stage, rows: int, state: Any = None) -> tuple[np.ndarray, float]:
        """[FLOPs, bytes] of a device's step on `rows` texts, and its FLOPs without recomputation.

        Everything of the state, laid out if it is given, is read and written, once, beside what the products read.
        """
        step_of, new, frozen = self._stage(stage)
        local = state or new, frozen, self._batch(stage, rows)
        once = dataclasses.replace(self.model, t5=dataclasses.replace(self.model.t5, remat="none"))
        run = self._work(step_of(self.model), *local) / self.mesh.shape["model"]
        flops = float(self._work(step_of(once), *local)[0]) / self.mesh.shape["model"]
        return run + (0, _bytes_a_chip((local[0], local[0], frozen))), flops

    def loop_work(self, beam: int, num_steps: int, rows: int) -> np.ndarray:
        """[FLOPs, bytes] of a device's correction loop for `rows` embeddings."""
        e = _array((rows, self.model.embedding_width), jnp.float32)
        return loop_work(*self._loop(beam), e, num_steps, self.model.max_length)

    def _loop(self, beam: int) -> tuple[CorrectionLoop, dict[str, Any]]:
        assert self.embedder is not None and self.token_map is not None
        frozen = self._frozen(False)
        params = {"embedder": frozen.embedder, "pieces": frozen.vocab_map}
        params |= {stage: self._network(stage, decoding=True) for stage in ("inverter", "corrector")}
        return recipe_loop(self.model, self.embedder, self.token_map, beam), params


class _Recipe(RecipeShapes):
    """The programs of a recipe, compiled for a topology."""

    def __init__(self, config: Config, topology: Topology) -> None:
        super().__init__(config, topology.devices)
        self.topology = topology

    def train(self, stage: Stage) -> Report:
        """The training step of a stage, at the recipe's batch size and the longest texts."""
        rows, n = getattr(self.config, stage).batch_size, self.topology.num_slices
        step_of, state, frozen = self._stage(stage)
        program, shardings = training.shard_step(step_of(self.model), self.mesh, state, stage)
        state = _placed(state, shardings)
        run, flops = self.train_work(stage, rows * self.mesh.shape["model"] // self.mesh.size, state)
        # Between n slices, a ring over each chip's share of the gradients; the chips that hold the same share split it.
        between = 2 * (n - 1) / n * _bytes_a_chip(state.params) / (self.mesh.shape["data"] // n)
        arguments = state, frozen, _placed(self._batch(stage, rows), layouts.batch_sharding(self.mesh))
        parts = {"params": state.params, "optimizer": state.optimizer, "frozen": frozen}
        return self._report(f"train {stage}", program, arguments, rows, parts, run, flops, between)

    def hypotheses(self) -> Report:
        """The inverter's greedy guesses for a batch of the corrector's, as training makes them."""
        layout, rows, width = self.config.mesh.decode, self.config.corrector.batch_size, self.model.embedding_width
        local = _array((-(-rows * self.sharing // self.mesh.size), width), jnp.float32)

        def run(params: Any, e: Any) -> jax.Array:
            return training.greedy_hypotheses(self.model, params, e, layout)

        params = self._network("inverter")
        e = _array((rows, width), jnp.float32, sharding=layouts.batch_sharding(self.mesh))
        counted, program = self._work(run, params, local) / self.sharing, OnMesh(jax.jit(run), self.mesh)
        return self._report("hypotheses", program, (params, e), rows, {"params": params}, counted)

    def correct(self, beam: int) -> Report:
        """One step of the correction loop, laid out as a training run's evaluation has it."""
        layout, one = self.config.mesh.decode, _array((), jnp.int32)
        loop, params = self._loop(beam)

        def rows_of(count: int) -> Any:
            e = _array((count, self.model.embedding_width), jnp.float32)
            return e, jax.eval_shape(loop.first_beam, params, e, one, one)

        counted = self._work(loop.step, params, *rows_of(ROWS_A_CHIP), one, one) / self.sharing
        rows = ROWS_A_CHIP * self.mesh.size // self.sharing
        e, hypotheses = _placed(rows_of(rows), layouts.decoding_rows(self.mesh, layout))
        program = OnMesh(jax.jit(loop.step, donate_argnames="beam"), self.mesh, DECODING_RULES[layout])
        arguments, parts = (params, e, hypotheses, one, one), {"params": params, "beam": hypotheses}
        return self._report(f"correct, beam {beam}", program, arguments, rows, parts, counted)

    def _report(
        self,
        name: str,
        program: OnMesh,
        arguments: tuple[Any, ...],
        rows: int,
        parts: dict[str, Any],
        run: np.ndarray,
        flops: float | None = None,
        between: float = 0.0,
    ) -> Report:
        """Compiles; `parts` are shown by their bytes, `run` is a chip's work, `flops` what of it isn't recomputed, and
        `between` the bytes to other slices."""
        chip, memory = self.topology.chip, {part: _bytes_a_chip(tree) for part, tree in parts.items()}
        sent: dict[str, dict[str, int]] = {}
        seconds = {"compute": run[0] / chip.flops, "memory": run[1] / chip.bandwidth}
        with progress.stage(f"compiling {name} for {self.topology.name}"):
            lowered = program.lower(*arguments)
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                needed = _needed(error, _bytes_a_chip(arguments))
            else:
                found = memory_of(compiled) or {}
                needed = sum(found.values())
                memory |= {part: found[part] for part in ("temporaries", "program")}
                try:
                    sent = totals(compiled.as_text())
                except jax.errors.JaxRuntimeError:
                    progress.note(
                        f"{name}: this jaxlib can't read the program of another version's libtpu, so what is sent and "
                        "its time are left out: pip install 'jax[tpu]' brings the libtpu that fits."
                    )
                # At most: in rings, around which an all-reduce goes twice.
                ring = sum(entry["bytes"] * (2 if kind == "all-reduce" else 1) for kind, entry in sent.items())
                seconds |= {"ici": ring / chip.ici, "dcn": between / chip.dcn}
        flops = float(run[0]) if flops is None else flops
        return Report(name, self.mesh.size, rows, memory, needed, chip.memory, sent, flops, run[0], seconds)


def _needed(error: Exception, arguments: int) -> int:
    """Bytes that a program wanted of a chip, from the compiler's refusal; another error is raised again.

    `arguments`, the bytes of what the program is given, is left out where the compiler speaks of temporaries.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds", str(error))
    if found is None or "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * 1024 ** " KMGT".index(unit or " ")) + (0 if found[1] else arguments)
