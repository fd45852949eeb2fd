"""T5 encoder-decoder (Raffel et al. 2020), v1.0 (ReLU, tied and scaled head) and v1.1 (gated GELU, untied head).

The layers of a stack are stored stacked (a leading axis) and scanned, so that a deep model compiles as fast as a
shallow one. Decoding unrolls them, with one cache entry a layer: inside a token loop a scan would copy every layer's
weights at every token. A stack whose parameters are a list of layers (`unstack_layers`) is unrolled everywhere.

Public T5 has ONE relative-position table per stack, shared by its layers, and none for cross-attention.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v2t_jax.config import T5Config
from v2t_jax.decode.state import START, WrittenCache
from v2t_jax.models.layers import (
    MASKED,
    MATMUL_OUTPUT,
    Attention,
    AxesTable,
    Dropout,
    FeedForward,
    Network,
    Params,
    Tokens,
    attend_cached,
    for_one_query,
    look_up,
    mask_bias,
    matmul_float32,
    relative_bias,
    unstack_layers,
    window_bias,
)

TABLE = "token_embedding"  # the parameter's name

# Activation and matrices, by `feed_forward`.
FEED_FORWARD: dict[str, tuple[Callable[[jax.Array], jax.Array], tuple[str, ...]]] = {
    "relu": (jax.nn.relu, ("wi", "wo")),
    "gated-gelu": (functools.partial(jax.nn.gelu, approximate=True), ("wi_0", "wi_1", "wo")),
}
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(MATMUL_OUTPUT),
}

# Keys [B, H, K, S] and values [B, H, S, K] of an item's beams, S = L * beams, position-major. These axes are as the
# products of a few queries want them: in any other order XLA copies the whole cache at every token.
KeyValue = tuple[jax.Array, jax.Array]


class T5Layer(nn.Module):
    """Self-attention, cross-attention (decoder only), feed-forward, each with a norm in front."""

    config: T5Config
    is_decoder: bool

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        norm = functools.partial(nn.RMSNorm, c.layer_norm_epsilon, dtype=dtype)
        options: Any = {"flat": True, "dropout_rate": c.dropout_rate, "dtype": dtype}
        attention = functools.partial(Attention, c.d_model, c.num_heads, c.d_kv, **options)
        self.self_attention, self.self_attention_norm = attention(), norm()
        if self.is_decoder:
            self.cross_attention, self.cross_attention_norm = attention(), norm()
        activation, names = FEED_FORWARD[c.feed_forward]
        self.feed_forward = FeedForward(c.d_model, c.d_ff, activation, names, **options)
        self.feed_forward_norm = norm()
        self.dropout = Dropout(c.dropout_rate)

    def __call__(
        self, x: jax.Array, bias: jax.Array, encoded: Any = None, cross_bias: Any = None
    ) -> tuple[jax.Array, None]:
        """x [B, L, D], bias [B or 1, H, L, L], encoded [B, S, D], cross_bias [B, 1, 1, S] -> [B, L, D]"""
        h = self.self_attention_norm(x)
        x = x + self.dropout(self.self_attention(h, h, bias))
        if self.is_decoder:
            x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), encoded, cross_bias))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return nn.with_logical_constraint(x, ("batch", None, None)), None

    def cross_key_value(self, encoded: jax.Array) -> KeyValue:
        """[B, S, D] -> keys [B, H, K, S] and values [B, H, S, K], once a sequence and shared by its beams."""
        return for_one_query(*self.cross_attention.keys_values(encoded))

    def step(
        self, x: jax.Array, cache: KeyValue, cross: KeyValue, bias: jax.Array, cross_bias: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, KeyValue]:
        """One token of each of an item's N beams, which take the place of the query axis: x [B, N, D], `cache` of
        self-attention, `cross_key_value`, bias [B, H, N, L * N], which masks what a beam must not see, and cross_bias
        [B, 1, 1, S].
        """
        h, first = self.self_attention_norm(x), index * x.shape[1]
        key, value = for_one_query(*self.self_attention.keys_values(h))
        key = jax.lax.dynamic_update_slice_in_dim(cache[0], key, first, axis=3)
        value = jax.lax.dynamic_update_slice_in_dim(cache[1], value, first, axis=2)
        x = x + self.self_attention.out(attend_cached(self.self_attention.queries(h), key, value, bias))
        query = self.cross_attention.queries(self.cross_attention_norm(x))
        x = x + self.cross_attention.out(attend_cached(query, *cross, cross_bias))
        return x + self.feed_forward(self.feed_forward_norm(x)), (key, value)


class T5Stack(nn.Module):
    """T5's encoder or decoder on embedded tokens, final norm included."""

    config: T5Config
    is_decoder: bool

    PARAM_AXES: ClassVar[AxesTable] = (
        (r"relative_bias", (None, "heads")),
        (r"final_norm/scale", (None,)),
        (r"layers/\w+_norm/scale", ("layers", None)),
        (r"layers/(self|cross)_attention/[qkv]", ("layers", "embed", "heads")),
        (r"layers/(self|cross)_attention/o", ("layers", "heads", "embed")),
        (r"layers/feed_forward/wi(_[01])?", ("layers", "embed", "mlp")),
        (r"layers/feed_forward/wo", ("layers", "mlp", "embed")),
    )

    def setup(self) -> None:
        c = self.config
        layer: Any = T5Layer
        if c.remat != "none":
            layer = nn.remat(layer, policy=_REMAT_POLICIES[c.remat], prevent_cse=False)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_decoder_layers if self.is_decoder else c.num_encoder_layers,
            check_constancy_invariants=False,  # would trace the layer twice
            unroll=c.scan_unroll,
        )(c, self.is_decoder)
        shape, init = (c.relative_attention_num_buckets, c.num_heads), nn.initializers.normal(c.d_model**-0.5)
        self.relative_bias = self.param("relative_bias", init, shape)
        self.final_norm = nn.RMSNorm(c.layer_norm_epsilon, dtype=jnp.dtype(c.dtype))
        self.dropout = Dropout(c.dropout_rate)

    def position_bias(self, length: int) -> Float[Array, "1 H {length} {length}"]:
        """Float32; the decoder's masks the future too."""
        sizes = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        bias = relative_bias(self.relative_bias, length, not self.is_decoder, *sizes)
        return bias + window_bias(length, causal=True) if self.is_decoder else bias

    def __call__(self, embeds: jax.Array, mask: jax.Array, encoded: jax.Array | None = None) -> jax.Array:
        """embeds [B, L, D] -> [B, L, D]; mask [B, S], of the encoder's positions."""
        x = self.dropout(embeds.astype(jnp.dtype(self.config.dtype)))
        x = nn.with_logical_constraint(x, ("batch", None, None))
        bias = self.position_bias(x.shape[1])
        given = (bias, encoded, mask_bias(mask)) if self.is_decoder else (bias + mask_bias(mask),)
        layers: Any = None if self.is_initializing() else self.get_variable("params", "layers")
        if isinstance(layers, list):
            layer = T5Layer(self.config, self.is_decoder, parent=None)
            for params in layers:
                x, _ = layer.apply({"params": params}, x, *given)
        else:
            x, _ = self.layers(x, *given)
        return self.dropout(self.final_norm(x))


class T5(Network):
    """Text to text: `encode`, then `decode` and `logits`, or `start_decoding` token by token."""

    config: T5Config

    PARAM_AXES = (
        # The table is sharded over the vocabulary only: sharding its width too makes XLA rematerialize the lookup.
        (r"token_embedding", ("vocab", None)),
        (r"lm_head", ("embed", "vocab")),
        *((f"(encoder|decoder)/{path}", axes) for path, axes in T5Stack.PARAM_AXES),
    )

    def setup(self) -> None:
        c = self.config
        self.encoder, self.decoder = T5Stack(c, is_decoder=False), T5Stack(c, is_decoder=True)
        if not c.tie_word_embeddings:
            init = nn.initializers.normal(c.d_model**-0.5)
            self.lm_head = self.param("lm_head", init, (c.d_model, c.vocab_size))
        self.token_embedding = self.param("token_embedding", nn.initializers.normal(1.0), (c.vocab_size, c.d_model))

    @nn.nowrap
    def examples(self) -> tuple[Any, ...]:
        return *super().examples(), jnp.ones((1, 2), jnp.int32)

    def __call__(self, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> jax.Array:
        """Teacher forcing: source ids and mask [B, S], labels [B, L] -> logits [B, L, V]."""
        encoded = self.encode(self.embed_tokens(ids), mask)
        return self.logits(self.decode(shift_right(labels), encoded, mask))

    def embed_tokens(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        return look_up(self.token_embedding, ids, jnp.dtype(self.config.dtype))

    def encode(self, embeds: Float[Array, "B S D"], mask: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return self.encoder(embeds, mask)

    def decode(
        self, ids: Int[Array, "B L"], encoded: Float[Array, "B S D"], mask: Int[Array, "B S"]
    ) -> Float[Array, "B L D"]:
        """The decoder under teacher forcing: input ids, start id first -> hidden states."""
        return self.decoder(self.embed_tokens(ids), mask, encoded)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """The head, float32. The tied head of v1.0 is scaled by 1/sqrt(D)."""
        dtype = jnp.dtype(self.config.dtype)
        if self.config.tie_word_embeddings:
            return matmul_float32(hidden * self.config.d_model**-0.5, self.token_embedding, dtype, True)
        return matmul_float32(hidden, self.lm_head, dtype)

    def head(self, x: jax.Array, offset: jax.Array | None) -> jax.Array:
        """Output of the last decoder layer [B, N, D], offset [B, D] -> logits [B * N, V]."""
        hidden = self.decoder.final_norm(x)
        hidden = hidden if offset is None else hidden + offset[:, None].astype(hidden.dtype)
        return self.logits(hidden.reshape(-1, hidden.shape[-1]))

    @nn.nowrap
    def start_decoding(
        self,
        params: Params,
        encoded: Float[Array, "B S D"],
        mask: Int[Array, "B S"],
        *,
        max_length: int,
        num_beams: int = 1,
        hidden_offset: Float[Array, "B D"] | None = None,
    ) -> tuple[Callable[[jax.Array, WrittenCache, jax.Array], tuple[jax.Array, WrittenCache]], WrittenCache]:
        """`tokens_to_logits` and its empty cache, for rows = B * num_beams; see `decode.state.TokensToLogits`.

        Args:
            params: this network's, or `unstack_decoder` of those.
            max_length: tokens that will be generated at most (L).
            hidden_offset: added to the decoder's last hidden state before the head (the inverter's bag of words).
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        # Unstack and cast once, outside the token loop: inside it every layer is its own array.
        params = round_weights(c, {**params, "decoder": unstack_layers(params["decoder"])})
        layers: Any = [functools.partial(T5Layer(c, True).apply, {"params": p}) for p in params["decoder"]["layers"]]
        apply = functools.partial(self.apply, {"params": params})
        cross = [layer(encoded.astype(dtype), method="cross_key_value") for layer in layers]
        bias_table = apply(method=lambda t5: t5.decoder.position_bias(max_length))
        cross_bias = mask_bias(mask)
        batch, beams = encoded.shape[0], jnp.arange(num_beams, dtype=jnp.int32)
        key = jnp.zeros((batch, c.num_heads, c.d_kv, max_length * num_beams), dtype)
        empty = key, jnp.swapaxes(key, 2, 3)

        def tokens_to_logits(ids: jax.Array, cache: WrittenCache, index: jax.Array) -> tuple[jax.Array, WrittenCache]:
            x = apply(ids.reshape(batch, num_beams), method="embed_tokens")
            writes = jnp.tile(beams, batch)
            ancestors = jax.lax.dynamic_update_index_in_dim(cache.ancestors, writes, index, axis=1)
            own = ancestors.reshape(batch, num_beams, -1, 1) == beams[None, None, None]
            bias = jax.lax.dynamic_slice_in_dim(bias_table, index, 1, axis=2)
            bias = jnp.where(own[:, None], bias[..., None], MASKED).reshape(batch, c.num_heads, num_beams, -1)
            entries = []
            for layer, entry, cross_entry in zip(layers, cache.written, cross, strict=True):
                x, entry = layer(x, entry, cross_entry, bias, cross_bias, index, method="step")
                entries.append(entry)
            return apply(x, hidden_offset, method="head"), WrittenCache(tuple(entries), ancestors)

        written = tuple(empty for _ in range(c.num_decoder_layers))
        return tokens_to_logits, WrittenCache(written, jnp.zeros((batch * num_beams, max_length), jnp.int32))


def shift_right(labels: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Decoder input for labels: the start id, then all labels but the last."""
    return jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=START)


def unstack_decoder(params: Params) -> Params:
    """The same parameters with a list of the decoder's layers, as `start_decoding` wants; on a CPU also the encoder's.

    Callers that decode often keep the result; else `start_decoding` unstacks, and copies the weights, at every call.
    """
    on_cpu = jax.default_backend() == "cpu"
    stacks = ("encoder", "decoder") if on_cpu else ("decoder",)
    return params | {name: unstack_layers(params[name], transposed=on_cpu) for name in stacks}


def round_weights(config: T5Config, params: Params) -> Params:
    """The weights in the arithmetic's dtype, as decoding uses them; norms and position tables stay float32."""

    def leaf(path: tuple[Any, ...], p: Any) -> Any:  # of JAX or numpy
        return p if path[-1].key in ("scale", "relative_bias") else p.astype(jnp.dtype(config.dtype))

    return jax.tree_util.tree_map_with_path(leaf, params)


class T5Encoder(Network):
    """T5's encoder alone, as embedders use it: the body of GTR and Sentence-T5."""

    config: T5Config

    @nn.compact
    def __call__(self, ids: Tokens, mask: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Tokens and mask of 0 and 1 -> hidden states, in `config.dtype`."""
        c = self.config
        table = self.param("word_embedding", nn.initializers.normal(1.0), (c.vocab_size, c.d_model))
        embeds = ids if ids.ndim == 3 else look_up(table, ids, jnp.dtype(c.dtype))
        return T5Stack(c, is_decoder=False, name="encoder")(embeds, mask)
