"""What a measurement says of its work: FLOPs, which XLA's count bears out, peaks, and the share of them."""

import dataclasses
import functools
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from v2t_jax.bench import measure
from v2t_jax.bench.chart import plot
from v2t_jax.bench.measure import Program, Turn, compile_program, row_of
from v2t_jax.bench.peaks import Peak, peak_of, published
from v2t_jax.bench.roofline import work
from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.errors import InputError
from v2t_jax.models.embedder import EmbedderConfig, EmbedderNetwork, embed
from v2t_jax.models.encoders import BertConfig, encoder_network
from v2t_jax.models.inverter import Inverter
from v2t_jax.train.step import cross_entropy

T5 = T5Config(256, 128, 32, 512, 4, 2, 2, dropout_rate=0.0)


def losses(config: ModelConfig, params: Any, e: jax.Array, ids: jax.Array) -> jax.Array:
    return cross_entropy(Inverter(config).apply({"params": params}, e, ids), ids)[0]


def inverter(t5: T5Config, gradient: bool) -> Program:
    """An inverter's loss, or its gradient, of 8 texts of 16 tokens."""
    config = ModelConfig(t5=t5, embedding_width=64, num_pseudo_tokens=8, max_length=16, projection_dropout=0.0)
    given = Inverter(config).abstract_params(), jnp.ones((8, 64)), jnp.ones((8, 16), jnp.int32)
    run = functools.partial(losses, config)
    return compile_program(jax.jit(jax.grad(run) if gradient else run), *given)


@pytest.mark.parametrize("gradient", [False, True])
def test_our_count_of_a_t5_is_xlas_but_for_elementwise_operations(gradient: bool) -> None:
    """With layers unrolled: XLA counts the body of a loop once, and what isn't a matrix product too."""
    found = inverter(dataclasses.replace(T5, scan_unroll=2), gradient)
    assert found.flops == pytest.approx(found.xla_flops, rel=0.03)
    looped = inverter(T5, gradient)
    assert looped.flops == found.flops and looped.xla_flops is not None and looped.xla_flops < 0.75 * looped.flops


def test_our_count_of_an_encoder_is_xlas_but_for_elementwise_operations() -> None:
    config = EmbedderConfig(BertConfig(256, 768, 1, 12, 3072, 32), width=768)  # one layer: a loop of one turn
    params, ids = {"encoder": encoder_network(config.encoder).abstract_params()}, jnp.ones((4, 32), jnp.int32)
    # Most of the rest is GELU's erf, some 40 operations for each of 3,072 hidden units.
    found = compile_program(jax.jit(embed, static_argnums=0), config, params, ids, ids)
    assert found.flops is not None and found.xla_flops is not None
    assert 0.97 * found.xla_flops < found.flops < found.xla_flops


@pytest.mark.parametrize(
    ("kind", "flops", "bandwidth"),
    [
        ("TPU v4", 275e12, 1228e9),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5e", 197e12, 819e9),
        ("TPU v5", 459e12, 2765e9),
        ("TPU v5p", 459e12, 2765e9),
        ("TPU v6 lite", 918e12, 1640e9),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1555e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
        ("NVIDIA A100 80GB PCIe", 312e12, 1935e9),
        ("NVIDIA H100 80GB HBM3", 989e12, 3350e9),
        ("NVIDIA H100 PCIe", 756e12, 2000e9),
        ("NVIDIA H100 NVL", 835e12, 3900e9),
        ("NVIDIA H200", 989e12, 4800e9),
        ("NVIDIA B200", 2250e12, 8000e9),
    ],
)
def test_peaks_by_device_kind(kind: str, flops: float, bandwidth: float) -> None:
    assert published(kind) == Peak(flops, bandwidth, "published, bfloat16")


def test_other_devices_are_measured_in_the_dtype() -> None:
    assert published("cpu") is None and published("NVIDIA L4") is None
    found = peak_of(jax.devices()[0], "bfloat16")
    assert found.source == "measured, bfloat16" and 1e8 < found.flops < 1e14 and 1e8 < found.bandwidth < 1e13


def test_a_row_says_what_share_of_the_peak_it_reaches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peak = Peak(8e12, 1e12, "published, bfloat16")
    monkeypatch.setattr(measure, "peak_of", lambda device, dtype: peak)
    walls = [1.0, 5.0, 2.0, 3.0, 9.0]
    turns = [Turn(wall, 2 * wall) for wall in walls]
    row = row_of("work", turns, 6, 60, Program(None, 0.5, flops=6e12, moved=3e10, xla_flops=5e12, needed=4 * 10**9))
    assert (row.seconds, row.cpu_seconds, row.spread) == (statistics.median(walls), 6, 3.0)
    assert (row.sequences_per_second, row.tokens_per_second) == (2, 20)
    assert (row.tflops_per_second, row.mfu, row.compile_seconds) == (2.0, 0.25, 0.5)
    assert "6,000.0 GFLOP a call, 2 TFLOP/s, 25.0% of 8 (published, bfloat16)" in str(row)
    assert "device memory: the program needs 4.00 GB" in str(row)
    unknown = row_of("work", turns, 6, None, Program(None, 0.5, None, None, 5e12, 0))
    assert (unknown.mfu, unknown.compile_seconds, unknown.tokens_per_second) == (None, 0.5, None)
    plot([row, unknown], tmp_path / "roof.svg")
    assert "peak, published, bfloat16" in (tmp_path / "roof.svg").read_text()
    with pytest.raises(InputError, match="nothing to plot"):
        plot([unknown], tmp_path / "none.svg")


def test_the_largest_batch_is_the_last_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, asked = {"bytes_limit": 1000}, []
    device = SimpleNamespace(memory_stats=lambda: limit, device_kind="toaster")
    monkeypatch.setattr(jax, "devices", lambda: [device])

    def compiled(size: int) -> Program:
        asked.append(size)
        if size > 64:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory")
        return Program(None, 0.5, None, None, None, needed=100 * size)

    size, program = measure.largest_batch(compiled, 2)
    assert (size, program.needed) == (8, 800) and asked == [2, 4, 8, 16]
    with pytest.raises(InputError, match="batch_size 16 doesn't fit 0.00 GB; give a smaller one"):
        measure.largest_batch(compiled, 16)
    limit["bytes_limit"] = 10**9
    assert measure.largest_batch(compiled, 2)[0] == 64

    def broken(size: int) -> Program:
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure.largest_batch(broken, 2)
    limit.clear()
    with pytest.raises(InputError, match="kind toaster doesn't tell its memory's limit: give the batch size yourself"):
        measure.largest_batch(compiled, 2)


def test_a_program_needs_what_it_is_given_gives_and_keeps() -> None:
    needed = compile_program(jax.jit(lambda x: x + 1), jnp.ones((256, 1024))).needed  # of 1 MiB each
    assert needed is not None and 2 << 20 <= needed < 3 << 20


def test_parts_of_an_embedders_batch_are_a_cpus_alone() -> None:
    """Compared with the count of the network, which is that of TPUs: its weights are read once."""
    config = EmbedderConfig(BertConfig(100, 32, 1, 2, 64, 128), width=32)
    params = {"encoder": encoder_network(config.encoder).init_params(jax.random.key(0)), "dense": []}
    ids = jnp.ones((64, 64), jnp.int32)
    whole = jax.make_jaxpr(lambda *given: EmbedderNetwork(config).apply({"params": given[0]}, *given[1:]))
    parts = jax.make_jaxpr(functools.partial(embed, config))
    assert "platform_index" in str(parts(params, ids, ids))
    assert work(parts(params, ids, ids).jaxpr).tolist() == work(whole(params, ids, ids).jaxpr).tolist()
