"""Layers that T5 and the text encoders share: dense, norms, dropout, positions, attention, feed-forward.

Parameters are float32; `dtype` is the dtype of the arithmetic. Softmax and norm statistics are float32 in any dtype.
Float32 products are computed in full float32 on accelerators too, where JAX's default precision is lower.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
Tokens = Int[Array, "B L"] | Float[Array, "B L D"]  # ids, or what stands in a table of embeddings at them
AxesTable = tuple[tuple[str, tuple[str | None, ...]], ...]  # parameter path, a regex -> logical axis names
MATMUL_OUTPUT = "matmul output"
TRANSPOSED = "_transposed"  # behind the name of a kernel that is kept [out, in]
MASKED = -1e9  # added to masked attention scores: finite, so a fully masked row stays finite (and is ignored)


class Network(nn.Module):
    """A network as the rest of the package sees it: parameters from a key, and their table of axes for sharding."""

    PARAM_AXES: ClassVar[AxesTable] = ()

    if TYPE_CHECKING:  # flax's own result type is a union over all options of `apply`

        def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...

    @nn.nowrap
    def examples(self) -> tuple[Any, ...]:
        """Small inputs of `__call__`; by default ids and mask."""
        return jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)

    @nn.nowrap
    def init_params(self, key: jax.Array) -> Params:
        """Random parameters, float32."""
        return self.init(key, *self.examples())["params"]

    @nn.nowrap
    def abstract_params(self) -> Params:
        """Shapes of all parameters; nothing is allocated."""
        return jax.eval_shape(lambda: self.init_params(jax.random.key(0)))


def unstack_layers(stack: Params, transposed: bool = False) -> Params:
    """A stack's parameters with a list of its layers', each with arrays of its own; a scan copies them at each use.

    If `transposed`, kernels that aren't square are kept [out, in]: a CPU multiplies few rows with those faster.
    """
    stacked = stack["layers"]
    if isinstance(stacked, list):
        return stack
    kept = _transposed if transposed else dict
    count = len(jax.tree.leaves(stacked)[0])
    return {**stack, "layers": [kept(jax.tree.map(lambda p, i=i: p[i], stacked)) for i in range(count)]}


def _transposed(params: Params) -> Params:
    def item(name: str, p: Any) -> tuple[str, Any]:
        if isinstance(p, dict):
            return name, _transposed(p)
        wide = p.ndim == 2 and p.shape[0] != p.shape[1]
        return (name + TRANSPOSED, jnp.transpose(p)) if wide else (name, p)

    return dict(itertools.starmap(item, params.items()))


def precision(dtype: Any) -> jax.lax.Precision | None:
    """HIGHEST for float32: the default is bfloat16 products on TPUs and TF32 on GPUs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul_float32(x: jax.Array, kernel: jax.Array, dtype: Any, transposed: bool = False) -> jax.Array:
    """x [..., in] @ kernel [in, out] (`transposed`: [out, in]): operands in `dtype`, sums and result in float32.

    The gradient's products take their operands in `dtype` too. Left to itself, differentiation would multiply float32
    gradients with `dtype` weights, at half the speed or less wherever `dtype` has units of its own, CPUs included.
    """
    return _contract("...i,oi->...o" if transposed else "...i,io->...o", x.astype(dtype), kernel.astype(dtype))


def _contract(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32, precision=precision(a.dtype))


def _matmul_forward(x: jax.Array, kernel: jax.Array, dtype: Any, transposed: bool) -> tuple[jax.Array, Any]:
    # The backward pass needs the rounded operands; the empty arrays remember the dtypes that gradients must have.
    rounded = x.astype(dtype), kernel.astype(dtype)
    return matmul_float32(*rounded, dtype, transposed), (*rounded, jnp.zeros(0, x.dtype), jnp.zeros(0, kernel.dtype))


def _matmul_backward(dtype: Any, transposed: bool, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, like_x, like_kernel = kept
    g = g.astype(dtype)
    dx = _contract("...o,oi->...i" if transposed else "...o,io->...i", g, kernel)
    # Summed over all leading axes at once: merging them by a reshape first takes twice as long on CPUs.
    axes = tuple(range(x.ndim - 1))
    # On a CPU XLA copies the first operand, so the narrower one comes first; the product may have to be transposed.
    gradient_first = g.shape[-1] < x.shape[-1]
    left, right = (g, x) if gradient_first else (x, g)
    exact = precision(g.dtype)
    dkernel = jax.lax.dot_general(
        left, right, ((axes, axes), ((), ())), preferred_element_type=jnp.float32, precision=exact
    )
    dkernel = dkernel.T if gradient_first != transposed else dkernel
    return dx.astype(like_x.dtype), dkernel.astype(like_kernel.dtype)


matmul_float32.defvjp(_matmul_forward, _matmul_backward)


class Dense(nn.Module):
    """A linear layer with operands and result in `dtype`, sums in float32 and the gradient of `matmul_float32`.

    With a `flat_name`, the kernel is a parameter of this name in the parent, as T5's parameter trees have it; see
    `inline`. It may be kept transposed, under its name and `TRANSPOSED`.
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()
    flat_name: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        name, shape = self.flat_name or "kernel", (x.shape[-1], self.features)
        transposed = self.has_variable("params", name + TRANSPOSED)
        if transposed:
            name, shape = name + TRANSPOSED, shape[::-1]
        kernel = self.param(name, self.kernel_init, shape)
        x = matmul_float32(x.astype(self.dtype), kernel, self.dtype, transposed).astype(self.dtype)
        # By this name rematerialization knows what to keep: its policies don't see products inside a custom gradient.
        x = checkpoint_name(x, MATMUL_OUTPUT)
        if not self.use_bias:
            return x
        return x + for_axes(self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype), x)


def inline(parent: nn.Module, child: Any) -> Any:
    """`child`, with its parameters in the parent's own level of the tree."""
    nn.share_scope(parent, child)
    return child


def look_up(table: jax.Array, ids: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Rows of an embedding table [V, D]: ids [...] -> [..., D]."""
    return jnp.take(table.astype(dtype), ids, axis=0)


def for_axes(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector [D] with as many axes as x [..., D]."""
    return jnp.expand_dims(vector, tuple(range(x.ndim - 1)))


class Dropout(nn.Dropout):
    """nn.Dropout that is active wherever `apply` gets a "dropout" rng."""

    def __call__(self, inputs: jax.Array, deterministic: bool | None = None, rng: Any = None) -> jax.Array:
        return super().__call__(inputs, deterministic=not self.has_rng("dropout"))


# Statistics and result in float32; the variance by its definition, as torch computes it.
LayerNorm = functools.partial(nn.LayerNorm, dtype=jnp.float32, use_fast_variance=False)


class GemmaNorm(nn.Module):
    """RMSNorm whose scale is stored less 1 (Gemma)."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        return nn.RMSNorm(self.epsilon, dtype=jnp.float32, use_scale=False)(x) * for_axes(scale + 1, x)


def mask_bias(mask: Int[Array, "B S"]) -> Float[Array, "B 1 1 S"]:
    """A mask of 0 and 1 -> what to add to attention scores."""
    return jnp.where(mask[:, None, None, :] != 0, 0.0, MASKED).astype(jnp.float32)


def distances(length: int) -> np.ndarray:
    """Key position less query position, [L, L]."""
    return np.arange(length)[None, :] - np.arange(length)[:, None]


def window_bias(length: int, *, causal: bool, window: int | None = None) -> Float[Array, "1 1 {length} {length}"]:
    """What to add to scores so that a token sees those at most `window` away, and none after it where `causal`."""
    ahead = distances(length)
    hidden = (ahead > 0) & causal | (np.abs(ahead) > (length if window is None else window))
    return jnp.asarray(np.where(hidden, MASKED, 0.0), jnp.float32)[None, None]


def relative_buckets(
    relative_position: np.ndarray, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Bucket of every (key position - query position): exact when near, logarithmic when far (Raffel et al. 2020)."""
    bucket, distance = np.zeros_like(relative_position), np.maximum(-relative_position, 0)
    if bidirectional:
        num_buckets //= 2
        bucket, distance = np.where(relative_position > 0, num_buckets, 0), np.abs(relative_position)
    exact = num_buckets // 2
    # float32 as in the public implementations: float64 would move distances that lie on a bucket's edge.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).astype(np.int32)
    return bucket + np.where(distance < exact, distance, np.minimum(far, num_buckets - 1))


def relative_bias(
    table: jax.Array, length: int, bidirectional: bool, num_buckets: int, max_distance: int
) -> Float[Array, "1 H {length} {length}"]:
    """What a table [buckets, H] adds to the scores of a text of this length."""
    buckets = relative_buckets(distances(length), bidirectional, num_buckets, max_distance)
    return jnp.transpose(table[buckets], (2, 0, 1))[None]


def rotary_tables(length: int, head_width: int, theta: float) -> tuple[Float[Array, "L K"], Float[Array, "L K"]]:
    """Cosines and sines of rotary position embedding (Su et al. 2021), both halves of a head alike (GPT-NeoX)."""
    # float32 throughout, as the public implementations: theirs is what the weights were trained with.
    frequency = 1 / np.float32(theta) ** (np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width))
    angle = np.arange(length, dtype=np.float32)[:, None] * np.concatenate([frequency, frequency])[None]
    return jnp.cos(jnp.asarray(angle)), jnp.sin(jnp.asarray(angle))


def rotate(x: Float[Array, "B L H K"], cos: Float[Array, "L K"], sin: Float[Array, "L K"]) -> Float[Array, "B L H K"]:
    """Rotates queries or keys by their positions, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x.astype(jnp.float32) * cos[None, :, None] + turned * sin[None, :, None]).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention; scores and softmax in float32.

    Keys and values may have fewer heads than queries: each then serves several. T5 stores its matrices as `q`, `k`, `v`
    and `o` (`flat`), does not scale scores, and folds the missing factor into the initialization of `q`.
    """

    width: int
    num_heads: int
    head_width: int
    num_key_value_heads: int | None = None
    scale: float = 1.0
    use_bias: bool = False
    flat: bool = False
    head_norm: Callable[[], nn.Module] | None = None
    """of each head's queries and keys (Qwen3, Gemma 3)"""
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        inner, std = self.num_heads * self.head_width, self.width**-0.5
        key_value = (self.num_key_value_heads or self.num_heads) * self.head_width
        self.query = self._dense("q", inner, std * self.head_width**-0.5 if self.scale == 1.0 else std)
        self.key, self.value = self._dense("k", key_value, std), self._dense("v", key_value, std)
        self.attention_out = self._dense("o", self.width, inner**-0.5)
        if self.flat:
            for child in (self.query, self.key, self.value, self.attention_out):
                inline(self, child)
        if self.head_norm is not None:
            self.query_norm, self.key_norm = self.head_norm(), self.head_norm()
        self.dropout = Dropout(self.dropout_rate)

    def _dense(self, letter: str, features: int, std: float) -> Dense:
        init, name = nn.initializers.normal(std), letter if self.flat else ""
        return Dense(features, self.use_bias, dtype=self.dtype, kernel_init=init, flat_name=name)

    def queries(self, x: Float[Array, "B Q D"]) -> Float[Array, "B Q H K"]:
        query = self.query(x).reshape(*x.shape[:-1], self.num_heads, self.head_width)
        return query if self.head_norm is None else self.query_norm(query).astype(self.dtype)

    def keys_values(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G K"]]:
        key, value = (dense(x).reshape(*x.shape[:-1], -1, self.head_width) for dense in (self.key, self.value))
        return key if self.head_norm is None else self.key_norm(key).astype(self.dtype), value

    def out(self, heads: Float[Array, "B Q H K"]) -> Float[Array, "B Q D"]:
        return self.attention_out(heads.reshape(*heads.shape[:-2], -1))

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        attended: Float[Array, "B S D"],
        bias: Float[Array, "#B #H #Q S"],
        rotary: tuple[jax.Array, jax.Array] | None = None,
    ) -> Float[Array, "B Q D"]:
        """Attention of x to `attended`. `bias`, float32, is added to the scores: masks, relative positions."""
        query, (key, value) = self.queries(x), self.keys_values(attended)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if key.shape[2] != self.num_heads:
            key, value = (jnp.repeat(a, self.num_heads // a.shape[2], axis=2) for a in (key, value))
        exact = precision(self.dtype)
        scores = jnp.einsum("bqhk,bshk->bhqs", query, key, preferred_element_type=jnp.float32, precision=exact)
        weights = jax.nn.softmax(self.scale * scores + bias, axis=-1).astype(self.dtype)
        value = jnp.swapaxes(value, 1, 2)
        # The heads move before and after: as one product with them, XLA takes up to eight times as long on a CPU.
        heads = jnp.einsum("bhqs,bhsk->bhqk", self.dropout(weights), value, precision=exact)
        return self.out(jnp.swapaxes(heads, 1, 2))


def for_one_query(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two of [B, S, H, K] -> [B, H, K, S] and [B, H, S, K], the order of axes that `attend_cached` wants."""
    return jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))


def attend_cached(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """T5's attention of query [B, Q, H, K] to cached key [B, H, K, S] and value [B, H, S, K]; -> [B, Q, H, K]"""
    exact = precision(query.dtype)
    scores = jnp.einsum("bqhk,bhks->bhqs", query, key, preferred_element_type=jnp.float32, precision=exact)
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(value.dtype)
    # As in `Attention`, the heads move afterwards.
    return jnp.swapaxes(jnp.einsum("bhqs,bhsk->bhqk", weights, value, precision=exact), 1, 2)


class FeedForward(nn.Module):
    """out(activation(in(x))), or gated (Shazeer 2020): out(activation(gate(x)) * up(x)).

    Its matrices go by `names`, two or three, the last the output's.
    """

    width: int
    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    names: tuple[str, ...]
    use_bias: bool = False
    flat: bool = False
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, *gated = (self._dense(name, self.hidden, self.width)(x) for name in self.names[:-1])
        h = functools.reduce(jnp.multiply, gated, self.activation(first))
        return self._dense(self.names[-1], self.width, self.hidden)(Dropout(self.dropout_rate)(h))

    def _dense(self, name: str, features: int, fan_in: int) -> Dense:
        place: Any = {"flat_name": name} if self.flat else {"name": name}
        init = nn.initializers.normal(fan_in**-0.5)
        child = Dense(features, self.use_bias, dtype=self.dtype, kernel_init=init, **place)
        return inline(self, child) if self.flat else child
