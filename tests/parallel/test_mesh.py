"""The tables from parameters to mesh axes, strict both ways, and the shardings that follow."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from v2t_jax.config import MeshConfig, ModelConfig, OptimizerConfig, T5Config
from v2t_jax.errors import InputError
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.inverter import Inverter
from v2t_jax.parallel.mesh import batch_sharding, make_mesh, param_specs, state_shardings
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.step import TrainState

SIZES = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2}


def shapes(network, **options):
    t5 = T5Config(
        **SIZES,
        num_encoder_layers=1,
        num_decoder_layers=1,
        feed_forward=options.pop("feed_forward", "relu"),
        tie_word_embeddings=options.pop("tie", True),
    )
    model = ModelConfig(t5=t5, embedding_width=6, num_pseudo_tokens=2, **options)
    return network(model).abstract_params()


OPTIONS = [
    {"feed_forward": kind, "tie": tie, "standardize": standardize, "bag_of_words": words}
    for kind, tie, standardize, words in itertools.product(
        ("relu", "gated-gelu"), (True, False), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("network", [Inverter, Corrector])
def test_tables_fit_every_option(network):
    for options in OPTIONS:
        params = shapes(network, **options)
        specs = param_specs(params, network.PARAM_AXES)
        assert jax.tree.structure(params) == jax.tree.structure(specs)
        layer = specs["t5"]["decoder"]["layers"]
        assert layer["self_attention"]["q"] == PartitionSpec(None, "fsdp", "model")
        assert layer["feed_forward"]["wo"] == PartitionSpec(None, "model", "fsdp")
        assert specs["t5"]["token_embedding"] == PartitionSpec("model", None)


@pytest.mark.parametrize("network", [Inverter, Corrector])
def test_every_rule_is_needed(network):
    """Without a rule, parameters of some option go unmatched: so no rule is there for nothing."""
    params = [shapes(network, **OPTIONS[i]) for i in (0, -1)]
    for i in range(len(network.PARAM_AXES)):
        shorter = network.PARAM_AXES[:i] + network.PARAM_AXES[i + 1 :]
        raised = 0
        for tree in params:
            try:
                param_specs(tree, shorter)
            except ValueError as error:
                assert "No sharding rule matches the parameter" in str(error)
                raised += 1
        assert raised, network.PARAM_AXES[i]


def test_unmatched_unused_and_too_long():
    params = shapes(Inverter)
    table = Inverter.PARAM_AXES
    with pytest.raises(ValueError, match="No sharding rule matches the parameter surplus"):
        param_specs(params | {"surplus": jnp.zeros(3)}, table)
    with pytest.raises(ValueError, match="No parameter uses the sharding rule 'other/kernel'"):
        param_specs(params, (*table, ("other/kernel", (None,))))
    with pytest.raises(ValueError, match="has 2 axes, but its rule .* names 3"):
        param_specs({"kernel": jnp.zeros((2, 2))}, [("kernel", (None, None, None))])
    with pytest.raises(ValueError, match="No sharding rule"):  # a rule matches whole paths, not parts of them
        param_specs({"kernel_too": jnp.zeros((2, 2))}, [("kernel", (None, None))])


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_optimiser_states_lie_like_the_parameters(name):
    params = shapes(Corrector, **OPTIONS[-1])
    optimizer = make_optimizer(OptimizerConfig(name=name), 10)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    specs = param_specs(params, Corrector.PARAM_AXES)
    shardings = state_shardings(mesh, state, specs)
    assert shardings.step.spec == PartitionSpec()
    assert jax.tree.map(lambda s: s.spec, shardings.params) == specs
    # Every array of the state can be laid out so.
    jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), state, shardings)
    if name == "adamw":
        for moment in ("mu", "nu"):
            assert jax.tree.map(lambda s: s.spec, optax.tree_utils.tree_get(shardings.optimizer, moment)) == specs


def test_an_axis_that_the_mesh_does_not_divide():
    params = shapes(Inverter)
    mesh = make_mesh(MeshConfig(1, 8, 1))
    assert state_shardings(mesh, params, param_specs(params, Inverter.PARAM_AXES))
    with pytest.raises(InputError, match="relative_bias has an axis of 2, which mesh.model=8 doesn't divide"):
        state_shardings(make_mesh(MeshConfig(1, 1, 8)), params, param_specs(params, Inverter.PARAM_AXES))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 1, -1), (1, 1, 8)), ((2, 4, 1), (2, 4, 1))],
)
def test_mesh_shapes(sizes, expected):
    mesh = make_mesh(MeshConfig(*sizes))
    assert tuple(mesh.shape.values()) == expected and mesh.axis_names == ("data", "fsdp", "model")
    assert batch_sharding(mesh).shard_shape((16, 4)) == (16 // (expected[0] * expected[1]), 4)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (-1, 3, 1), (0, 1, 1), (-1, 0, 1), (16, 1, 1), (-1, 16, 1)])
def test_meshes_that_do_not_fit(sizes):
    with pytest.raises(InputError, match="doesn't fit 8 devices"):
        make_mesh(MeshConfig(*sizes))


def test_a_mesh_over_some_devices():
    assert make_mesh(MeshConfig(), jax.devices()[:2]).devices.shape == (2, 1, 1)


def test_only_the_data_axis_goes_from_slice_to_slice():
    devices = jax.devices()
    mesh = make_mesh(MeshConfig(data=4, fsdp=2, slices=2))
    assert set(mesh.devices[:2].flat) == set(devices[:4]) and set(mesh.devices[2:].flat) == set(devices[4:])
    with pytest.raises(InputError, match="mesh.data=1 can't be split over 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8, slices=2))
    with pytest.raises(InputError, match="mesh.slices=3 doesn't divide the 8 devices"):
        make_mesh(MeshConfig(slices=3))
    with pytest.raises(InputError, match="mesh.slices is -1"):
        MeshConfig(slices=-1)
