"""Optimizers and learning-rate schedules, from optax."""

from typing import Any

import jax
import optax

from v2t_jax.config import OptimizerConfig
from v2t_jax.models.t5 import TABLE


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
    """Which weights decay: matrices, not norms and biases (which have two axes where layers are stacked)."""
    names = ("scale", "bias", "mean", "std")
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim > 1 and str(path[-1].key) not in names, params)


def _orthogonalized(params: Any) -> Any:
    """Which weights Muon updates, and along which axes: matrices, stacked ones layer by layer.

    Embeddings, the output layer and position tables are lookup tables, not linear maps: Adam updates them, as is usual.
    """
    tables = (TABLE, "lm_head", "relative_bias")
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree_util.tree_map_with_path(
        lambda path, is_matrix: axes if is_matrix and str(path[-1].key) not in tables else None, _is_matrix(params)
    )


def make_optimizer(config: OptimizerConfig, num_steps: int, shared_table: bool = False) -> optax.GradientTransformation:
    """The recipe's optimizer; weight decay is scaled by the learning rate in all of them.

    A `shared_table` stays as it is: it has no gradient, and mustn't decay.
    """
    schedule, b1, b2, decay = learning_rate(config, num_steps), config.b1, config.b2, config.weight_decay
    if config.name == "adamw":
        core = optax.adamw(schedule, b1, b2, weight_decay=decay, mask=_is_matrix)
    elif config.name == "adafactor":
        core = optax.chain(
            optax.adafactor(multiply_by_parameter_scale=False),
            # Its own weight decay isn't scaled by the learning rate: 0.01 would be one percent a step.
            optax.add_decayed_weights(-decay, _is_matrix),
            optax.scale_by_schedule(schedule),
        )
    else:
        core = optax.contrib.muon(
            schedule,
            adam_b1=b1,
            adam_b2=b2,
            weight_decay=decay,
            weight_decay_mask=_is_matrix,
            muon_weight_dimension_numbers=_orthogonalized,
        )
    if shared_table:
        core = optax.chain(core, optax.masked(optax.set_to_zero(), _is_table))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core) if config.clip_norm else core


def _is_table(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: str(path[-1].key) == TABLE, params)
