"""Inverter and corrector: decoding step by step = teacher forcing, with every option on; and their options."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.decode.state import Cache
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.inverter import EmbeddingToText, Inverter
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import shift_right

T5 = T5Config(
    vocab_size=20,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    dropout_rate=0.0,
)
PLAIN = ModelConfig(t5=T5, embedding_width=6, num_pseudo_tokens=3, max_length=5)
OPTIONS = dataclasses.replace(PLAIN, standardize=True, bag_of_words=True)
B = 3
Network = type[EmbeddingToText]
each = pytest.mark.parametrize("network", [Inverter, Corrector])


@functools.cache
def init(network: Network, config: ModelConfig) -> Params:
    return jax.jit(network(config).init_params)(jax.random.key(0))


@functools.cache
def logits_of(network: Network, config: ModelConfig) -> Callable[..., jax.Array]:
    run = jax.jit(network(config).apply)
    return lambda params, *inputs: run({"params": params}, *inputs)


def make(network: Network, config: ModelConfig) -> tuple[Params, list[jax.Array], jax.Array]:
    """Parameters of which none is 0 or 1, inputs, labels [B, L]."""
    rng = np.random.default_rng(0)
    params = init(network, config)
    params = jax.tree.map(
        lambda p: jnp.asarray(np.asarray(p) + 0.1 * np.abs(rng.normal(size=p.shape)), jnp.float32), params
    )
    e, e_hat = (jnp.asarray(rng.normal(size=(B, config.embedding_width)), jnp.float32) for _ in range(2))
    hypothesis = jnp.asarray([[5, 6, 7, 8, 1], [9, 1, 0, 0, 0], [3, 4, 1, 0, 0]], jnp.int32)
    inputs = [e] if network is Inverter else [e, hypothesis, e_hat]
    return params, inputs, jnp.asarray(rng.integers(2, 20, (B, config.max_length)), jnp.int32)


@each
@pytest.mark.parametrize("config", [PLAIN, OPTIONS], ids=["plain", "options"])
def test_steps_equal_teacher_forcing(network: Network, config: ModelConfig) -> None:
    params, inputs, labels = make(network, config)

    @jax.jit
    def stepwise(params: Params) -> jax.Array:
        tokens_to_logits, cache = network(config).start_decoding(params, *inputs, num_beams=2)
        ids = jnp.repeat(shift_right(labels), 2, axis=0)

        def step(cache: Cache, x: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
            logits, cache = tokens_to_logits(x[0], cache, x[1])
            return cache, logits

        return jnp.swapaxes(jax.lax.scan(step, cache, (ids.T, jnp.arange(config.max_length)))[1], 0, 1)

    full = logits_of(network, config)(params, *inputs, labels)
    np.testing.assert_allclose(stepwise(params), np.repeat(full, 2, axis=0), rtol=1e-5, atol=1e-5)


@each
def test_options_at_their_start_change_nothing(network: Network) -> None:
    """Zero mean, unit deviation and a zero bag of words are the original's maths."""
    params, inputs, labels = make(network, PLAIN)
    fresh = init(network, OPTIONS)
    ours = logits_of(network, OPTIONS)({**fresh, **params}, *inputs, labels)
    np.testing.assert_allclose(ours, logits_of(network, PLAIN)(params, *inputs, labels), rtol=1e-6, atol=1e-6)


@each
def test_statistics_are_no_parameters(network: Network) -> None:
    params, inputs, labels = make(network, OPTIONS)
    gradient = jax.grad(lambda p: jnp.mean(jnp.square(logits_of(network, OPTIONS)(p, *inputs, labels))))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.pop("statistics")))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_standardized_inverter_sees_standardized_vectors() -> None:
    config = dataclasses.replace(PLAIN, standardize=True)
    params, (e,), labels = make(Inverter, config)
    mean, std = params["statistics"]["mean"], params["statistics"]["std"]
    plain = logits_of(Inverter, PLAIN)(params, (e - mean[None]) / std[None], labels)
    np.testing.assert_allclose(logits_of(Inverter, config)(params, e, labels), plain, rtol=1e-5, atol=1e-5)


def test_hypothesis_padding_counts_for_nothing() -> None:
    params, (e, hypothesis, e_hat), labels = make(Corrector, PLAIN)
    longer = jnp.pad(hypothesis, ((0, 0), (0, 3)))
    ours = logits_of(Corrector, PLAIN)(params, e, longer, e_hat, labels)
    expected = logits_of(Corrector, PLAIN)(params, e, hypothesis, e_hat, labels)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
