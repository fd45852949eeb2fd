"""Every parameter of every network has a sharding rule, and every rule a parameter."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tests.models.test_param_trees import CASES, V1_1
from v2t_jax.models.t5 import T5
from v2t_jax.parallel.mesh import param_specs


@pytest.mark.parametrize("name", [name for name, network in CASES.items() if network.PARAM_AXES])
def test_tables_are_complete_both_ways(name: str) -> None:
    network = CASES[name]
    params = network.abstract_params()
    specs = param_specs(params, network.PARAM_AXES)
    jax.tree.map(lambda leaf, spec: len(spec) <= leaf.ndim or pytest.fail(str(spec)), params, specs)
    with pytest.raises(ValueError, match="No sharding rule matches"):
        param_specs({**params, "stranger": jnp.zeros(2)}, network.PARAM_AXES)
    with pytest.raises(ValueError, match="No parameter uses"):
        param_specs(params, (*network.PARAM_AXES, ("stranger", (None,))))


def test_matrices_are_cut_over_width_and_over_heads_or_the_hidden_layer() -> None:
    layers = param_specs(T5(V1_1).abstract_params(), T5.PARAM_AXES)["decoder"]["layers"]
    assert layers["cross_attention"]["q"] == PartitionSpec(None, "fsdp", "model")
    assert layers["feed_forward"]["wo"] == PartitionSpec(None, "model", "fsdp")
