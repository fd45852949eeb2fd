"""T5 encoder-decoder (Raffel et al. 2020), v1.0 (ReLU, tied and scaled head) and v1.1 (gated GELU, untied head).

Pure functions `f(config, params, arrays...)` around two thin Flax layers. The layers of a stack are stored stacked
(a leading axis) and scanned, so that a deep model compiles as fast as a shallow one; decoding unrolls them, with one
cache entry a layer, because inside a token loop a scan would copy every layer's weights at every token.

Public T5 has ONE relative-position table per stack, shared by its layers, and none for cross-attention.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from v2t_jax.config import T5Config
from v2t_jax.models.layers import (
    NEGATIVE,
    PRODUCT,
    AttentionProjections,
    FeedForward,
    Params,
    RMSNorm,
    attend,
    dropout,
    mask_bias,
    matmul_float32,
    split_key,
)

# Parameter path, joined by "/" -> logical axis names. Strict both ways: see sharding.py.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # The table is sharded over the vocabulary only: sharding its width too makes XLA rematerialize the lookup.
    (r"token_embedding", ("vocab", None)),
    (r"lm_head", ("embed", "vocab")),
    (r"(encoder|decoder)/relative_bias", (None, "heads")),
    (r"(encoder|decoder)/final_norm/scale", (None,)),
    (r"(encoder|decoder)/layers/\w+_norm/scale", ("layers", None)),
    (r"(encoder|decoder)/layers/(self|cross)_attention/[qkv]", ("layers", "embed", "heads")),
    (r"(encoder|decoder)/layers/(self|cross)_attention/o", ("layers", "heads", "embed")),
    (r"(encoder|decoder)/layers/feed_forward/wi(_[01])?", ("layers", "embed", "mlp")),
    (r"(encoder|decoder)/layers/feed_forward/wo", ("layers", "mlp", "embed")),
)

# A layer: self-attention keys [rows, H, K, L] and values [rows, H, L, K]. These axes are as the products of one query
# want them: in any other order XLA copies the whole cache at every token.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


class EncoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.self_attention = AttentionProjections(c.d_model, c.num_heads, c.d_kv, dtype)
        self.self_attention_norm = RMSNorm(c.layer_norm_epsilon, dtype)
        self.feed_forward = FeedForward(c.d_ff, c.feed_forward, c.dropout_rate, dtype)
        self.feed_forward_norm = RMSNorm(c.layer_norm_epsilon, dtype)

    def __call__(self, x: jax.Array, bias: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """x [B, S, D], bias [B or 1, H, S, S] -> [B, S, D]"""
        rate = self.config.dropout_rate
        k_attend, k_out, k_ff, k_ff_out = split_key(dropout_key, 4)
        h = self.self_attention_norm(x)
        key, value = self.self_attention.key_value(h)
        h = attend(self.self_attention.query(h), key, value, bias, rate, k_attend)
        x = x + dropout(self.self_attention.out(h), rate, k_out)
        h = self.feed_forward(self.feed_forward_norm(x), k_ff)
        return nn.with_logical_constraint(x + dropout(h, rate, k_ff_out), ("batch", None, None))


class DecoderLayer(nn.Module):
    config: T5Config

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.self_attention = AttentionProjections(c.d_model, c.num_heads, c.d_kv, dtype)
        self.self_attention_norm = RMSNorm(c.layer_norm_epsilon, dtype)
        self.cross_attention = AttentionProjections(c.d_model, c.num_heads, c.d_kv, dtype)
        self.cross_attention_norm = RMSNorm(c.layer_norm_epsilon, dtype)
        self.feed_forward = FeedForward(c.d_ff, c.feed_forward, c.dropout_rate, dtype)
        self.feed_forward_norm = RMSNorm(c.layer_norm_epsilon, dtype)

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        bias: jax.Array,
        cross_bias: jax.Array,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Teacher forcing. x [B, L, D], encoded [B, S, D], bias [1, H, L, L], cross_bias [B, 1, 1, S] -> [B, L, D]"""
        rate = self.config.dropout_rate
        keys = split_key(dropout_key, 6)
        h = self.self_attention_norm(x)
        key, value = self.self_attention.key_value(h)
        h = attend(self.self_attention.query(h), key, value, bias, rate, keys[0])
        x = x + dropout(self.self_attention.out(h), rate, keys[1])
        h = self.cross_attention_norm(x)
        key, value = self.cross_attention.key_value(encoded)
        h = attend(self.cross_attention.query(h), key, value, cross_bias, rate, keys[2])
        x = x + dropout(self.cross_attention.out(h), rate, keys[3])
        h = self.feed_forward(self.feed_forward_norm(x), keys[4])
        return nn.with_logical_constraint(x + dropout(h, rate, keys[5]), ("batch", None, None))

    def cross_key_value(self, encoded: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, S, D] -> keys [B, H, K, S] and values [B, H, S, K], once a sequence and shared by its beams."""
        return _for_one_query(*self.cross_attention.key_value(encoded))

    def step(
        self,
        x: jax.Array,  # [rows, 1, D]
        cache: tuple[jax.Array, jax.Array],  # [rows, H, K, L] and [rows, H, L, K]
        cross: tuple[jax.Array, jax.Array],  # [B, H, K, S] and [B, H, S, K]
        bias: jax.Array,  # [1, H, 1, L], future positions masked
        cross_bias: jax.Array,  # [B, 1, 1, S]
        index: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """One token a row. rows = B * beams, item-major."""
        rows, batch = x.shape[0], cross[0].shape[0]
        h = self.self_attention_norm(x)
        key, value = _for_one_query(*self.self_attention.key_value(h))
        key = jax.lax.dynamic_update_slice_in_dim(cache[0], key, index, axis=3)
        value = jax.lax.dynamic_update_slice_in_dim(cache[1], value, index, axis=2)
        x = x + self.self_attention.out(_attend_cached(self.self_attention.query(h), key, value, bias))
        # The beams of a sequence take the place of the query axis, so its cross keys are never repeated.
        query = self.cross_attention.query(self.cross_attention_norm(x))
        query = query.reshape(batch, rows // batch, *query.shape[2:])
        h = _attend_cached(query, *cross, cross_bias).reshape(rows, 1, *query.shape[2:])
        x = x + self.cross_attention.out(h)
        x = x + self.feed_forward(self.feed_forward_norm(x), None)
        return x, (key, value)


def _for_one_query(key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two of [B, S, H, K] -> [B, H, K, S] and [B, H, S, K]: see `Cache`."""
    return jnp.transpose(key, (0, 2, 3, 1)), jnp.transpose(value, (0, 2, 1, 3))


def _attend_cached(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """`attend` for query [B, Q, H, K], key [B, H, K, S], value [B, H, S, K]; -> [B, Q, H, K]"""
    scores = jnp.einsum("bqhk,bhks->bhqs", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqs,bhsk->bqhk", weights, value)


def init(config: T5Config, key: jax.Array) -> Params:
    """Random parameters, float32; `layers` are stacked on a leading axis."""
    c = config
    k_embed, k_enc, k_dec, k_bias_e, k_bias_d, k_head = jax.random.split(key, 6)
    x = jnp.zeros((1, 2, c.d_model), jnp.dtype(c.dtype))
    bias, cross_bias = jnp.zeros((1, c.num_heads, 2, 2)), jnp.zeros((1, 1, 1, 2))

    def encoder_layer(key: jax.Array) -> Params:
        return EncoderLayer(c).init(key, x, bias, None)["params"]

    def decoder_layer(key: jax.Array) -> Params:
        return DecoderLayer(c).init(key, x, x, bias, cross_bias, None)["params"]

    def stack(make_layer: Callable, key: jax.Array, num_layers: int, bias_key: jax.Array) -> Params:
        table = jax.random.normal(bias_key, (c.relative_attention_num_buckets, c.num_heads), jnp.float32)
        return {
            "layers": jax.vmap(make_layer)(jax.random.split(key, num_layers)),
            "relative_bias": table * c.d_model**-0.5,
            "final_norm": {"scale": jnp.ones((c.d_model,), jnp.float32)},
        }

    params = {
        "token_embedding": jax.random.normal(k_embed, (c.vocab_size, c.d_model), jnp.float32),
        "encoder": stack(encoder_layer, k_enc, c.num_encoder_layers, k_bias_e),
        "decoder": stack(decoder_layer, k_dec, c.num_decoder_layers, k_bias_d),
    }
    if not c.tie_word_embeddings:
        params["lm_head"] = c.d_model**-0.5 * jax.random.normal(k_head, (c.d_model, c.vocab_size), jnp.float32)
    return params


def relative_buckets(
    relative_position: np.ndarray, bidirectional: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Bucket of every (key position - query position): exact when near, logarithmic when far (Raffel et al., 2.1)."""
    bucket = np.zeros_like(relative_position)
    distance = -relative_position
    if bidirectional:
        num_buckets //= 2
        bucket = np.where(distance < 0, num_buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    exact = num_buckets // 2
    # float32 as in the public implementations: float64 would move distances that lie on a bucket's edge.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).astype(np.int32)
    return bucket + np.where(distance < exact, distance, np.minimum(far, num_buckets - 1))


def position_bias(
    config: T5Config, table: Float[Array, "buckets H"], length: int, bidirectional: bool
) -> Float[Array, "1 H {length} {length}"]:
    """Float32; for the decoder (not bidirectional) the future is masked too."""
    positions = np.arange(length)
    relative = positions[None, :] - positions[:, None]
    buckets = relative_buckets(
        relative, bidirectional, config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    bias = jnp.transpose(table[buckets], (2, 0, 1))[None]
    if not bidirectional:
        bias = bias + jnp.asarray(np.where(relative > 0, NEGATIVE, 0.0), jnp.float32)[None, None]
    return bias


def _run(module: nn.Module, params: Params, *args: Any, method: str | None = None) -> Any:
    """A Flax module as the pure function that it is; nothing here has other collections than parameters."""
    return module.apply({"params": params}, *args, method=method)


def _layer_of(stack: Params, index: int) -> Params:
    return jax.tree.map(lambda p: p[index], stack["layers"])


def _rematerialized(config: T5Config, layer: Callable) -> Callable:
    if config.remat == "none":
        return layer
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    }
    return jax.checkpoint(layer, policy=policies[config.remat], prevent_cse=False)


def _scan_layers(
    config: T5Config, apply: Callable, stack: Params, num_layers: int, x: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Runs `apply(layer_params, x, layer_key)` over the stacked layers."""
    layer = _rematerialized(config, apply)
    if key is None:
        return jax.lax.scan(lambda x, p: (layer(p, x, None), None), x, stack["layers"], unroll=config.scan_unroll)[0]
    keys = jax.random.split(key, num_layers)
    body = lambda x, pk: (layer(pk[0], x, pk[1]), None)  # noqa: E731
    return jax.lax.scan(body, x, (stack["layers"], keys), unroll=config.scan_unroll)[0]


def embed_tokens(config: T5Config, params: Params, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    return params["token_embedding"].astype(jnp.dtype(config.dtype))[ids]


def encode(
    config: T5Config,
    params: Params,
    embeds: Float[Array, "B S D"],
    mask: Int[Array, "B S"],
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B S D"]:
    """The encoder, on embedded tokens."""
    k_in, k_layers, k_out = split_key(dropout_key, 3)
    stack = params["encoder"]
    bias = position_bias(config, stack["relative_bias"], embeds.shape[1], bidirectional=True) + mask_bias(mask)

    def apply(p: Params, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return _run(EncoderLayer(config), p, x, bias, key)

    x = dropout(embeds.astype(jnp.dtype(config.dtype)), config.dropout_rate, k_in)
    x = nn.with_logical_constraint(x, ("batch", None, None))
    x = _scan_layers(config, apply, stack, config.num_encoder_layers, x, k_layers)
    return dropout(_final_norm(config, stack, x), config.dropout_rate, k_out)


def decode(
    config: T5Config,
    params: Params,
    ids: Int[Array, "B L"],
    encoded: Float[Array, "B S D"],
    mask: Int[Array, "B S"],
    dropout_key: jax.Array | None = None,
) -> Float[Array, "B L D"]:
    """The decoder under teacher forcing: input ids, start id first -> hidden states."""
    k_in, k_layers, k_out = split_key(dropout_key, 3)
    stack = params["decoder"]
    bias = position_bias(config, stack["relative_bias"], ids.shape[1], bidirectional=False)
    cross_bias = mask_bias(mask)

    def apply(p: Params, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return _run(DecoderLayer(config), p, x, encoded, bias, cross_bias, key)

    x = dropout(embed_tokens(config, params, ids), config.dropout_rate, k_in)
    x = nn.with_logical_constraint(x, ("batch", None, None))
    x = _scan_layers(config, apply, stack, config.num_decoder_layers, x, k_layers)
    return dropout(_final_norm(config, stack, x), config.dropout_rate, k_out)


def logits(config: T5Config, params: Params, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """The head, float32. The tied head of v1.0 is scaled by 1/sqrt(D)."""
    dtype = jnp.dtype(config.dtype)
    if config.tie_word_embeddings:
        hidden = hidden * config.d_model**-0.5
        return matmul_float32(hidden, params["token_embedding"], dtype, True)
    return matmul_float32(hidden, params["lm_head"], dtype)


def shift_right(labels: Int[Array, "B L"], start_id: int = 0) -> Int[Array, "B L"]:
    """Decoder input for labels: the start id, then all labels but the last."""
    return jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start_id)


def unstack_decoder(params: Params) -> Params:
    """The same parameters with a list of the decoder's layers, for `encode` and `start_decoding` only.

    `start_decoding` does this itself where needed, but then it copies the decoder's weights at every call. Whoever
    decodes often does it once and keeps the result.
    """
    stack = params["decoder"]
    if isinstance(stack["layers"], list):
        return params
    num_layers = jax.tree.leaves(stack["layers"])[0].shape[0]
    return {**params, "decoder": {**stack, "layers": [_layer_of(stack, i) for i in range(num_layers)]}}


def rounded(config: T5Config, params: Params) -> Params:
    """The weights in the arithmetic's dtype, as decoding uses them; norms and position tables stay float32."""

    def leaf(path: tuple[Any, ...], p: jax.Array) -> jax.Array:
        return p if path[-1].key in ("scale", "relative_bias") else p.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(leaf, params)


def start_decoding(
    config: T5Config,
    params: Params,
    encoded: Float[Array, "B S D"],
    mask: Int[Array, "B S"],
    *,
    max_length: int,
    num_beams: int = 1,
    hidden_offset: Float[Array, "B D"] | None = None,
) -> tuple[Callable[[jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]], Cache]:
    """Prepares token-by-token decoding of `num_beams` rows for every sequence.

    Args:
        params: as `init` makes them, or `unstack_decoder` of those.
        max_length: tokens that will be generated at most (L).
        hidden_offset: added to the decoder's last hidden state before the head (the inverter's bag of words).
    Returns:
        `tokens_to_logits(ids [rows], cache, index) -> (logits [rows, V], cache)` with rows = B * num_beams, and the
        empty self-attention cache. Cross-attention keys are computed here, once a sequence.
    """
    dtype = jnp.dtype(config.dtype)
    # Unstack and cast once, outside the token loop: inside it every layer is its own array.
    params = rounded(config, unstack_decoder(params))
    stack = params["decoder"]
    layer = DecoderLayer(config)
    layer_params = stack["layers"]
    cross = [_run(layer, p, encoded.astype(dtype), method="cross_key_value") for p in layer_params]
    bias_table = position_bias(config, stack["relative_bias"], max_length, bidirectional=False)
    cross_bias = mask_bias(mask)
    rows = encoded.shape[0] * num_beams
    empty = (
        jnp.zeros((rows, config.num_heads, config.d_kv, max_length), dtype),
        jnp.zeros((rows, config.num_heads, max_length, config.d_kv), dtype),
    )
    if hidden_offset is not None:
        hidden_offset = jnp.repeat(hidden_offset, num_beams, axis=0)

    def tokens_to_logits(ids: jax.Array, cache: Cache, index: jax.Array) -> tuple[jax.Array, Cache]:
        x = embed_tokens(config, params, ids[:, None])
        bias = jax.lax.dynamic_slice_in_dim(bias_table, index, 1, axis=2)
        entries = []
        for p, entry, cross_entry in zip(layer_params, cache, cross, strict=True):
            x, entry = _run(layer, p, x, entry, cross_entry, bias, cross_bias, index, method="step")
            entries.append(entry)
        hidden = _final_norm(config, stack, x)[:, 0]
        if hidden_offset is not None:
            hidden = hidden + hidden_offset.astype(hidden.dtype)
        return logits(config, params, hidden), tuple(entries)

    return tokens_to_logits, tuple(empty for _ in range(config.num_decoder_layers))


def _final_norm(config: T5Config, stack: Params, x: jax.Array) -> jax.Array:
    norm = RMSNorm(config.layer_norm_epsilon, jnp.dtype(config.dtype))
    return _run(norm, stack["final_norm"], x)


# Shapes of every parameter without allocating any: what checkpoints and conversions are checked against.
def abstract_params(config: T5Config) -> Any:
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))
