"""Where every parameter of the recipes' models lies, and what that costs a device, as committed JSON.

A changed table shows as a difference of files; `python -m tests.parallel.test_sharding_golden` rewrites them.
"""

import dataclasses
import json
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from v2t_jax.config import T5_SIZES, ModelConfig, OptimizerConfig
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.parallel.mesh import AXES, param_specs, state_shardings
from v2t_jax.train.optim import make_optimizer

FOLDER = Path(__file__).parent.parent / "golden" / "sharding"
CASES = [
    ("inverter", "t5-small", (8, 1, 1)),
    ("inverter", "t5-base", (2, 2, 2)),
    ("corrector", "t5-base", (2, 2, 2)),
    ("corrector", "t5-large", (1, 8, 1)),
    ("inverter", "t5-3b", (1, 16, 1)),
    ("corrector", "t5-3b", (4, 16, 1)),
    ("corrector", "t5-11b", (2, 16, 8)),
]
# The papers' and the published checkpoints' counts of the T5 alone (Raffel et al. 2020, section 3.7; 11B as published).
T5_PARAMETERS = {"t5-small": 60.5e6, "t5-base": 222.9e6, "t5-large": 737.7e6, "t5-3b": 2.85e9, "t5-11b": 11.3e9}


def name_of(network: str, size: str, shape: tuple[int, int, int]) -> str:
    return f"{network}-{size}-{'x'.join(map(str, shape))}.json"


def layout(network: str, size: str, shape: tuple[int, int, int]) -> dict:
    """Parameter path -> shape, spec and bytes a device, and what the optimisers' states take."""
    model = ModelConfig(t5=dataclasses.replace(T5_SIZES[size], dtype="bfloat16"))
    params = NETWORKS[network](model).abstract_params()
    mesh = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
    specs = param_specs(params, NETWORKS[network].PARAM_AXES)

    def bytes_a_device(tree) -> int:
        shardings = state_shardings(mesh, tree, specs)
        sizes = jax.tree.map(lambda x, s: prod(s.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize, tree, shardings)
        return sum(jax.tree.leaves(sizes))

    found = {}
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True):
        name = "/".join(str(key.key) for key in path)
        cut = [None if axis is None else str(axis) for axis in spec]
        share = prod(mesh.shape[axis] for axis in cut if axis)
        found[name] = {"shape": list(leaf.shape), "spec": cut, "bytes": prod(leaf.shape) * 4 // share}
    optimizers = {
        name: bytes_a_device(jax.eval_shape(make_optimizer(OptimizerConfig(name=name), 10).init, params))
        for name in ("adamw", "adafactor", "muon")
    }
    return {
        "mesh": dict(zip(AXES, shape, strict=True)),
        "parameters": sum(prod(entry["shape"]) for entry in found.values()),
        "bytes": bytes_a_device(params),
        "optimizer_bytes": optimizers,
        "arrays": found,
    }


def dump(found: dict) -> str:
    """One line an array, so that differences can be read."""
    arrays = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in found["arrays"].items())
    head = json.dumps({key: value for key, value in found.items() if key != "arrays"}, indent=1)
    return f'{head[:-2]},\n "arrays": {{\n{arrays}\n }}\n}}\n'


@pytest.mark.parametrize(("network", "size", "shape"), CASES, ids=lambda case: str(case))
def test_parameters_lie_where_they_did(network, size, shape):
    found = layout(network, size, shape)
    assert dump(found) == (FOLDER / name_of(network, size, shape)).read_text()
    # What the file says of each array adds up to what the shardings themselves give.
    assert sum(entry["bytes"] for entry in found["arrays"].values()) == found["bytes"]


def test_every_file_has_its_case():
    assert {file.name for file in FOLDER.iterdir()} == {name_of(*case) for case in CASES}


@pytest.mark.parametrize("size", T5_SIZES)
def test_sizes_are_the_published_ones(size):
    params = Inverter(ModelConfig(t5=T5_SIZES[size])).abstract_params()
    count = sum(prod(leaf.shape) for leaf in jax.tree.leaves(params["t5"]))
    assert abs(count / T5_PARAMETERS[size] - 1) < 0.005


def test_adam_and_muon_are_cut_as_the_parameters_are():
    """Two moments, or one: their bytes on a device are that multiple of the parameters', counters aside."""
    found = json.loads((FOLDER / name_of(*CASES[-1])).read_text())
    assert abs(found["optimizer_bytes"]["adamw"] - 2 * found["bytes"]) < 100
    assert found["bytes"] < found["optimizer_bytes"]["muon"] < 1.2 * found["bytes"]
    # One row and one column for a matrix, whole on every device.
    assert found["optimizer_bytes"]["adafactor"] < 0.15 * found["bytes"]


if __name__ == "__main__":
    for case in CASES:
        (FOLDER / name_of(*case)).write_text(dump(layout(*case)))
