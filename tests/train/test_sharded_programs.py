"""What XLA makes of the sharded programs: the vocabulary stays cut, nothing is computed anew, results stay the same."""

import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.sharded_programs import CASES, LENGTH, MARK, MODEL, ROWS, VOCAB, gathered
from v2t_jax.config import MeshConfig
from v2t_jax.models.inverter import Inverter
from v2t_jax.parallel.mesh import OnMesh, make_mesh, param_specs, state_shardings
from v2t_jax.train.step import cross_entropy, greedy_hypotheses

WARNING = "Involuntary full rematerialization"


@pytest.fixture(scope="module")
def compiled():
    """The train steps' all-gathers, and what XLA said before and while the control was compiled."""
    # Nothing comes from the cache, which would say nothing; and nothing is run, so the code needn't be good.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.sharded_programs"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    said, _, control = done.stderr.partition(MARK)
    return dict(map(json.loads, done.stdout.splitlines())), said, control


def test_nothing_is_rematerialized_against_our_will(compiled):
    gathers, said, control = compiled
    assert len(gathers) == len(CASES)
    assert WARNING in control  # it would be seen
    assert WARNING not in said, said


def whole_logits(shapes):
    """Of arrays with the whole vocabulary, those that a batch's logits could be, in whole or one device's rows."""
    return [s for s in shapes if VOCAB in s and math.prod(s) >= ROWS // 8 * LENGTH * VOCAB and LENGTH in s]


def test_logits_are_never_gathered(compiled):
    for name, shapes in compiled[0].items():
        assert shapes, name  # weights are, over fsdp
        assert not whole_logits(shapes), name


def on_mesh(loss):
    """The gradient's HLO with logits cut over rows and vocabulary."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows = P(("data", "fsdp"))
    cut = NamedSharding(mesh, P(("data", "fsdp"), None, "model"))
    logits = jax.ShapeDtypeStruct((ROWS, LENGTH, VOCAB), jnp.float32, sharding=cut)
    labels = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=NamedSharding(mesh, rows))
    return jax.jit(jax.grad(loss), out_shardings=cut).lower(logits, labels).compile().as_text()


def test_the_loss_sends_numbers_a_token_and_another_would_send_logits():
    assert not gathered(on_mesh(lambda x, y: cross_entropy(x, y)[0]))
    rows = NamedSharding(make_mesh(MeshConfig(2, 2, 2)), P(("data", "fsdp")))
    assert whole_logits(gathered(on_mesh(lambda x, y: jnp.sum(jax.lax.with_sharding_constraint(x, rows) ** 2))))


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)])
def test_the_cut_loss_and_its_gradient_are_the_whole_ones(shape):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(30 * rng.standard_normal((ROWS, LENGTH, VOCAB), np.float32))
    labels = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)))

    def reference(logits):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(losses * (labels != 0))

    expected, gradient = jax.value_and_grad(reference)(logits)
    mesh = make_mesh(MeshConfig(*shape))
    cut = NamedSharding(mesh, P(("data", "fsdp"), None, "model"))
    loss, found = jax.jit(jax.value_and_grad(lambda x: cross_entropy(x, labels)[0]))(jax.device_put(logits, cut))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(found, gradient, atol=1e-5)
    _, (correct, tokens) = cross_entropy(logits, labels)
    hits = (jnp.argmax(logits, -1) == labels) & (labels != 0)
    assert (correct, tokens) == (hits.sum(), (labels != 0).sum())


@pytest.mark.parametrize("layout", ["batch", "model"])
@pytest.mark.parametrize("rows", [16, 4])  # 4 rows can't be spread over 8 devices
def test_hypotheses_of_eight_devices_are_those_of_one(layout, rows):
    params = Inverter(MODEL).init_params(jax.random.key(10))  # others echo the start token
    e = np.random.default_rng(1).standard_normal((rows, 16), np.float32)
    run = functools.partial(greedy_hypotheses, MODEL, decode=layout)
    expected = jax.jit(run)(params, e)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = jax.device_put(params, state_shardings(mesh, params, param_specs(params, Inverter.PARAM_AXES)))
    program = OnMesh(jax.jit(run), mesh)
    here = NamedSharding(mesh, P(("data", "fsdp")))
    found = program(placed, jax.device_put(e, here))
    assert len(np.unique(expected)) >= 4
    np.testing.assert_array_equal(found, expected)
    text = program.lower(placed, jax.device_put(e, here)).compile().as_text()
    spread = rows // 8 if layout == "batch" and rows == 16 else rows // 4
    # The self-attention cache [rows, H, K, L] shows how many rows, and how many heads, a device has.
    heads = 2 if layout == "model" else 4
    assert f"f32[{spread},{heads},8,{LENGTH}]" in text
