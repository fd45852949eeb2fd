"""Compiles a recipe for TPUs that aren't here: does it fit, what does it send, how fast could it be.

The compiler in `libtpu` needs a topology's name and no TPU. Nothing is run: this proves compilation, memory and
collectives, not speed and not results. The least time that a step can take comes from our count of its matrix products
and from the chip's published peaks; real programs take two to three times as long.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v2t_jax import progress
from v2t_jax.bench.roofline import Report, Topology, nbytes, totals, work
from v2t_jax.config import T5_SIZES, Config, ModelConfig, Stage, StageConfig, T5Config, is_endpoint
from v2t_jax.embedders.known import KNOWN
from v2t_jax.embedders.load import locate
from v2t_jax.errors import InputError
from v2t_jax.interop.files import complete_config, read_json
from v2t_jax.interop.hf_encoders import encoder_config
from v2t_jax.inversion.correction import CorrectionLoop, CorrectionSettings
from v2t_jax.inversion.proposals import initial_hypotheses, propose_corrections, shared_embedder
from v2t_jax.models.corrector import NETWORKS
from v2t_jax.models.embedder import Activation, EmbedderConfig, TokenMap
from v2t_jax.models.encoders import BertConfig, EncoderConfig, encoder_network
from v2t_jax.models.t5 import round_weights
from v2t_jax.parallel.mesh import (
    AXES,
    DECODING_RULES,
    RULES,
    OnMesh,
    Rules,
    batch_sharding,
    decoding_rows,
    make_mesh,
    param_specs,
    state_shardings,
)
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.setup import check_batches, column_names
from v2t_jax.train.step import (
    Batch,
    FrozenParams,
    Task,
    TrainState,
    frozen_shardings,
    greedy_hypotheses,
    make_step,
    shard_step,
)

Program = Literal["train", "hypotheses", "correct"]
# Sizes of embedders whose weights needn't be here; of others the config.json must be.
_BERT_BASE = BertConfig(30522, 768, 12, 12, 3072, 512)
ENCODERS: dict[str, EncoderConfig] = {
    **dict.fromkeys(("gtr-base", "gtr-base-st", "sentence-t5-base"), T5_SIZES["t5-base"]),
    "all-MiniLM-L6-v2": BertConfig(30522, 384, 6, 12, 1536, 512),
    "all-MiniLM-L12-v2": BertConfig(30522, 384, 12, 12, 1536, 512),
    **dict.fromkeys(("bge-base-en-v1.5", "e5-base-v2", "gte-base", "contriever"), _BERT_BASE),
}
TRAINING = ("data", "fsdp")  # what rows are cut over while training
ROWS_A_CHIP = 32  # texts that a chip, or those that share a network, correct at a time


def compile_recipe(
    config: Config, topology: Topology, programs: tuple[Program, ...], beam: int = 4
) -> Iterator[Report]:
    """Compiles what the recipe runs, one program after the other."""
    mesh = make_mesh(dataclasses.replace(config.mesh, slices=0), topology.devices)
    if config.data.tokenizer:
        raise InputError(
            "A recipe with data.tokenizer retokenizes on the host, which can't be compiled here: leave data.tokenizer "
            "empty to see what the networks need."
        )
    embedder, token_map, model = None, None, config.model
    if not is_endpoint(config.embedder):  # of which the recipe must say the width
        embedder, token_map = embedder_sizes(config)
        vocab_size = model.t5.vocab_size
        if not config.initial_t5:
            vocab_size = config.data.vocabulary_size or embedder.encoder.vocab_size
        t5_config = dataclasses.replace(model.t5, vocab_size=vocab_size)
        model = dataclasses.replace(model, t5=t5_config, embedding_width=embedder.width)
    recipe = _Recipe(config, model, embedder, token_map, mesh, topology)
    if "train" in programs:
        check_batches(config, mesh)
        for stage in config.stages:
            yield recipe.train(stage)
    if "hypotheses" in programs:
        yield recipe.hypotheses()
    if "correct" in programs and embedder is None:
        progress.note("The correction loop asks the endpoint over the host at every step, so it isn't compiled.")
    elif "correct" in programs:
        yield recipe.correct(beam)


def embedder_sizes(config: Config) -> tuple[EmbedderConfig, TokenMap]:
    """The embedder without its weights: by name, or by the config.json in its folder."""
    name, _, dimensions = config.embedder.partition(":")
    if name in ENCODERS:
        encoder, known = ENCODERS[name], KNOWN[name]
        width, dense, normalize = known.width, known.dense, known.normalize
    else:
        try:
            folder = locate(config.embedder)
        except InputError as error:
            raise InputError(
                f"The sizes of the embedder {config.embedder} aren't known here: give one of {', '.join(ENCODERS)}, or "
                "a folder with its config.json."
            ) from error
        encoder = encoder_config(complete_config(read_json(folder / "config.json", "an embedder's folder")))
        width = encoder.d_model if isinstance(encoder, T5Config) else encoder.hidden_size
        dense, normalize = 0, True
    encoder = dataclasses.replace(encoder, dtype=config.embedder_dtype)
    if isinstance(encoder, T5Config):
        encoder = dataclasses.replace(encoder, dropout_rate=0.0)
    layers: tuple[Activation, ...] = tuple("identity" for _ in range(dense))
    sizes = EmbedderConfig(encoder, dense=layers, normalize=normalize, width=int(dimensions or width))
    return sizes, TokenMap(() if isinstance(encoder, T5Config) else (0,), 1)


def _array(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(tree: Any, shardings: Any) -> Any:
    """Shapes of arrays that lie as `shardings` say: a tree like them, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: _array(x.shape, x.dtype, s), tree, shardings)


def _bytes_a_chip(tree: Any) -> int:
    return sum(nbytes(x, x.sharding and x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


@dataclass(frozen=True)
class _Recipe:
    config: Config
    model: ModelConfig
    embedder: EmbedderConfig | None  # None: behind an endpoint
    token_map: TokenMap | None
    mesh: Mesh
    topology: Topology

    def _network(self, stage: Stage, rules: Rules = RULES) -> Any:
        params = NETWORKS[stage](self.model).abstract_params()
        if rules is not RULES:  # for decoding, in the arithmetic's dtype
            params |= {"t5": jax.eval_shape(functools.partial(round_weights, self.model.t5), params["t5"])}
        specs = param_specs(params, NETWORKS[stage].PARAM_AXES, rules)
        return _placed(params, state_shardings(self.mesh, params, specs))

    def _frozen(self, with_inverter: bool) -> FrozenParams:
        params: Any = None
        if self.embedder is not None:
            encoder, width = self.embedder.encoder, self.embedder.width
            params = {"encoder": encoder_network(encoder).abstract_params()}
            if self.embedder.dense:
                params["dense"] = [{"kernel": _array((width, width), jnp.float32)} for _ in self.embedder.dense]
            # Matrices are kept in the arithmetic's dtype, as where an embedder is loaded.
            dtype = jnp.dtype(self.config.embedder_dtype)
            params = jax.tree.map(lambda x: _array(x.shape, dtype if x.ndim > 1 else x.dtype), params)
        vocab_map = _array((self.model.t5.vocab_size,), jnp.int32)
        frozen = FrozenParams(params, vocab_map, self._network("inverter") if with_inverter else None)
        return _placed(frozen, frozen_shardings(self.mesh, frozen))

    def _batch(self, stage: Stage, rows: int) -> Batch:
        """What a step is given: the texts, with what the recipe has in columns."""
        ids = _array((rows, self.model.max_length), jnp.int32)
        vector = _array((rows, self.model.embedding_width), jnp.float16)
        stored = {"embedding": vector, "hypothesis": ids, "hypothesis_embedding": vector}
        return Batch(ids, **{name: stored[name] for name in column_names(self.config, stage)})

    def _shards(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _everywhere(self, local: Any, axes: tuple[str, ...]) -> Any:
        """Arrays whose rows are cut over `axes`, by what one chip has of them."""
        whole = jax.tree.map(lambda x: _array((self._shards(axes) * x.shape[0], *x.shape[1:]), x.dtype), local)
        return _placed(whole, NamedSharding(self.mesh, PartitionSpec(axes)))

    def _decoding_work(self, run: Callable, *arguments: Any) -> np.ndarray:
        """A chip's `work`, of which the chips that share weights do the same on the same rows."""
        cut = self.mesh.shape["model"] if self.config.mesh.decode == "model" else 1
        return work(jax.make_jaxpr(run)(*arguments).jaxpr, self.model.max_length) / cut

    def train(self, stage: Stage) -> Report:
        """The training step of a stage, at the recipe's batch size and the longest texts."""
        settings: StageConfig = getattr(self.config, stage)
        accumulate, rows = settings.optimizer.accumulate_steps, settings.batch_size
        shards, cut = self._shards(TRAINING), self.mesh.shape["model"]
        optimizer, params = make_optimizer(settings.optimizer, settings.num_steps), self._network(stage)
        state = TrainState(_array((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
        task = Task(
            *(stage, self.model, self.embedder, self.token_map),
            *(self.config.partial_hypotheses, self.config.mesh.decode),
        )
        frozen = self._frozen(stage == "corrector" and not self.config.data.hypotheses)
        local = self._batch(stage, rows // shards)

        def step_of(task: Task) -> Callable:
            return make_step(task.loss, optimizer, accumulate, self.config.seed)

        def work_of(task: Task) -> np.ndarray:
            return work(jax.make_jaxpr(step_of(task))(state, frozen, local).jaxpr, self.model.max_length) / cut

        step, shardings = shard_step(step_of(task), self.mesh, state, stage)
        state = _placed(state, shardings)
        once = dataclasses.replace(self.model, t5=dataclasses.replace(self.model.t5, remat="none"))
        # Everything of the state is read and written, once, beside what the matrix products read.
        run = work_of(task) + (0, 2 * _bytes_a_chip(state) + _bytes_a_chip(frozen))
        memory = {
            "params": _bytes_a_chip(state.params),
            "optimizer": _bytes_a_chip(state.optimizer),
            "frozen": _bytes_a_chip(frozen),
            "activations": self._kept(task, params, frozen, rows // shards // accumulate) // cut,
        }
        arguments = (state, frozen, self._everywhere(local, TRAINING))
        # Between n slices, a ring over each chip's share of the gradients; the chips that hold the same share split it.
        n = self.topology.num_slices
        between = 2 * (n - 1) / n * memory["params"] / (self.mesh.shape["data"] // n)
        flops = work_of(dataclasses.replace(task, model=once))[0]
        return self._report(f"train {stage}", step, arguments, rows, memory, run, flops, between)

    def _kept(self, task: Task, params: Any, frozen: FrozenParams, rows: int) -> int:
        """Bytes that the forward pass of `rows` texts leaves for the backward pass: arrays that have those rows."""

        def kept(params: Any, frozen: FrozenParams, batch: Batch, key: jax.Array) -> Any:
            return jax.tree.leaves(jax.vjp(lambda p: task.loss(p, frozen, batch, key)[0], params)[1])

        # Rows that no other axis has, so that they can be told apart; then scaled.
        marked = 997
        task = dataclasses.replace(task, partial_hypotheses=False)
        left = jax.eval_shape(kept, params, frozen, self._batch(task.stage, marked), jax.random.key(0))
        return sum(nbytes(x) for x in left if marked in x.shape) * rows // marked

    def hypotheses(self) -> Report:
        """The inverter's greedy guesses for a batch of the corrector's, as training makes them."""
        layout, rows, width = self.config.mesh.decode, self.config.corrector.batch_size, self.model.embedding_width
        axes = AXES if layout == "batch" and rows % self.mesh.size == 0 else TRAINING
        params, run = self._network("inverter"), functools.partial(greedy_hypotheses, self.model, decode=layout)
        e = _array((rows, width), jnp.float32, batch_sharding(self.mesh))
        counted = self._decoding_work(run, params, _array((rows // self._shards(axes), width), jnp.float32))
        program, memory = OnMesh(jax.jit(run), self.mesh), {"params": _bytes_a_chip(params)}
        return self._report("hypotheses", program, (params, e), rows, memory, counted)

    def correct(self, beam: int) -> Report:
        """One step of the correction loop, laid out as a training run's evaluation has it."""
        settings, layout = CorrectionSettings(sequence_beam_width=beam), self.config.mesh.decode
        assert self.embedder is not None and self.token_map is not None
        embed = shared_embedder(self.embedder, self.token_map)
        proposers = (propose_corrections(self.model, "best"),)
        loop = CorrectionLoop(initial_hypotheses(self.model), proposers, embed, settings)
        frozen = self._frozen(False)
        here = {"embedder": frozen.embedder, "pieces": frozen.vocab_map}
        here |= {stage: self._for_loop(stage) for stage in NETWORKS}
        local, one = _array((ROWS_A_CHIP, self.model.embedding_width), jnp.float32), _array((), jnp.int32)
        beam_local = jax.eval_shape(loop.first_beam, here, local, one)
        e, beam_here = self._everywhere((local, beam_local), decoding_rows(self.mesh, layout).spec[0])
        counted = self._decoding_work(loop.step, here, local, beam_local, one, one)
        memory = {"params": _bytes_a_chip(here), "beam": _bytes_a_chip(beam_here)}
        program = OnMesh(jax.jit(loop.step, donate_argnames="beam"), self.mesh, DECODING_RULES[layout])
        arguments = (here, e, beam_here, one, one)
        return self._report(f"correct, beam {beam}", program, arguments, e.shape[0], memory, counted)

    def _for_loop(self, stage: Stage) -> Any:
        """A network as a correction loop takes it: see `InversionPipeline.loop_params`."""
        params = self._network(stage, DECODING_RULES[self.config.mesh.decode])
        decoder = params["t5"]["decoder"]

        def layer(stack: Any) -> Any:
            place = NamedSharding(self.mesh, PartitionSpec(*stack.sharding.spec[1:]))
            return _array(stack.shape[1:], stack.dtype, place)

        layers = [jax.tree.map(layer, decoder["layers"])] * self.model.t5.num_decoder_layers
        return {**params, "t5": {**params["t5"], "decoder": {**decoder, "layers": layers}}}

    def _report(
        self,
        name: str,
        program: OnMesh,
        arguments: tuple[Any, ...],
        rows: int,
        memory: dict[str, int],
        run: np.ndarray,
        flops: float | None = None,
        between: float = 0.0,
    ) -> Report:
        """Compiles; `run` is a chip's work, `flops` what of it isn't recomputed, `between` bytes to other slices."""
        chip, capacity = self.topology.chip, int(self.topology.chip.memory)
        sent: dict[str, dict[str, int]] = {}
        seconds = {"compute": run[0] / chip.flops, "memory": run[1] / chip.bandwidth}
        with progress.stage(f"compiling {name} for {self.topology.name}"):
            lowered = program.lower(*arguments)
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                needed = _needed(error, _bytes_a_chip(arguments))
            else:
                found = compiled.memory_analysis()
                memory |= {"temporaries": found.temp_size_in_bytes, "program": found.generated_code_size_in_bytes}
                outputs = found.output_size_in_bytes - found.alias_size_in_bytes
                needed = found.argument_size_in_bytes + outputs + memory["temporaries"] + memory["program"]
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
        advice = ""
        if needed > capacity:
            advice = f"It lacks {(needed - capacity) / 1e9:.2f} GB a chip: {self._advice(name)}."
        needed_flops = run[0] if flops is None else flops
        return Report(
            *(name, self.mesh.size, rows, memory, needed, capacity, sent),
            *(float(needed_flops), float(run[0]), {name: float(value) for name, value in seconds.items()}, advice),
        )

    def _advice(self, name: str) -> str:
        stage = name.partition(" ")[2]
        if name.startswith("train"):
            if self.mesh.shape["fsdp"] * self.mesh.shape["model"] == 1:
                return "cut the weights over devices (mesh.fsdp), all of those of a slice if need be"
            if self.model.t5.remat == "none":
                return "recompute in the backward pass (model.t5.remat=full)"
            return f"take smaller micro-batches ({stage}.optimizer.accumulate_steps) or more chips"
        if self.config.mesh.decode == "batch":
            return "keep the weights cut while decoding (mesh.decode=model, with mesh.model above 1)"
        return "take a larger mesh.model, or chips with more memory"


def _needed(error: Exception, arguments: int) -> int:
    """Bytes that a program wanted of a chip, from the compiler's refusal; another error is raised again.

    Args:
        arguments: bytes of what the program is given, which the compiler leaves out where it speaks of temporaries.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|required for [\w ]+ \(([\d.]+)([KMGT]?)\) exceeds", str(error))
    if found is None or "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * 1024 ** " KMGT".index(unit or " ")) + (0 if found[1] else arguments)
