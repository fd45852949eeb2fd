"""What a device can do at most: published figures where its name is known, otherwise measured here."""

import functools
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v2t_jax.bench.roofline import CHIPS

# By `device_kind`, the first pattern that fits: dense bfloat16 FLOP/s and bytes/s of memory, as NVIDIA's data sheets of
# A100, H100 (March 2022 and NVL), H200 and DGX B200 state them, halved where those are with sparsity; CHIPS for TPUs.
PUBLISHED = (
    (r"TPU v4( lite)?$", CHIPS["v4"].flops, CHIPS["v4"].bandwidth),
    (r"TPU v5 ?(lite|e)", CHIPS["v5e"].flops, CHIPS["v5e"].bandwidth),
    (r"TPU v5p?$", CHIPS["v5p"].flops, CHIPS["v5p"].bandwidth),
    (r"TPU v6 ?(lite|e)", CHIPS["v6e"].flops, CHIPS["v6e"].bandwidth),
    (r"A100.*PCIe?.*40GB|A100.*40GB", 312e12, 1555e9),
    (r"A100.*80GB.*PCIe", 312e12, 1935e9),
    (r"A100", 312e12, 2039e9),
    (r"H100.*PCIe", 756e12, 2000e9),
    (r"H100.*NVL", 835e12, 3900e9),
    (r"H100", 989e12, 3350e9),
    (r"H200", 989e12, 4800e9),
    (r"B200", 2250e12, 8000e9),
)
MATRIX = 2048  # rows of the square matrices whose product is timed
READ = 2**28  # bytes that are read


class Peak(NamedTuple):
    """What a device does at most in a second."""

    flops: float  # FLOP/s of matrix products
    bandwidth: float  # bytes/s
    source: str  # "published, bfloat16", or how it was measured


def peak_of(device: jax.Device, dtype: str) -> Peak:
    """The peak of a device: published for bfloat16 whatever `dtype` a program has, as MFU is usually given, or measured
    in this dtype."""
    found = None if device.platform == "cpu" else published(device.device_kind)
    return found or _measured(device, dtype)


def published(device_kind: str) -> Peak | None:
    """A device's peak as its vendor states it, for bfloat16."""
    for pattern, flops, bandwidth in PUBLISHED:
        if re.search(pattern, device_kind, re.IGNORECASE):
            return Peak(flops, bandwidth, "published, bfloat16")
    return None


@functools.cache
def _measured(device: jax.Device, dtype: str) -> Peak:
    """The fastest of several products and sums, so that what else the machine does matters little.

    Nothing is written: on a CPU new pages for the result take several times as long as the memory traffic.
    """
    matrix = jax.device_put(jnp.ones((MATRIX, MATRIX), dtype), device)
    summed = jax.device_put(jnp.ones(READ // 4, jnp.float32), device)
    flops = 2 * MATRIX**3 / _fastest(jax.jit(lambda x: x @ x), matrix)
    return Peak(flops, READ / _fastest(jax.jit(jnp.sum), summed), f"measured, {dtype}")


def _fastest(run: jax.stages.Wrapped, x: jax.Array) -> float:
    """Seconds of the fastest of 10 calls behind a first one that compiles."""
    times = []
    for _ in range(11):
        began = time.perf_counter()
        run(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times[1:])
