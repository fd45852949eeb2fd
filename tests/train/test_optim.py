"""Schedules at their corners, and what each optimiser does to each kind of weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from v2t_jax.config import OptimizerConfig
from v2t_jax.train.optim import learning_rate, make_optimizer

NAMES = ("adamw", "adafactor", "muon")
CONSTANT = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)


def params():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = {
        "t5": {
            "token_embedding": (12, 8),
            "encoder": {"layers": {"wi": (3, 8, 16), "norm": {"scale": (3, 8)}}, "relative_bias": (4, 2)},
        },
        "projection": {"kernel": (8, 6), "bias": (6,)},
        "statistics": {"mean": (8,), "std": (8,)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.random.normal(next(keys), shape), shapes, is_leaf=is_shape)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 60: 0.5, 110: 0.0}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.5 + 0.5**1.5, 60: 0.5, 110: 0.0}),
    ],
)
def test_schedules(schedule, expected):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=10)
    rate = learning_rate(config, num_steps=110)
    for step, share in expected.items():
        np.testing.assert_allclose(rate(step), 2.0 * share, atol=1e-6, err_msg=f"step {step}")


def test_schedules_without_warmup_or_without_anything_else():
    assert learning_rate(CONSTANT, 100)(0) == pytest.approx(0.1)
    rate = learning_rate(OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=1000), 10)
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_optimiser_descends(name, schedule):
    config = OptimizerConfig(name=name, learning_rate=0.05, schedule=schedule, warmup_steps=2)
    optimizer, weights = make_optimizer(config, 30), params()
    state = optimizer.init(weights)
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))  # noqa: E731

    @jax.jit
    def step(weights, state):
        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    before = loss(weights)
    for _ in range(30):
        weights, state = step(weights, state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((weights, state)))
    assert loss(weights) < 0.7 * before


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_is_of_matrices_and_scales_with_the_rate(name):
    """With no gradient, only the decay is left: w * (1 - rate * decay)."""
    config = dataclasses.replace(CONSTANT, name=name, weight_decay=0.5)
    optimizer, weights = make_optimizer(config, 10), params()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
    factor = jax.tree.map(lambda u, w: float(jnp.max(jnp.abs(u / w + 0.05))), updates, weights)
    unchanged = jax.tree.map(lambda u: float(jnp.max(jnp.abs(u))), updates)
    assert factor["projection"]["kernel"] < 1e-6 and factor["t5"]["encoder"]["layers"]["wi"] < 1e-6
    assert unchanged["projection"]["bias"] == 0 and unchanged["t5"]["encoder"]["layers"]["norm"]["scale"] == 0
    assert unchanged["statistics"] == {"mean": 0.0, "std": 0.0}


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_table_does_not_decay(name):
    optimizer, weights = make_optimizer(dataclasses.replace(CONSTANT, name=name, weight_decay=0.5), 10, True), params()
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
    assert not np.asarray(updates["t5"]["token_embedding"]).any() and np.asarray(updates["projection"]["kernel"]).all()


def test_muon_orthogonalises_each_layer_of_a_stack():
    optimizer, weights = make_optimizer(dataclasses.replace(CONSTANT, name="muon", learning_rate=1.0), 10), params()
    updates, _ = optimizer.update(weights, optimizer.init(weights), weights)
    for matrix, shape in (
        *((layer, 2**0.5) for layer in updates["t5"]["encoder"]["layers"]["wi"]),  # sqrt(out / in)
        (updates["projection"]["kernel"], 1.0),
    ):
        singular = np.linalg.svd(np.asarray(matrix), compute_uv=False) / shape
        assert singular.min() > 0.5 and singular.max() < 1.4
    # Tables go by Adam with Nesterov momentum, whose first step is the gradient's sign, times a constant of b1 = 0.9.
    table = updates["t5"]["token_embedding"]
    np.testing.assert_allclose(np.abs(table), 1 + 0.9 * 0.1 / (1 - 0.9**2), rtol=1e-3)


def test_clipping():
    """Adam forgets a gradient's scale, so the clipped norm is looked for in its first moment."""
    grads = jax.tree.map(lambda x: 100 * x, params())
    for clip, expected in ((0.0, float(optax.tree.norm(grads))), (1.0, 1.0)):
        optimizer = make_optimizer(dataclasses.replace(CONSTANT, clip_norm=clip), 10)
        _, state = optimizer.update(grads, optimizer.init(params()), params())
        moment = optax.tree_utils.tree_get(state, "mu")
        assert float(optax.tree.norm(moment)) == pytest.approx(0.1 * expected, rel=1e-5)
