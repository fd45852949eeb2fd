"""Layers against their definitions, in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.models.layers import RMSNorm, attend, dense, dropout, layer_norm, split_key

RNG = np.random.default_rng(0)


def test_norms() -> None:
    x, scale, bias = RNG.normal(size=(2, 3, 8)), RNG.normal(size=8), RNG.normal(size=8)
    rms = RMSNorm(1e-6).apply({"params": {"scale": jnp.asarray(scale, jnp.float32)}}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(rms, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale, rtol=0, atol=1e-5)
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(layer_norm(params, jnp.asarray(x, jnp.float32), 1e-5), expected, rtol=0, atol=1e-5)


def test_attention_with_scale_and_bias() -> None:
    query, key, value = RNG.normal(size=(2, 3, 2, 4)), RNG.normal(size=(2, 5, 2, 4)), RNG.normal(size=(2, 5, 2, 4))
    bias = RNG.normal(size=(1, 2, 3, 5))
    scores = np.einsum("bqhk,bshk->bhqs", query, key) * 0.5 + bias
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    ours = attend(*(jnp.asarray(a, jnp.float32) for a in (query, key, value, bias)), scale=0.5)
    np.testing.assert_allclose(ours, np.einsum("bhqs,bshk->bqhk", weights, value), rtol=0, atol=1e-5)


def test_dropout_keeps_the_mean_and_is_the_identity_without_a_key() -> None:
    x = jnp.ones((100, 100))
    assert dropout(x, 0.25, None) is x
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(dropped.mean() - 1) < 0.03


def test_split_key_passes_evaluation_on() -> None:
    assert split_key(None, 3) == [None, None, None]
    first, second = split_key(jax.random.key(0), 2)
    assert not np.array_equal(jax.random.key_data(first), jax.random.key_data(second))


def test_dense_computes_in_the_dtype_asked_for() -> None:
    params = {"kernel": jnp.ones((4, 2)), "bias": jnp.full((2,), 0.5)}
    y = dense(params, jnp.ones((3, 4)), jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 4.5)
