"""Layers shared by the transformer stacks: normalisation, dropout, attention with an explicit cache, projections.

Modules are thin Flax linen; what is stacked, scanned or cached is decided by the stacks that call them.
Parameters are float32; `dtype` is the dtype of the arithmetic. Softmax and normalisation statistics are
float32 whatever `dtype` is.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Params = dict[str, Any]
NEGATIVE = -1e9  # added to masked attention scores: finite, so a fully masked row stays finite (and is ignored)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity when `key` is None (evaluation) or the rate is 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def split_key(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """`num` independent keys, or `num` times None, so that callers need no special case for evaluation."""
    return [None] * num if key is None else list(jax.random.split(key, num))


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias (Raffel et al. 2020, section 2.1; Zhang and Sennrich 2019)."""

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        scale = jnp.expand_dims(scale, range(x.ndim - 1))
        return (x * jax.lax.rsqrt(variance + self.epsilon) * scale).astype(self.dtype)


def layer_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last axis with weight `scale` and `bias`, statistics and result in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon) * params["scale"].reshape(shape) + params["bias"].reshape(
        shape
    )


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """x [..., in] @ kernel [in, out] with operands and result in `dtype`, summed in float32."""
    return matmul_float32(x, kernel, dtype).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul_float32(x: jax.Array, kernel: jax.Array, dtype: Any, transposed: bool = False) -> jax.Array:
    """x [..., in] @ kernel [in, out] (`transposed`: [out, in]): operands in `dtype`, sums and result in float32.

    The gradient's products take their operands in `dtype` too. Left to itself, differentiation would multiply float32
    gradients with `dtype` weights, at half the speed or less wherever `dtype` has units of its own, CPUs included.
    """
    return _contract("...i,oi->...o" if transposed else "...i,io->...o", x.astype(dtype), kernel.astype(dtype))


def _contract(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _matmul_forward(x: jax.Array, kernel: jax.Array, dtype: Any, transposed: bool) -> tuple[jax.Array, Any]:
    # The backward pass needs the rounded operands; the empty arrays remember the dtypes that gradients must have.
    rounded = x.astype(dtype), kernel.astype(dtype)
    return matmul_float32(*rounded, dtype, transposed), (*rounded, jnp.zeros(0, x.dtype), jnp.zeros(0, kernel.dtype))


def _matmul_backward(dtype: Any, transposed: bool, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like_x, like_kernel = kept
    g = g.astype(dtype)
    dx = _contract("...o,oi->...i" if transposed else "...o,io->...i", g, kernel)
    # Summed over all leading axes as they stand: merged by a reshape first, this takes twice as long on CPUs.
    axes = tuple(range(x.ndim - 1))
    left, right = (g, x) if transposed else (x, g)
    dkernel = jax.lax.dot_general(left, right, ((axes, axes), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(like_x.dtype), dkernel.astype(like_kernel.dtype)


matmul_float32.defvjp(_matmul_forward, _matmul_backward)


def dense(params: Params, x: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """x @ kernel (+ bias) for a kernel [in, out], computed in `dtype`."""
    y = matmul(x, params["kernel"], dtype)
    if "bias" in params:
        y = y + params["bias"].astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


def init_dense(key: jax.Array, num_in: int, num_out: int, *, bias: bool = True, stddev: float | None = None) -> Params:
    """A kernel from N(0, stddev^2), by default 1/sqrt(num_in), and a zero bias."""
    stddev = num_in**-0.5 if stddev is None else stddev
    params = {"kernel": stddev * jax.random.normal(key, (num_in, num_out), jnp.float32)}
    if bias:
        params["bias"] = jnp.zeros((num_out,), jnp.float32)
    return params


def init_layer_norm(width: int) -> Params:
    return {"scale": jnp.ones((width,), jnp.float32), "bias": jnp.zeros((width,), jnp.float32)}


def attend(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B S H K"],
    value: Float[Array, "B S H K"],
    bias: Float[Array, "#B #H #Q S"] | None,  # float32
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    scale: float = 1.0,
) -> Float[Array, "B Q H K"]:
    """Multi-head attention; scores and softmax in float32. T5 does not scale (scale = 1)."""
    scores = jnp.einsum("bqhk,bshk->bhqs", query, key, preferred_element_type=jnp.float32)
    if scale != 1.0:
        scores = scores * scale
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = dropout(weights, dropout_rate, dropout_key)
    return jnp.einsum("bhqs,bshk->bqhk", weights, value)


class AttentionProjections(nn.Module):
    """An attention block's four matrices, without bias (T5); `query`, `key_value` and `out` are called one by one."""

    d_model: int
    num_heads: int
    d_kv: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        inner = self.num_heads * self.d_kv
        # T5's initialisation folds the missing 1/sqrt(K) of the scores into q.
        self.q_kernel = self.param(
            "q", nn.initializers.normal((self.d_model * self.d_kv) ** -0.5), (self.d_model, inner)
        )
        self.k_kernel = self.param("k", nn.initializers.normal(self.d_model**-0.5), (self.d_model, inner))
        self.v_kernel = self.param("v", nn.initializers.normal(self.d_model**-0.5), (self.d_model, inner))
        self.o_kernel = self.param("o", nn.initializers.normal(inner**-0.5), (inner, self.d_model))

    def _heads(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = matmul(x, kernel, self.dtype)
        return y.reshape(*x.shape[:-1], self.num_heads, self.d_kv)

    def query(self, x: jax.Array) -> jax.Array:
        """[B, Q, D] -> [B, Q, H, K]"""
        return self._heads(x, self.q_kernel)

    def key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] -> two of [B, S, H, K]"""
        return self._heads(x, self.k_kernel), self._heads(x, self.v_kernel)

    def out(self, x: jax.Array) -> jax.Array:
        """[B, Q, H, K] -> [B, Q, D]"""
        merged = x.reshape(*x.shape[:-2], self.num_heads * self.d_kv)
        return matmul(merged, self.o_kernel, self.dtype)


class FeedForward(nn.Module):
    """T5's feed-forward: ReLU (v1.0) or gated tanh-GELU (v1.1; Shazeer 2020)."""

    d_ff: int
    kind: str
    dropout_rate: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        d_model = x.shape[-1]
        init_in = nn.initializers.normal(d_model**-0.5)

        def project(name: str) -> jax.Array:
            return matmul(x, self.param(name, init_in, (d_model, self.d_ff)), self.dtype)

        if self.kind == "relu":
            hidden = jax.nn.relu(project("wi"))
        else:
            hidden = jax.nn.gelu(project("wi_0"), approximate=True) * project("wi_1")
        hidden = dropout(hidden, self.dropout_rate, dropout_key)
        wo = self.param("wo", nn.initializers.normal(self.d_ff**-0.5), (self.d_ff, d_model))
        return matmul(hidden, wo, self.dtype)
