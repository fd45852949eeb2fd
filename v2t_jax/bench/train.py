"""An inverter's training step: `v2t bench train`. It is forward, backward, clipping of the gradient's norm, AdamW."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.bench import report
from v2t_jax.config import T5_SIZES, ModelConfig, OptimizerConfig, T5Config
from v2t_jax.errors import check_whole
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.layers import Params
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.step import TrainState, cross_entropy, make_step

T5_SMALL = dataclasses.replace(T5_SIZES["t5-small"], dropout_rate=0.0)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.01, clip_norm=1.0)


@dataclass(frozen=True)
class Train:
    """Times the training step of a T5-small-sized inverter with random float32 weights, without dropout."""

    batch_size: int = 16
    num_tokens: int = 32  # tokens of every text
    num_pseudo_tokens: int = 16  # pseudo-tokens that an embedding becomes
    embedding_width: int = 768
    repeats: int = 5
    json: bool = False  # print one JSON document and nothing else

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_tokens", "num_pseudo_tokens", "embedding_width"):
            check_whole(name, getattr(self, name), 1)

    def run(self) -> None:
        config, e, ids = self.problem(T5_SMALL)
        step = Step(config, Inverter(config).init_params(jax.random.key(0)), e, ids)
        name = f"inverter training step, T5-small, batch {self.batch_size} x {self.num_tokens} tokens"
        report(name, self.batch_size, step, self.repeats, self.json)

    def problem(self, t5: T5Config) -> tuple[ModelConfig, np.ndarray, np.ndarray]:
        """The inverter's config, random embeddings [B, E] and random texts [B, L]."""
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
    """The training step of `v2t train` on one batch; a call returns the loss before its update."""

    def __init__(self, config: ModelConfig, params: Params, e: np.ndarray, ids: np.ndarray) -> None:
        optimizer = make_optimizer(OPTIMIZER, num_steps=1)
        self.state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))
        self.e, self.ids = jnp.asarray(e), jnp.asarray(ids, jnp.int32)

        def loss(params: Params, e: jax.Array, ids: jax.Array, _: jax.Array) -> Any:
            return cross_entropy(Inverter(config).apply({"params": params}, e, ids), ids)

        self.step = jax.jit(make_step(loss, optimizer, accumulate_steps=1, seed=0), donate_argnums=0)

    def __call__(self) -> float:
        self.state, metrics = jax.block_until_ready(self.step(self.state, self.e, self.ids))
        return float(metrics.loss)
