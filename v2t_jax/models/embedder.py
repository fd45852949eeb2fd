"""The embedder under attack: encoder + pooling (+ layers) (+ L2), as sentence-transformers composes them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.config import T5Config
from v2t_jax.decode.state import EOS, PAD
from v2t_jax.models.encoders import EncoderConfig, encoder_network
from v2t_jax.models.layers import (
    MASKED,
    LayerNorm,
    Network,
    Params,
    Tokens,
    for_axes,
    look_up,
    matmul_float32,
    unstack_layers,
)

Pooling = Literal["mean", "cls", "pooler", "last", "max", "weightedmean", "mean_sqrt_len_tokens"]
Activation = Literal["identity", "tanh", "relu", "leakyrelu", "elu", "gelu", "silu", "mish", "sigmoid", "softplus"]
Layer = Literal[Activation, "layer_norm", "normalize"]  # a dense layer, by its activation, or another one
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leakyrelu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
}
CPU_TOKENS = 640  # at a time: the states of many more leave a CPU's caches, which takes up to half of its speed


@dataclass(frozen=True)
class EmbedderConfig:
    encoder: EncoderConfig
    pooling: Pooling | tuple[Pooling, ...] = "mean"
    """several are concatenated"""
    dense: tuple[Layer, ...] = ()
    """the layers behind pooling"""
    normalize: bool = True
    """L2, of the dimensions that are kept"""
    prefix: str = ""
    """put before every text"""
    max_length: int = 256
    """tokens a text is cut to, special ones such as [CLS] and [SEP] included"""
    width: int = 384
    """E; where it is less than the network gives, the first E dimensions are kept (Matryoshka, Kusupati et al. 2022)"""

    @property
    def state_width(self) -> int:
        """H, of the encoder's hidden states."""
        return self.encoder.d_model if isinstance(self.encoder, T5Config) else self.encoder.hidden_size


class EmbedderNetwork(Network):
    """Tokens and mask [B, L] -> embeddings [B, E], float32.

    Parameters: `encoder`, and `dense`, a list of what each layer has ({kernel [in, out], bias [out] or none} if it is
    dense, {scale [in], bias [in]}, or {}), which `init` doesn't make.
    """

    config: EmbedderConfig

    @nn.compact
    def __call__(self, ids: Tokens, mask: Int[Array, "B L"], states: bool = False) -> Any:
        """With `states`, the encoder's last hidden states [B, L, H] too."""
        c = self.config
        encoder: Any = encoder_network(c.encoder, name="encoder")
        # What nobody asked for, the compiler leaves out.
        hidden = encoder(ids, mask).astype(jnp.float32)
        if c.pooling == "pooler":
            x = encoder(ids, mask, pooled=True)
        else:
            poolings = (c.pooling,) if isinstance(c.pooling, str) else c.pooling
            x = jnp.concatenate([pool(pooling, hidden, mask) for pooling in poolings], axis=1)
        layers: Any = [] if self.is_initializing() else self.get_variable("params", "dense", ())
        for kind, params in zip(c.dense, layers, strict=not self.is_initializing()):
            x = _apply_layer(kind, params, x)
        x = x[:, : c.width]
        x = _apply_layer("normalize", {}, x) if c.normalize else x
        return (x, hidden) if states else x


def _apply_layer(kind: Layer, params: Params, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
    if kind == "normalize":
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    if kind == "layer_norm":
        normed: Any = LayerNorm(epsilon=1e-5, parent=None).apply({"params": params}, x)
        return normed
    x = matmul_float32(x, params["kernel"], jnp.float32)
    return ACTIVATIONS[kind](x + for_axes(params["bias"], x) if "bias" in params else x)


def pool(pooling: Pooling, hidden: Float[Array, "B L D"], mask: Int[Array, "B L"]) -> Float[Array, "B D"]:
    """A text's vector from its tokens'; positions with mask 0 don't count."""
    weights = mask.astype(hidden.dtype)[:, :, None]
    if pooling == "weightedmean":  # by the tokens' places, which count from 1
        weights = weights * jnp.arange(1, 1 + mask.shape[1], dtype=hidden.dtype)[None, :, None]
    if "mean" in pooling:
        total = jnp.maximum(jnp.sum(weights, axis=1), 1e-9)
        return jnp.sum(hidden * weights, axis=1) / (jnp.sqrt(total) if pooling == "mean_sqrt_len_tokens" else total)
    if pooling == "max":
        return jnp.max(jnp.where(weights > 0, hidden, MASKED), axis=1)
    if pooling == "last":
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return hidden[:, 0]


def embed(config: EmbedderConfig, params: Params, ids: Tokens, mask: Int[Array, "B L"]) -> Float[Array, "B E"]:
    """`EmbedderNetwork` as a function that can be jitted with a static first argument; on a CPU, part by part."""
    rows, length = ids.shape
    most = max(CPU_TOKENS, length)
    divisors = (n for n in range(1, rows + 1) if rows % n == 0)
    fitting = (n for n in divisors if most // 4 < rows // n * length <= most)
    parts = next((n for n in fitting if rows // n % jax.device_count() == 0), 1)  # each has rows of every device

    def run(ids: Tokens, mask: Int[Array, "B L"]) -> Any:
        return EmbedderNetwork(config).apply({"params": params}, ids, mask)

    def run_parts(ids: Tokens, mask: Int[Array, "B L"]) -> Any:
        split = (x.reshape(-1, parts, length).swapaxes(0, 1) for x in (ids, mask))
        return jax.lax.map(lambda part: run(*part), tuple(split)).swapaxes(0, 1).reshape(rows, -1)

    e: Any = run(ids, mask) if parts == 1 else jax.lax.platform_dependent(ids, mask, cpu=run_parts, default=run)
    return e


def unstacked_on_cpu(params: Params) -> Params:
    """An embedder's parameters, on a CPU with each layer's in arrays of their own (see `unstack_layers`).

    There a scan's copies of them take a tenth of the time for a few texts. Elsewhere deep encoders compile faster.
    """
    encoder = params["encoder"]
    if jax.default_backend() != "cpu":
        return params
    if "encoder" in encoder:  # T5's
        return {**params, "encoder": {**encoder, "encoder": unstack_layers(encoder["encoder"], transposed=True)}}
    return {**params, "encoder": unstack_layers(encoder, transposed=True)} if "layers" in encoder else params


@dataclass(frozen=True)
class TokenMap:
    """How a model's token ids become the embedder's, when they share word-pieces."""

    before: tuple[int, ...]
    """the embedder's ids in front of a text: [CLS] and a prefix's pieces"""
    after: int | None
    """[SEP]; None where the embedder puts no token behind a text"""


def embedder_input(
    config: EmbedderConfig, token_map: TokenMap, vocab_map: Int[Array, " V"], ids: Int[Array, "B L"]
) -> tuple[Int[Array, "B M"], Int[Array, "B M"]]:
    """Model ids -> the embedder's ids and mask: the text stands behind `token_map.before`.

    Args:
        vocab_map: model id -> embedder id.
        ids: a text ends at its first pad or end id, or at L: `token_map.after` is put there in any case. It is cut
            where the embedder's tokenizer cuts it, so that `after` fits.
    """
    num_before, num_after = len(token_map.before), int(token_map.after is not None)
    ids = ids[:, : config.max_length - num_before - num_after]
    is_text = jnp.cumsum(((ids == PAD) | (ids == EOS)).astype(jnp.int32), axis=1) == 0
    length = jnp.sum(is_text, axis=1, keepdims=True)  # [B, 1]
    text = jnp.pad(jnp.where(is_text, vocab_map[ids], 0), ((0, 0), (0, num_after)))
    if token_map.after is not None:
        text = jnp.where(jnp.arange(text.shape[1])[None] == length, token_map.after, text)
    before = jnp.broadcast_to(jnp.asarray(token_map.before, jnp.int32)[None], (ids.shape[0], num_before))
    whole = jnp.concatenate([before, text], axis=1)
    return whole, (jnp.arange(whole.shape[1])[None] < num_before + length + num_after).astype(jnp.int32)


def embed_model_ids(
    config: EmbedderConfig, token_map: TokenMap, params: Params, vocab_map: Int[Array, " V"], ids: Int[Array, "B L"]
) -> Float[Array, "B E"]:
    """Model ids -> embeddings, without leaving the device; arguments as of `embedder_input`."""
    return embed(config, params, *embedder_input(config, token_map, vocab_map, ids))


def embed_with_states(
    config: EmbedderConfig, token_map: TokenMap, params: Params, vocab_map: Int[Array, " V"], ids: Int[Array, "B L"]
) -> tuple[Float[Array, "B E"], Float[Array, "B L H"]]:
    """The same, and the encoder's last hidden states at the ids' places; zeros where the embedder doesn't read one."""
    tokens = embedder_input(config, token_map, vocab_map, ids)
    e, states = EmbedderNetwork(config).apply({"params": params}, *tokens, states=True)
    return e, _at_ids(token_map, states, ids)


def _at_ids(token_map: TokenMap, x: jax.Array, ids: jax.Array) -> jax.Array:
    """What the embedder has at the places of ids [B, L], of all places [B, M, ...]."""
    x = x[:, len(token_map.before) :][:, : ids.shape[1]]
    return jnp.pad(x, ((0, 0), (0, ids.shape[1] - x.shape[1]), (0, 0)))


def token_gradient(
    config: EmbedderConfig,
    token_map: TokenMap,
    params: Params,
    vocab_map: Int[Array, " V"],
    ids: Int[Array, "B L"],
    objective: Callable[[jax.Array], jax.Array],
) -> tuple[Float[Array, "B L V"], Float[Array, "B L H"]]:
    """How much `objective` (of embeddings [B, E], summed over rows) grows, to first order, by each id at each place.

    After HotFlip (Ebrahimi et al. 2018): the gradient at a token's embedding, times the difference to every other's.
    Also the last hidden states, as in `embed_with_states`.
    """
    tokens, mask = embedder_input(config, token_map, vocab_map, ids)
    table, network = params["encoder"]["word_embedding"], EmbedderNetwork(config)

    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        e, states = network.apply({"params": params}, x, mask, states=True)
        return jnp.sum(objective(e)), states

    here = look_up(table, tokens)
    gradient, states = jax.grad(total, has_aux=True)(here)
    gradient, here, states = (_at_ids(token_map, x, ids) for x in (gradient, here, states))
    gain = matmul_float32(gradient, look_up(table, vocab_map), jnp.float32, True)
    return gain - jnp.sum(gradient * here, axis=-1, keepdims=True), states
