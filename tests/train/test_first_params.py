"""A run's first parameters: the same numbers on any mesh, each device making its own part alone."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.helpers.tiny_run import make_recipe
from v2t_jax.config import MeshConfig
from v2t_jax.data.recipe import make_batches
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.parallel.mesh import make_mesh, param_specs
from v2t_jax.train import setup as starting
from v2t_jax.train.setup import initial_params, prepare, random_params

# The random bits are equal; of what each program computes from them XLA may round the last bits in its own way. (jax
# 0.10.2 does so only where it multiplies two constants first, 0.12 also from mesh to mesh, by 3 units.)
same = functools.partial(np.testing.assert_array_max_ulp, maxulp=4)
MESHES = [MeshConfig(1, 8, 1), MeshConfig(2, 2, 2)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    recipe = make_recipe(tmp_path_factory.mktemp("recipe"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(starting, "STATISTICS_TEXTS", 64)
        yield prepare(dataclasses.replace(recipe, initial_embedding="embedder", corrector_from_inverter=True))


def first(setup, mesh):
    """Both stages' parameters; the corrector's start from the inverter's."""
    found = {}
    for stage in setup.config.stages:
        batches = make_batches(setup.config, setup.datasets, getattr(setup.config, stage).batch_size)
        found[stage] = initial_params(setup, stage, found, batches, mesh)
    return found


@pytest.fixture(scope="module")
def alone(setup):
    """On one device."""
    return first(setup, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize("config", MESHES, ids=str)
def test_they_are_the_same_on_any_mesh_and_cut_by_the_table(setup, alone, config):
    mesh = make_mesh(config)
    for stage, params in first(setup, mesh).items():
        jax.tree.map(same, params, alone[stage])
        specs = param_specs(params, NETWORKS[stage].PARAM_AXES)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)),
            strict=True,
        ):
            parts = [mesh.shape[axis] if axis else 1 for axis in spec]
            expected = tuple(size // n for size, n in zip(leaf.shape, parts + [1] * (leaf.ndim - len(parts))))  # noqa: B905
            assert {shard.data.shape for shard in leaf.addressable_shards} == {expected}, path


@pytest.mark.parametrize("stage", ["inverter", "corrector"])
def test_they_are_what_the_network_makes_of_the_seed(setup, stage):
    model = setup.model
    key = jax.random.key(3)
    program, _ = random_params(stage, model, make_mesh(MeshConfig(1, 4, 2)))
    found = program(np.asarray(jax.random.key_data(key)))
    jax.tree.map(same, found, NETWORKS[stage](model).init_params(key))


@pytest.mark.parametrize("stage", ["inverter", "corrector"])
def test_no_device_makes_an_array_whole_that_is_cut(setup, stage):
    """In the program of one device, nothing has the shape of such an array, nor as many elements."""
    t5 = dataclasses.replace(setup.model.t5, vocab_size=1184, d_model=208, d_kv=8, d_ff=736, num_heads=16)
    model = dataclasses.replace(setup.model, t5=t5)
    program, shardings = random_params(stage, model, make_mesh(MeshConfig(1, 4, 2)))
    text = program.lower(jax.ShapeDtypeStruct((2,), np.uint32)).compile().as_text()
    sizes = {int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)}
    shapes = NETWORKS[stage](model).abstract_params()
    held = jax.tree.map(lambda shape, sharding: int(np.prod(sharding.shard_shape(shape.shape))), shapes, shardings)
    largest = max(jax.tree.leaves(held))
    assert largest in sizes
    assert max(sizes) <= 2 * largest, sorted(sizes)[-5:]  # two words of random bits at most


def test_statistics_are_process_0s(setup, monkeypatch):
    def others(value):
        assert not any(array.any() for array in value)  # nothing was computed here
        return np.ones(16, np.float32), np.full(16, 2, np.float32)

    monkeypatch.setattr(starting.processes, "is_main", lambda: False)
    monkeypatch.setattr(starting.processes, "broadcast", others)
    found = starting.input_statistics(setup, lambda step: pytest.fail("it read texts"))
    np.testing.assert_array_equal(found["std"], np.full(16, 2))
