"""An inverter's train step beside the same network in PyTorch: v2t bench train

A turn is one step: forward, backward, clipping of the gradient's norm, AdamW. Dropout is off, because the two sides
could not drop the same units; the losses of the first two steps must agree, so the first update is checked too.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.bench import T5_SMALL, Comparison, load_torch, report, take_turns, to_numpy, torch_t5
from v2t_jax.config import ModelConfig, OptimizerConfig, T5Config
from v2t_jax.errors import InputError
from v2t_jax.interop.hf_t5 import t5_from_huggingface
from v2t_jax.models import inverter
from v2t_jax.models.layers import Params
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.step import TrainState, cross_entropy, make_step

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.01, clip_norm=1.0)
LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Train:
    """Times a T5-small-sized inverter's train step (random float32 weights, dropout off) beside PyTorch."""

    batch_size: int = 16
    num_tokens: int = 32
    """tokens of every text"""
    num_pseudo_tokens: int = 16
    """pseudo-tokens that an embedding becomes"""
    embedding_width: int = 768
    repeats: int = 5
    """turns of each side"""
    json: bool = False
    """print one JSON document and nothing else"""

    def run(self) -> None:
        report([compare(self)], self.json)


def torch_projection(config: ModelConfig) -> Any:
    """The inverter's projection in torch, [B, E] -> [B, R * D]."""
    nn = load_torch().nn
    width = config.embedding_width
    return nn.Sequential(
        nn.Linear(width, width),
        nn.Dropout(config.projection_dropout),
        nn.GELU(),
        nn.Linear(width, config.t5.d_model * config.num_pseudo_tokens),
    )


def inverter_params(config: ModelConfig, model: Any, projection: Any) -> Params:
    """The inverter's parameters with the weights of the two torch modules, copied."""
    weights = to_numpy(projection)
    params = {
        "t5": t5_from_huggingface(to_numpy(model), config.t5),
        "projection": {
            name: {"kernel": weights[f"{i}.weight"].T, "bias": weights[f"{i}.bias"]}
            for name, i in (("hidden", 0), ("output", 3))
        },
    }
    return jax.tree.map(lambda p: jnp.array(p, copy=True), params)


class TorchStep:
    """One training step in torch at a call; returns the loss before its update."""

    def __init__(self, config: ModelConfig, model: Any, projection: Any, e: np.ndarray, ids: np.ndarray) -> None:
        self.torch = load_torch()
        self.config, self.model, self.projection = config, model.train(), projection.train()
        self.e, self.ids = self.torch.from_numpy(e), self.torch.from_numpy(ids)
        self.params = [*model.parameters(), *projection.parameters()]
        groups = [
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in self.params if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = self.torch.optim.AdamW(
            groups, lr=OPTIMIZER.learning_rate, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=1e-8
        )

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        embeds = self.projection(self.e).reshape(len(self.e), self.config.num_pseudo_tokens, -1)
        mask = self.torch.ones(embeds.shape[:2], dtype=self.torch.long)
        loss = self.model(inputs_embeds=embeds, attention_mask=mask, labels=self.ids).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.params, OPTIMIZER.clip_norm)
        self.optimizer.step()
        return float(loss.detach())


class OurStep:
    """The same with the training step that `v2t train` uses."""

    def __init__(self, config: ModelConfig, params: Params, e: np.ndarray, ids: np.ndarray) -> None:
        optimizer = make_optimizer(OPTIMIZER, num_steps=1)
        self.state = TrainState(jnp.int32(0), params, jax.jit(optimizer.init)(params))
        self.e, self.ids = jnp.asarray(e), jnp.asarray(ids, jnp.int32)

        def loss(params: Params, e: jax.Array, ids: jax.Array, key: jax.Array) -> Any:
            total, correct, tokens = cross_entropy(inverter.logits(config, params, e, ids), ids)
            return total, (correct, tokens)

        self.step = jax.jit(make_step(loss, optimizer, accumulate_steps=1, seed=0), donate_argnums=0)

    def __call__(self) -> float:
        self.state, metrics = jax.block_until_ready(self.step(self.state, self.e, self.ids))
        return float(metrics.loss)


def compare(options: Train, t5: T5Config = T5_SMALL) -> Comparison:
    """Times the two.

    Raises:
        InputError: torch isn't installed, or an option is out of range.
        AssertionError: the losses differ by more than `LOSS_TOLERANCE`.
    """
    if options.batch_size < 1:
        raise InputError(f"batch_size is {options.batch_size}; it must be at least 1.")
    load_torch()
    config = ModelConfig(
        t5=t5,
        embedding_width=options.embedding_width,
        num_pseudo_tokens=options.num_pseudo_tokens,
        max_length=options.num_tokens,
        projection_dropout=0.0,
    )
    rng = np.random.default_rng(0)
    e = rng.standard_normal((options.batch_size, config.embedding_width), np.float32)
    ids = rng.integers(2, t5.vocab_size, (options.batch_size, config.max_length))
    model, projection = torch_t5(t5), torch_projection(config)
    ours = OurStep(config, inverter_params(config, model, projection), e, ids)
    theirs = TorchStep(config, model, projection, e, ids)
    for step in range(2):
        mine, reference = ours(), theirs()
        assert abs(mine - reference) < LOSS_TOLERANCE, f"step {step}: our loss is {mine}, torch's {reference}"
    name = f"inverter train step, batch {options.batch_size} x {config.max_length} tokens"
    return take_turns(name, ours, theirs, options.repeats)
