"""Layers shared by the transformer stacks: normalization, dropout, attention with an explicit cache, projections.

Modules are thin Flax linen; what is stacked, scanned or cached is decided by the stacks that call them.
Parameters are float32; `dtype` is the dtype of the arithmetic. Softmax and normalization statistics are
float32 whatever `dtype` is.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
PRODUCT = "product with weights"
NEGATIVE = -1e9  # added to masked attention scores: finite, so a fully masked row stays finite (and is ignored)

# Rules for PARAM_AXES tables: stacked layers' attention (`self_attention`) and gated feed-forward, without biases.
ATTENTION_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"layers/(query|key|value)/kernel", ("layers", "embed", "heads")),
    (r"layers/attention_out/kernel", ("layers", "heads", "embed")),
)
GATED_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"layers/(gate|up)/kernel", ("layers", "embed", "mlp")),
    (r"layers/down/kernel", ("layers", "mlp", "embed")),
)


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
        return rms_norm({"scale": scale}, x, self.epsilon).astype(self.dtype)


def rms_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm over the last axis with weight `scale`, statistics and result in float32."""
    x = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    scale = jnp.expand_dims(params["scale"], range(x.ndim - 1))
    return x * jax.lax.rsqrt(variance + epsilon) * scale


def layer_norm(params: Params, x: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm over the last axis with weight `scale` (and `bias`), statistics and result in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    shape = (1,) * (x.ndim - 1) + (-1,)
    y = (x - mean) * jax.lax.rsqrt(variance + epsilon) * params["scale"].reshape(shape)
    return y + params["bias"].reshape(shape) if "bias" in params else y


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    """x [..., in] @ kernel [in, out] with operands and result in `dtype`, summed in float32."""
    # By this name rematerialization knows what to keep: it doesn't see products inside a custom gradient.
    return checkpoint_name(matmul_float32(x, kernel, dtype).astype(dtype), PRODUCT)


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


def init_norm(width: int, *, bias: bool = True) -> Params:
    params = {"scale": jnp.ones((width,), jnp.float32)}
    if bias:
        params["bias"] = jnp.zeros((width,), jnp.float32)
    return params


def init_table(key: jax.Array, rows: int, width: int) -> jax.Array:
    """An embedding table from N(0, 0.02^2)."""
    return 0.02 * jax.random.normal(key, (rows, width), jnp.float32)


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


def mask_bias(mask: Int[Array, "B S"]) -> Float[Array, "B 1 1 S"]:
    """A mask of 0 and 1 -> what to add to attention scores."""
    return jnp.where(mask[:, None, None, :] != 0, 0.0, NEGATIVE).astype(jnp.float32)


def reach_bias(length: int, *, causal: bool, reach: int | None = None) -> Float[Array, "1 1 {length} {length}"]:
    """What to add to scores so that a token sees those at most `reach` away, and none after it where `causal`."""
    ahead = np.arange(length)[None, :] - np.arange(length)[:, None]
    hidden = np.zeros_like(ahead, bool) if reach is None else np.abs(ahead) > reach
    hidden |= (ahead > 0) & causal
    return jnp.asarray(np.where(hidden, NEGATIVE, 0.0), jnp.float32)[None, None]


def rotary(length: int, head_width: int, theta: float) -> tuple[Float[Array, "L K"], Float[Array, "L K"]]:
    """Cosines and sines of rotary position embedding (Su et al. 2021), both halves of a head alike (GPT-NeoX)."""
    # float32 throughout, as the public implementations: theirs is what the weights were trained with.
    frequency = 1 / np.float32(theta) ** (np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width))
    angle = np.arange(length, dtype=np.float32)[:, None] * np.concatenate([frequency, frequency])[None]
    return jnp.cos(jnp.asarray(angle)), jnp.sin(jnp.asarray(angle))


def rotate(x: Float[Array, "B L H K"], cos: Float[Array, "L K"], sin: Float[Array, "L K"]) -> Float[Array, "B L H K"]:
    """Turns queries or keys by their positions, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos[None, :, None] + turned * sin[None, :, None]).astype(x.dtype)


def self_attention(
    params: Params,
    x: Float[Array, "B L D"],
    bias: Float[Array, "#B #H #L L"],
    num_heads: int,
    dtype: Any,
    *,
    turn: tuple[jax.Array, jax.Array] | None = None,
    norm: Callable[[Params, jax.Array], jax.Array] | None = None,
    scale: float | None = None,
) -> Float[Array, "B L D"]:
    """Self-attention of a layer with dense parameters `query`, `key`, `value`, `attention_out`.

    Args:
        bias: added to the scores: masks, relative positions.
        turn: see `rotary`.
        norm: of each head's queries and keys, by `query_norm` and `key_norm`.
        scale: of the scores, by default 1/sqrt(K). Keys and values may have fewer heads: each serves several queries.
    """
    query = dense(params["query"], x, dtype).reshape(*x.shape[:-1], num_heads, -1)
    key, value = (dense(params[m], x, dtype).reshape(*x.shape[:-1], -1, query.shape[-1]) for m in ("key", "value"))
    if norm is not None:
        query, key = norm(params["query_norm"], query).astype(dtype), norm(params["key_norm"], key).astype(dtype)
    if turn is not None:
        query, key = rotate(query, *turn), rotate(key, *turn)
    key, value = (jnp.repeat(a, num_heads // a.shape[2], axis=2) for a in (key, value))
    h = attend(query, key, value, bias, scale=query.shape[-1] ** -0.5 if scale is None else scale)
    return dense(params["attention_out"], h.reshape(*x.shape[:-1], -1), dtype)


def init_attention(
    key: jax.Array, width: int, inner: int | None = None, key_value: int | None = None, *, bias: bool = True
) -> Params:
    """Parameters of `self_attention`; `inner` is heads x K, `key_value` the same of keys and values."""
    inner = inner or width
    sizes = {"query": inner, "key": key_value or inner, "value": key_value or inner}
    keys = jax.random.split(key, 4)
    params = {name: init_dense(k, width, size, bias=bias) for k, (name, size) in zip(keys, sizes.items(), strict=False)}
    return {**params, "attention_out": init_dense(keys[3], inner, width, bias=bias)}


def gated_feed_forward(params: Params, x: jax.Array, activation: Callable, dtype: Any) -> jax.Array:
    """down(activation(gate(x)) * up(x)) (Shazeer 2020)."""
    return dense(params["down"], activation(dense(params["gate"], x, dtype)) * dense(params["up"], x, dtype), dtype)


def init_gated_feed_forward(key: jax.Array, width: int, inner: int) -> Params:
    keys = jax.random.split(key, 3)
    return {
        "gate": init_dense(keys[0], width, inner, bias=False),
        "up": init_dense(keys[1], width, inner, bias=False),
        "down": init_dense(keys[2], inner, width, bias=False),
    }


class AttentionProjections(nn.Module):
    """An attention block's four matrices, without bias (T5); `query`, `key_value` and `out` are called one by one."""

    d_model: int
    num_heads: int
    d_kv: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        inner = self.num_heads * self.d_kv
        # T5's initialization folds the missing 1/sqrt(K) of the scores into q.
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
