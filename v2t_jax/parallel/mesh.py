"""Sharding: one mesh with the axes (data, fsdp, model), and strict tables from parameters to its axes.

A model's `PARAM_AXES` maps parameter paths (regular expressions) to logical axes; `RULES` maps those to mesh axes.
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

Rules = tuple[tuple[str, Any], ...]
Table = Sequence[tuple[str, tuple[str | None, ...]]]  # a model's PARAM_AXES

AXES = ("data", "fsdp", "model")
RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("embed", "fsdp"),
    ("heads", "model"),
    ("mlp", "model"),
    ("layers", None),
)
# Decoding reads all weights at every token, so none are gathered. "batch": each device has whole weights and some of
# the rows. "model": weights stay sharded over the model axis, for networks that don't fit on one device.
DECODING_RULES: dict[DecodeLayout, Rules] = {
    "batch": (("batch", AXES), *((name, None) for name, _ in RULES[1:])),
    "model": tuple((name, None if name == "embed" else axis) for name, axis in RULES),
}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or those given); only the data axis crosses from slice to slice."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.data, config.fsdp, config.model]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = len(devices) // max(-math.prod(sizes), 1)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        shape = f"data={config.data}, fsdp={config.fsdp}, model={config.model}"
        raise InputError(f"A mesh of {shape} doesn't fit {len(devices)} devices; at most one axis may be -1.")
    slices = _slices(devices, config.slices)
    if sizes[0] % len(slices):
        raise InputError(
            f"mesh.data={sizes[0]} can't be split over {len(slices)} slices; make it a multiple, and fsdp x model at "
            f"most the {len(slices[0])} devices of a slice."
        )
    sizes[0] //= len(slices)
    layout = [create_device_mesh(sizes, part, allow_split_physical_axes=True) for part in slices]
    # Explicit axis types, the default of jax.make_mesh, fail with linen's logical constraints.
    return Mesh(np.concatenate(layout), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice; those that know no slice are split into groups of neighbors."""
    known = {device.slice_index for device in devices if getattr(device, "slice_index", None) is not None}
    if known:
        if count not in (0, len(known)):
            raise InputError(f"mesh.slices is {count}, but the devices belong to {len(known)} slices; leave it 0.")
        return [[device for device in devices if device.slice_index == index] for index in sorted(known)]
    if len(devices) % max(count, 1):
        raise InputError(f"mesh.slices={count} doesn't divide the {len(devices)} devices; choose a divisor.")
    return [part.tolist() for part in np.split(np.array(devices, object), max(count, 1))]


@contextlib.contextmanager
def _inside(mesh: Mesh, rules: Rules) -> Iterator[None]:
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


@dataclass(frozen=True)
class OnMesh:
    """A jitted program with logical axis names, which `rules` map to axes of `mesh`."""

    program: Any
    mesh: Mesh
    rules: Rules = RULES

    def __call__(self, *args: Any) -> Any:
        with _inside(self.mesh, self.rules):
            return self.program(*args)

    def lower(self, *args: Any) -> Any:
        with _inside(self.mesh, self.rules):
            return self.program.lower(*args)


def param_specs(params: Any, table: Table, rules: Rules = RULES) -> Any:
    """A tree of PartitionSpec like `params`. An unmatched parameter and an unused rule are errors.

    A rule may name fewer axes than an array has; the rest are not sharded.
    """
    places = dict(rules)
    used: set[str] = set()

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = "/".join(str(key.key) for key in path)
        pattern, axes = next((rule for rule in table if re.fullmatch(rule[0], name)), ("", None))
        if axes is None:
            raise ValueError(f"No sharding rule matches the parameter {name}.")
        if len(axes) > leaf.ndim:
            raise ValueError(f"{name} has {leaf.ndim} axes, but its rule {pattern!r} names {len(axes)}.")
        used.add(pattern)
        return PartitionSpec(*(places[axis] if axis else None for axis in axes))

    specs = jax.tree_util.tree_map_with_path(spec, params)
    optional = ("lm_head", "statistics", "bag_of_words", "input_norm")  # present by configuration
    unused = [p for p, _ in table if p not in used and not any(name in p for name in optional)]
    if unused:
        raise ValueError(f"No parameter uses the sharding rule {unused[0]!r}.")
    return specs


def state_shardings(mesh: Mesh, state: Any, specs: Any) -> Any:
    """Shardings of a training state: what ends in a parameter's path and has its axes (Adam's moments) is sharded like
    it, the rest is replicated."""
    by_path = {
        tuple(str(key.key) for key in path): spec
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    }

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        found = (by_path.get(keys[start:]) for start in range(len(keys)))
        spec = next((spec for spec in found if spec is not None and leaf.ndim >= len(spec)), PartitionSpec())
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis and size % mesh.shape[axis]:
                raise InputError(
                    f"{'/'.join(keys)} has an axis of {size}, which mesh.{axis}={mesh.shape[axis]} doesn't divide; "
                    "change that size (for a vocabulary: data.vocabulary_size) or the mesh."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def decoding_rows(mesh: Mesh, layout: DecodeLayout) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(dict(DECODING_RULES[layout])["batch"]))


def decoding_on(mesh: Mesh, layout: DecodeLayout) -> contextlib.AbstractContextManager[None]:
    """Programs called inside only decode, and are laid out for that."""
    return _inside(mesh, DECODING_RULES[layout])


def decoding_params(params: Any, table: Table, layout: DecodeLayout) -> Any:
    """Inside a program on a mesh, weights laid out for decoding; elsewhere, `params` itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return params
    specs = param_specs(params, table, DECODING_RULES[layout])
    return jax.tree.map(jax.lax.with_sharding_constraint, params, specs)


def spread_rows(run: Callable[..., Any], layout: DecodeLayout, *rows: jax.Array) -> Any:
    """`run(*rows)`; inside a program on a mesh, with the rows laid out for decoding, if they can be split so."""
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(DECODING_RULES[layout])
    if mesh.empty:
        return run(*rows)
    constrain, training = jax.lax.with_sharding_constraint, dict(RULES)["batch"]
    if len(rows[0]) % math.prod(mesh.shape[axis] for axis in rules["batch"]):
        rules["batch"] = training
    spec = PartitionSpec(rules["batch"])
    with nn.logical_axis_rules(tuple(rules.items())):
        result = run(*(constrain(x, spec) for x in rows))
    return constrain(constrain(result, spec), PartitionSpec(training))
