"""A training step: `v2t bench train`. It is forward, backward, clipping of the gradient's norm, AdamW."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.bench.command import Measurement
from v2t_jax.bench.decode import Size, sized
from v2t_jax.bench.measure import Program, Row, compile_program, largest_batch, measure
from v2t_jax.config import Dtype, ModelConfig, OptimizerConfig, T5Config
from v2t_jax.errors import check_whole
from v2t_jax.models.layers import Params
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.step import TrainState, cross_entropy, make_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.01, clip_norm=1.0)
Network = Literal["inverter", "corrector"]


@dataclass(frozen=True, kw_only=True)
class Train(Measurement):
    """Time a training step of an inverter or a corrector with random weights, without dropout.

    The corrector is given its hypotheses, as from a data set's column; making them is `v2t bench decode`.
    """

    size: Size = "t5-small"
    network: Network = "inverter"
    batch_size: int = 16
    fill: bool = False  # double batch_size as long as the step fits the device's memory
    num_tokens: int = 32  # tokens of every text
    num_pseudo_tokens: int = 16  # pseudo-tokens that an embedding becomes
    embedding_width: int = 768
    dtype: Dtype = "float32"  # of the arithmetic

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_tokens", "num_pseudo_tokens", "embedding_width"):
            check_whole(name, getattr(self, name), 1)

    def rows(self) -> Iterator[Row]:
        config, e, ids = self.problem(sized(self.size, self.dtype))
        step = Step(config, NETWORKS[self.network](config).init_params(jax.random.key(0)), e, ids, self.network)

        def compiled(size: int) -> Program:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), step.batch)
            return compile_program(step.step, step.state, *shapes)

        first = self.batch_size
        size, program = largest_batch(compiled, first) if self.fill else (first, compiled(first))
        step.step, step.batch = program.run, jax.tree.map(lambda x: jnp.resize(x, (size, *x.shape[1:])), step.batch)
        name = f"{self.network} training step, {self.size}, {self.dtype}, batch {size} x {self.num_tokens} tokens"
        yield measure(name, step, self.repeats, size, size * self.num_tokens, program, self.dtype)

    def problem(self, t5: T5Config) -> tuple[ModelConfig, np.ndarray, np.ndarray]:
        """The networks' config, random embeddings [B, E] and random texts [B, L]."""
        config = ModelConfig(
            t5=t5,
            embedding_width=self.embedding_width,
            num_pseudo_tokens=self.num_pseudo_tokens,
            max_length=self.num_tokens,
            projection_dropout=0.0,
        )
        rng = np.random.default_rng(0)
        e = rng.standard_normal((self.batch_size, config.embedding_width), np.float32)
        return config, e, rng.integers(2, t5.vocab_size, (self.batch_size, config.max_length))


class Step:
    """The training step of `v2t train` on one batch; a call returns the loss before its update.

    A corrector's hypotheses are the batch's own texts and embeddings, each row's those of the next.
    """

    def __init__(
        self, config: ModelConfig, params: Params, e: np.ndarray, ids: np.ndarray, network: Network = "inverter"
    ) -> None:
        optimizer, apply = make_optimizer(OPTIMIZER, num_steps=1), NETWORKS[network](config).apply
        self.state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))
        target, labels = jnp.asarray(e), jnp.asarray(ids, jnp.int32)
        others = () if network == "inverter" else (jnp.roll(labels, 1, 0), jnp.roll(target, 1, 0))
        self.batch = (target, *others), labels

        def loss(params: Params, given: tuple[jax.Array, ...], ids: jax.Array, _: jax.Array) -> Any:
            return cross_entropy(apply({"params": params}, *given, ids), ids)

        self.step: Any = jax.jit(make_step(loss, optimizer, accumulate_steps=1, seed=0), donate_argnums=0)

    def __call__(self) -> float:
        self.state, metrics = jax.block_until_ready(self.step(self.state, *self.batch))
        return float(metrics.loss)
