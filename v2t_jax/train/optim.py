"""Optimisers and learning-rate schedules, from optax."""

from typing import Any

import jax
import optax

from v2t_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then constant, or linear or cosine decay to zero at `num_steps`."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, num_steps)
    remaining = max(num_steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, remaining),
        "cosine": optax.cosine_decay_schedule(peak, remaining),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def _is_matrix(params: Any) -> Any:
    """True for what is decayed: weights with two axes or more, not norms and biases (stacked ones have two)."""
    names = ("scale", "bias", "mean", "std")
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and str(path[-1].key) not in names, params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    schedule = learning_rate(config, num_steps)
    if config.name == "adamw":
        core = optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=_is_matrix)
    elif config.name == "adafactor":
        core = optax.adafactor(
            schedule,
            weight_decay_rate=config.weight_decay or None,
            weight_decay_mask=_is_matrix,
            multiply_by_parameter_scale=False,
        )
    else:
        core = optax.contrib.muon(
            schedule,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            weight_decay_mask=_is_matrix,
        )
    if config.clip_norm == 0:
        return core
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core)
