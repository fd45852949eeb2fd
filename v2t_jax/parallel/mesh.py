"""Where arrays live: one mesh of axes (data, fsdp, model), and strict tables from parameters to it.

A parameter's path is matched by a model's `PARAM_AXES` table (regex -> logical axis names); `RULES` says which mesh
axis a logical name is cut over. Strict both ways: a parameter without a rule is an error, as is a rule without one.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from v2t_jax.config import DecodeLayout, MeshConfig
from v2t_jax.errors import InputError

AXES = ("data", "fsdp", "model")
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("embed", "fsdp"),
    ("heads", "model"),
    ("mlp", "model"),
    ("layers", None),
)
# Decoding reads all weights at every token, so nothing is gathered there. "batch": every device has whole weights and
# some of the rows. "model": weights stay cut over the model axis, as large networks need it.
DECODING_RULES: dict[DecodeLayout, tuple[tuple[str, Any], ...]] = {
    "batch": (("batch", AXES), *((name, None) for name, _ in RULES[1:])),
    "model": tuple((name, None if name == "embed" else axis) for name, axis in RULES),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or those given): within a slice over its own network, from slice to slice along `data`.

    Raises:
        InputError: the axes don't multiply to the number of devices, or the slices don't divide the data axis.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = [config.data, config.fsdp, config.model]
    if sizes.count(-1) == 1:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = len(devices) // max(known, 1)
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        shape = f"data={config.data}, fsdp={config.fsdp}, model={config.model}"
        raise InputError(f"A mesh of {shape} doesn't fit {len(devices)} devices; at most one axis may be -1.")
    slices = _slices(devices, config.slices)
    data, *others = sizes
    if data % len(slices):
        raise InputError(
            f"mesh.data={data} can't be laid over {len(slices)} slices: make it a multiple, and fsdp x model at most "
            f"the {len(slices[0])} devices of a slice."
        )
    sizes = [data // len(slices), *others]
    layout = [create_device_mesh(sizes, part, allow_split_physical_axes=True) for part in slices]
    # Explicit axis types, the default of jax.make_mesh, don't work with linen's logical constraints.
    return Mesh(np.concatenate(layout), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice, in the order of the slices' numbers."""
    known = {device.slice_index for device in devices if getattr(device, "slice_index", None) is not None}
    if known:
        if count not in (0, len(known)):
            raise InputError(f"mesh.slices is {count}, but the devices are of {len(known)} slices: leave it 0.")
        return [[device for device in devices if device.slice_index == index] for index in sorted(known)]
    if len(devices) % max(count, 1):
        raise InputError(f"mesh.slices={count} doesn't divide the {len(devices)} devices.")
    size = len(devices) // max(count, 1)
    return [devices[first : first + size] for first in range(0, len(devices), size)]


@dataclass(frozen=True)
class OnMesh:
    """A jitted program whose arrays' axes have names that `rules` give a place on `mesh`."""

    program: Any
    mesh: Mesh
    rules: tuple[tuple[str, Any], ...] = RULES

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            return self.program(*args)

    def lower(self, *args: Any) -> Any:
        """The program for arrays, or shapes, like these, not compiled yet."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            return self.program.lower(*args)


def param_specs(
    params: Any, table: Sequence[tuple[str, tuple[str | None, ...]]], rules: Sequence[tuple[str, Any]] = RULES
) -> Any:
    """A tree of PartitionSpec like `params`; `table` is the model's PARAM_AXES.

    A rule may name fewer axes than an array has (the stacked layer axis of a norm): the rest are not cut.

    Raises:
        ValueError: an unmatched parameter or an unused rule.
    """
    places = dict(rules)
    used: set[str] = set()

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = "/".join(str(key.key) for key in path)
        for pattern, axes in table:
            if re.fullmatch(pattern, name):
                if len(axes) > leaf.ndim:
                    raise ValueError(f"{name} has {leaf.ndim} axes, but its rule {pattern!r} names {len(axes)}.")
                used.add(pattern)
                return PartitionSpec(*(places[axis] if axis else None for axis in axes))
        raise ValueError(f"No sharding rule matches the parameter {name}.")

    specs = jax.tree_util.tree_map_with_path(spec, params)
    optional = (
        r"lm_head",
        r"statistics",
        r"bag_of_words",
        r"pooler",
        r"input_norm",
    )  # present by configuration
    unused = [p for p, _ in table if p not in used and not any(name in p for name in optional)]
    if unused:
        raise ValueError(f"No parameter uses the sharding rule {unused[0]!r}.")
    return specs


def state_shardings(mesh: Mesh, state: Any, specs: Any) -> Any:
    """Shardings of a whole training state: what mirrors the parameters is cut like them, the rest is replicated.

    Optimisers keep trees of the parameters' own paths (Adam's moments) among others; so a leaf is recognized by the
    end of its path and its shape having as many axes.

    Raises:
        InputError: an array's axis isn't a multiple of the mesh axis that cuts it.
    """
    by_path = {
        tuple(str(key.key) for key in path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    }

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        for start in range(len(keys)):
            spec = by_path.get(keys[start:])
            if spec is not None and leaf.ndim >= len(spec):
                for size, axis in zip(leaf.shape, spec, strict=False):
                    if axis and size % mesh.shape[axis]:
                        raise InputError(
                            f"{'/'.join(keys[start:])} has an axis of {size}, which mesh.{axis}={mesh.shape[axis]} "
                            "doesn't divide; change that size (for a vocabulary: data.vocabulary_size) or the mesh."
                        )
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def decoding_rows(mesh: Mesh, layout: DecodeLayout) -> NamedSharding:
    """Where the rows of a batch that is decoded lie."""
    return NamedSharding(mesh, PartitionSpec(dict(DECODING_RULES[layout])["batch"]))


@contextlib.contextmanager
def decoding_on(mesh: Mesh, layout: DecodeLayout) -> Iterator[None]:
    """Programs that are called inside are of decoding alone, on a mesh; weights and rows are laid out for it."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(DECODING_RULES[layout]):
        yield


def decoding_params(params: Any, table: Sequence[tuple[str, tuple[str | None, ...]]], layout: DecodeLayout) -> Any:
    """Inside a program on a mesh: weights as decoding wants them. Elsewhere nothing happens."""
    if jax.sharding.get_abstract_mesh().empty:
        return params
    specs = param_specs(params, table, DECODING_RULES[layout])
    return jax.tree.map(jax.lax.with_sharding_constraint, params, specs)


def spread_rows(run: Callable[..., jax.Array], layout: DecodeLayout, *rows: jax.Array) -> jax.Array:
    """`run(*rows)`, inside a program on a mesh with the rows laid out for decoding. Elsewhere it is just that.

    Rows that the devices don't divide stay as they are in training, over (data, fsdp).
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(DECODING_RULES[layout])
    if mesh.empty:
        return run(*rows)
    if len(rows[0]) % math.prod(mesh.shape[axis] for axis in rules["batch"]):
        rules["batch"] = dict(RULES)["batch"]
    spec = PartitionSpec(rules["batch"])
    with nn.logical_axis_rules(tuple(rules.items())):
        result = run(*(jax.lax.with_sharding_constraint(x, spec) for x in rows))
    result = jax.lax.with_sharding_constraint(result, spec)
    return jax.lax.with_sharding_constraint(result, PartitionSpec(dict(RULES)["batch"]))
