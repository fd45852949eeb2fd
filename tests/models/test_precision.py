"""float32 is float32 on accelerators too: every product of a float32 network asks for the highest precision."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.models.test_param_trees import BERT, CASES, MODEL, OPTIONS
from v2t_jax.decode.sample import greedy
from v2t_jax.models.embedder import EmbedderConfig, EmbedderNetwork
from v2t_jax.models.encoders import TextEncoder
from v2t_jax.models.inverter import Inverter


def products(function: Callable, *inputs: Any) -> list[str]:
    """The matrix products of the lowered program."""
    found = [line for line in jax.jit(function).lower(*inputs).as_text().splitlines() if "dot_general" in line]
    assert found
    return found


def is_highest(line: str) -> bool:
    return "precision = [HIGHEST, HIGHEST]" in line


@pytest.mark.parametrize("name", [name for name in CASES if name != "static"])  # which has no products
def test_networks(name: str) -> None:
    network = CASES[name]
    lines = products(network.apply, {"params": network.abstract_params()}, *network.examples())
    assert all(map(is_highest, lines)), lines


def test_embedder_with_dense_layers() -> None:
    config = EmbedderConfig(dataclasses.replace(BERT, pooler=True), "pooler", dense=("tanh",), width=6)
    dense = [{"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}]
    params = {"encoder": TextEncoder(config.encoder).abstract_params(), "dense": dense}
    ids = jnp.ones((2, 5), jnp.int32)
    assert all(map(is_highest, products(EmbedderNetwork(config).apply, {"params": params}, ids, ids)))


def test_gradients_and_decoding() -> None:
    network = Inverter(OPTIONS)
    e, ids = jnp.zeros((2, 6)), jnp.ones((2, 4), jnp.int32)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(network.apply({"params": params}, e, ids))

    def decode(params: Any) -> jax.Array:
        return greedy(*network.start_decoding(params, e), batch_size=2, max_length=4).ids

    for function in (jax.grad(loss), decode):
        assert all(map(is_highest, products(function, network.abstract_params())))


def test_bfloat16_keeps_the_default() -> None:
    network = Inverter(dataclasses.replace(MODEL, t5=dataclasses.replace(MODEL.t5, dtype="bfloat16")))
    lines = products(network.apply, {"params": network.abstract_params()}, *network.examples())
    assert not any(map(is_highest, lines))
