"""The correction loop: `v2t bench correct`, with a trained model, or with random weights of a recipe's sizes."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.bench.aot import loop_work, recipe_loop, recipe_sizes
from v2t_jax.bench.command import Measurement
from v2t_jax.bench.measure import Row, compile_program, measure
from v2t_jax.config import ModelConfig, Stage, load_recipe
from v2t_jax.errors import InputError, check_whole
from v2t_jax.eval.evaluate import evaluation_texts
from v2t_jax.inversion.correction import TRACE_STEPS, CorrectionLoop
from v2t_jax.inversion.parts import CORRECTED
from v2t_jax.inversion.pipeline import load
from v2t_jax.models.embedder import EmbedderConfig, unstacked_on_cpu
from v2t_jax.models.encoders import encoder_network
from v2t_jax.models.layers import Params
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.models.t5 import round_weights, unstack_decoder

STAGES: tuple[Stage, ...] = ("inverter", "corrector")


class Problem(NamedTuple):
    """A loop and what it is given."""

    name: str
    model: ModelConfig
    loop: CorrectionLoop
    params: Any
    e: np.ndarray  # [B, E] float32


@dataclass(frozen=True, kw_only=True)
class Correct(Measurement):
    """Time the correction loop, from embeddings to texts, without edits.

    With a trained model, what is computed depends on the texts: a solved one is left alone, and decoding stops where
    all have ended. With random weights that hardly happens, so there the arithmetic is counted.
    """

    model: str = "minilm-wordnet"  # name of a packaged model, or a model folder, whose held-out texts are recovered
    recipe: str = ""  # file of a recipe, whose sizes with random weights are timed instead
    batch_size: int = 16  # embeddings that are inverted at a time
    num_steps: int = 2  # correction steps
    sequence_beam_width: int = 4

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        check_whole("num_steps", self.num_steps, 1, TRACE_STEPS)

    def rows(self) -> Iterator[Row]:
        name, model, loop, params, e = self.recipe_problem() if self.recipe else self.model_problem()
        given = params, e, np.int32(len(e)), np.int32(self.num_steps), np.int32(self.num_steps)
        program = compile_program(loop.run, *given, room=TRACE_STEPS)
        flops, moved = loop_work(loop, params, e, self.num_steps, model.max_length) if self.recipe else (None, None)
        program, dtype = program._replace(flops=flops, moved=moved), model.t5.dtype
        of = f"{self.num_steps} steps, beam {self.sequence_beam_width}, batch {len(e)}"
        call = functools.partial(program.run, *given)
        yield measure(
            f"correction loop, {name}, {dtype}, {of}", call, self.repeats, len(e), program=program, dtype=dtype
        )

    def model_problem(self) -> Problem:
        """A trained model, and its held-out texts' embeddings."""
        pipeline = load(self.model)
        loop = pipeline.correction_loop(self.sequence_beam_width)
        e = pipeline.embedder.embed(evaluation_texts(pipeline, limit=self.batch_size))
        return Problem(pipeline.name, pipeline.config, loop, pipeline.loop_params(), e)

    def recipe_problem(self) -> Problem:
        """A recipe's networks with random weights, and random embeddings of length 1."""
        config = load_recipe(self.recipe)
        model, embedder, token_map = recipe_sizes(config)
        if embedder is None or token_map is None:
            raise InputError("The recipe's embedder is behind an endpoint, which isn't measured here; give another.")
        params: dict[str, Any] = {stage: decoding_params(stage, model) for stage in STAGES}
        pieces = jnp.arange(model.t5.vocab_size, dtype=jnp.int32) % embedder.encoder.vocab_size
        params |= {"embedder": embedder_params(embedder), "pieces": pieces}
        e = np.random.default_rng(0).standard_normal((self.batch_size, embedder.width), np.float32)
        e /= np.linalg.norm(e, axis=1, keepdims=True)
        beam = self.sequence_beam_width
        loop = recipe_loop(model, embedder, token_map, beam, CORRECTED.rows(beam**2))
        return Problem(f"{config.name} with random weights", model, loop, params, e)


def decoding_params(stage: Stage, model: ModelConfig) -> Params:
    """Random weights of a network as a correction loop takes them."""
    params = NETWORKS[stage](model).init_params(jax.random.key(STAGES.index(stage)))
    return {**params, "t5": unstack_decoder(round_weights(model.t5, params["t5"]))}


def embedder_params(config: EmbedderConfig) -> Params:
    """Random weights of an embedder, matrices in the arithmetic's dtype, as where one is loaded."""
    dense = [{"kernel": jnp.eye(config.width)} for _ in config.dense]
    params: Params = {"encoder": encoder_network(config.encoder).init_params(jax.random.key(2)), "dense": dense}
    return unstacked_on_cpu(jax.tree.map(lambda x: x.astype(config.encoder.dtype) if x.ndim > 1 else x, params))
