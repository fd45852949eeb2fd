"""Layers against their definitions, in float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v2t_jax.models.layers import (
    Attention,
    Dense,
    Dropout,
    GemmaNorm,
    LayerNorm,
    attend_cached,
    for_one_query,
    matmul_float32,
)

RNG = np.random.default_rng(0)


def run(module: Any, params: Any, *inputs: Any, **options: Any) -> jax.Array:
    params, inputs = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, inputs))
    return module.apply({"params": params}, *inputs, **options)


def test_norms() -> None:
    x, scale, bias = RNG.normal(size=(2, 3, 8)), RNG.normal(size=8), RNG.normal(size=8)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)
    np.testing.assert_allclose(run(GemmaNorm(1e-6), {"scale": scale}, x), expected, rtol=0, atol=1e-5)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    ours = run(LayerNorm(epsilon=1e-5), {"scale": scale, "bias": bias}, x)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def by_definition(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray, scale: float) -> np.ndarray:
    scores = np.einsum("bqhk,bshk->bhqs", query, key) * scale + bias
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.einsum("bhqs,bshk->bqhk", weights, value)


@pytest.mark.parametrize("groups", [4, 2], ids=["heads of their own", "two heads share keys and values"])
def test_attention_with_scale_and_bias(groups: int) -> None:
    x, attended, bias = RNG.normal(size=(2, 3, 6)), RNG.normal(size=(2, 5, 6)), RNG.normal(size=(1, 4, 3, 5))
    shapes = {"query": (6, 8), "key": (6, 2 * groups), "value": (6, 2 * groups), "attention_out": (8, 6)}
    params = {name: {"kernel": RNG.normal(size=shape)} for name, shape in shapes.items()}
    query = (x @ params["query"]["kernel"]).reshape(2, 3, 4, 2)
    key, value = (
        np.repeat((attended @ params[name]["kernel"]).reshape(2, 5, groups, 2), 4 // groups, axis=2)
        for name in ("key", "value")
    )
    expected = by_definition(query, key, value, bias, 0.5).reshape(2, 3, 8) @ params["attention_out"]["kernel"]
    ours = run(Attention(6, 4, 2, groups, scale=0.5), params, x, attended, bias)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_attention_to_cached_keys() -> None:
    query, key, value = (RNG.normal(size=(2, n, 2, 4)) for n in (1, 5, 5))
    bias = RNG.normal(size=(1, 2, 1, 5))
    cached = for_one_query(jnp.asarray(key, jnp.float32), jnp.asarray(value, jnp.float32))
    ours = attend_cached(jnp.asarray(query, jnp.float32), *cached, jnp.asarray(bias, jnp.float32))
    np.testing.assert_allclose(ours, by_definition(query, key, value, bias, 1.0), rtol=0, atol=1e-5)


def test_dropout_keeps_the_mean_and_is_the_identity_without_a_key() -> None:
    x = jnp.ones((100, 100))
    assert Dropout(0.25).apply({}, x) is x
    dropped = np.asarray(Dropout(0.25).apply({}, x, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(dropped.mean() - 1) < 0.03


def test_dense_computes_in_its_dtype_and_gives_kernels_float32_gradients() -> None:
    params = {"kernel": jnp.full((4, 2), 1.001), "bias": jnp.full((2,), 0.5)}
    y = run(Dense(2, dtype=jnp.bfloat16), params, jnp.ones((3, 4)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), 4.5)
    x = jnp.asarray([[1.0], [1 / 256], [1 / 256]], jnp.bfloat16)
    loss = lambda p: jnp.sum(Dense(1, dtype=jnp.bfloat16).apply({"params": p}, x))  # noqa: E731
    gradient = jax.grad(loss)({"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)})["kernel"]
    assert float(gradient[0, 0]) == 1 + 2 / 256  # in bfloat16 it would be rounded to 1 + 1/128 or 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("wide_in", "wide_out"), [(3, 5), (5, 3)])
def test_the_gradient_of_a_product_is_its_own(wide_in: int, wide_out: int, transposed: bool) -> None:
    """For all ways in which its operands may come first."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = jax.random.normal(keys[0], (2, 4, wide_in)), jax.random.normal(keys[1], (2, 4, wide_out))
    kernel = jax.random.normal(keys[2], (wide_out, wide_in) if transposed else (wide_in, wide_out))
    found = jax.vjp(lambda x, kernel: matmul_float32(x, kernel, jnp.float32, transposed), x, kernel)[1](g)
    dx = np.einsum("blo,oi->bli" if transposed else "blo,io->bli", g, kernel)
    dkernel = np.einsum("blo,bli->oi" if transposed else "blo,bli->io", g, x)
    np.testing.assert_allclose(found[0], dx, atol=1e-5)
    np.testing.assert_allclose(found[1], dkernel, atol=1e-5)
