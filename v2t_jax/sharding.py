"""Where arrays live: one mesh of axes (data, fsdp, model), and strict tables from parameters to it.

A parameter's path is matched by a model's `PARAM_AXES` table (regex -> logical axis names); `RULES` says which mesh
axis a logical name is cut over. Strict both ways: a parameter without a rule is an error, as is a rule without one.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from v2t_jax.config import MeshConfig
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


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices (or those given).

    Raises:
        InputError: the axes don't multiply to the number of devices.
    """
    devices = list(devices if devices is not None else jax.devices())
    sizes = [config.data, config.fsdp, config.model]
    if sizes.count(-1) == 1:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = len(devices) // max(known, 1)
    if min(sizes) < 1 or int(np.prod(sizes)) != len(devices):
        shape = f"data={config.data}, fsdp={config.fsdp}, model={config.model}"
        raise InputError(f"A mesh of {shape} doesn't fit {len(devices)} devices; at most one axis may be -1.")
    # Explicit axis types, the default, don't work with linen's logical constraints. The first two arguments are
    # positional because a keyword's name changed between jax 0.10 and 0.11.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_specs(params: Any, table: Sequence[tuple[str, tuple[str | None, ...]]]) -> Any:
    """A tree of PartitionSpec like `params`; `table` is the model's PARAM_AXES.

    A rule may name fewer axes than an array has (the stacked layer axis of a norm): the rest are not cut.

    Raises:
        ValueError: an unmatched parameter or an unused rule.
    """
    rules = dict(RULES)
    used: set[str] = set()

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        name = "/".join(str(key.key) for key in path)
        for pattern, axes in table:
            if re.fullmatch(pattern, name):
                if len(axes) > leaf.ndim:
                    raise ValueError(f"{name} has {leaf.ndim} axes, but its rule {pattern!r} names {len(axes)}.")
                used.add(pattern)
                return PartitionSpec(*(rules[axis] if axis else None for axis in axes))
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

    Optimisers keep trees of the parameters' own paths (Adam's moments) among others; so a leaf is recognised by the
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
