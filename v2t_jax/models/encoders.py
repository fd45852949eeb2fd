"""Text encoders: BERT and kin, nomic-bert, ModernBERT, Llama-style decoders, CLIP's text encoder.

Each is a stack of `EncoderLayer`, stacked and scanned; what sets the families apart is in their configurations. T5's
encoder is in t5.py. All map ids and a mask of 0 and 1 [B, L] to float32 hidden states [B, L, D].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from v2t_jax.config import Dtype, T5Config
from v2t_jax.models.layers import (
    ATTENTION_AXES,
    GATED_AXES,
    Attention,
    AxesTable,
    Dense,
    FeedForward,
    GemmaNorm,
    LayerNorm,
    Network,
    Table,
    inline,
    mask_bias,
    quick_gelu,
    rotary_tables,
    window_bias,
)
from v2t_jax.models.t5 import T5Encoder, relative_buckets

RELATIVE_DISTANCE = 128  # from where on MPNet's relative positions share a bucket
_WITH_BIASES: AxesTable = (
    *ATTENTION_AXES,
    (r"layers/(query|key|value)/bias", ("layers", "heads")),
    (r"layers/intermediate/kernel", ("layers", "embed", "mlp")),
    (r"layers/intermediate/bias", ("layers", "mlp")),
    (r"layers/output/kernel", ("layers", "mlp", "embed")),
    (r"layers/(attention_out|output)/bias", ("layers", None)),
)
gelu = functools.partial(jax.nn.gelu, approximate=False)


class EncoderLayer(nn.Module):
    """Attention and feed-forward. Sums and norms are float32; both blocks' parameters lie in the layer itself."""

    attention: Callable[[], nn.Module]
    feed_forward: Callable[[], nn.Module]
    norm: Callable[..., nn.Module]
    norm_behind: bool
    """each norm stands behind the sum with the residual (BERT), not in front of attention and feed-forward"""
    out_norms: bool
    """two more norms, of what attention and feed-forward give (Gemma)"""

    @nn.compact
    def __call__(
        self, x: jax.Array, pad_bias: jax.Array, tables: tuple[Any, Any], local: jax.Array | None, bare: Any
    ) -> tuple[jax.Array, None]:
        """x [B, L, D] -> [B, L, D].

        Args:
            pad_bias: added to the scores of every layer.
            tables: one more bias and rotary tables, or None; with a leading axis that `local` (0 or 1) chooses from.
            bare: whether this layer has no norm in front of its attention (ModernBERT's first).
        """
        attention, feed_forward = inline(self, self.attention()), inline(self, self.feed_forward())
        bias, rotary = jax.tree.map(lambda table: table[local], tables) if local is not None else tables
        bias = pad_bias if bias is None else pad_bias + bias

        def norm(name: str, x: jax.Array) -> jax.Array:
            return self.norm(name=name)(x)

        if self.norm_behind:
            x = norm("attention_norm", x + attention(x, x, bias, rotary).astype(jnp.float32))
            return norm("output_norm", x + feed_forward(x).astype(jnp.float32)), None
        h = norm("attention_norm", x)
        h = h if bare is None else jnp.where(bare, x, h)
        h = attention(h, h, bias, rotary).astype(jnp.float32)
        x = x + (norm("attention_out_norm", h) if self.out_norms else h)
        h = feed_forward(norm("feed_forward_norm", x)).astype(jnp.float32)
        return x + (norm("feed_forward_out_norm", h) if self.out_norms else h), None


class TextEncoder(Network):
    """Base of the families below: embedding tables and the scanned stack of layers."""

    config: Any

    @nn.nowrap
    def examples(self) -> tuple[Any, ...]:
        return jnp.ones((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)

    def table(self, name: str, rows: int) -> Table:
        init = nn.initializers.normal(0.02)
        return inline(self, Table(rows, self.config.hidden_size, embedding_init=init, flat_name=name))

    def layers(
        self,
        x: jax.Array,
        pad_bias: jax.Array,
        num_layers: int,
        activation: Callable[[jax.Array], jax.Array],
        norm: Callable[..., nn.Module],
        *,
        gated: bool = False,
        use_bias: bool = False,
        norm_behind: bool = False,
        out_norms: bool = False,
        head_norms: bool = False,
        scale: float | None = None,
        tables: tuple[Any, Any] = (None, None),
        local: tuple[bool, ...] | None = None,
        bare_first: bool = False,
    ) -> jax.Array:
        """Runs the stacked layers; see `EncoderLayer`. `scale`, of the scores, is by default 1/sqrt(head width)."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        head_width = getattr(c, "head_width", c.hidden_size // c.num_heads)
        attention = functools.partial(
            Attention,
            c.hidden_size,
            c.num_heads,
            head_width,
            getattr(c, "num_key_value_heads", None),
            scale=head_width**-0.5 if scale is None else scale,
            use_bias=use_bias,
            head_norm=norm if head_norms else None,
            dtype=dtype,
        )
        names = ("gate", "up", "down") if gated else ("intermediate", "output")
        sizes = (c.hidden_size, c.intermediate_size)
        feed_forward = functools.partial(FeedForward, *sizes, activation, names, use_bias=use_bias, dtype=dtype)
        scanned = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0),
            length=num_layers,
        )(attention, feed_forward, norm, norm_behind, out_norms, name="layers")
        is_local = None if local is None else jnp.asarray(local, jnp.int32)
        is_bare = jnp.arange(num_layers) == 0 if bare_first else None
        return scanned(x, pad_bias, tables, is_local, is_bare)[0]


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int = 2
    """0: there are no token types"""
    layer_norm_epsilon: float = 1e-12
    pooler: bool = False
    dtype: Dtype = "float32"
    pad_id: int | None = None
    """if given, the first token's position is pad_id + 1, and pads are not counted (RoBERTa)"""
    relative_buckets: int = 0
    """of a relative position bias that all layers share (MPNet); 0: there is none"""


class Bert(TextEncoder):
    """BERT (Devlin et al. 2019), post-norm, exact GELU: the body of MiniLM, BGE, E5, GTE and their kin.

    By its configuration it is DistilBERT (no token types), RoBERTa and XLM-R (positions that count from behind the pad
    id), MPNet (those, no token types, and T5's relative position bias) and DPR's encoders too.
    """

    PARAM_AXES = (
        (r"word_embedding", ("vocab", None)),
        (r"(position|type)_embedding|relative_bias", (None, None)),
        (r"(embedding_norm|layers/\w+_norm)/(scale|bias)", (None,)),
        *_WITH_BIASES,
        (r"pooler/kernel", ("embed", None)),
        (r"pooler/bias", (None,)),
    )

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"], pooled: bool = False) -> jax.Array:
        """Hidden states, or if `pooled`, BERT's own text vector [B, D]: tanh of a dense layer on the first token."""
        c, length = self.config, ids.shape[1]
        positions = jnp.arange(length)[None]
        if c.pad_id is not None:
            is_text = (ids != c.pad_id).astype(jnp.int32)
            positions = c.pad_id + jnp.cumsum(is_text, axis=1) * is_text
        x = self.table("word_embedding", c.vocab_size)(ids)
        added = self.table("position_embedding", c.max_positions)(positions)
        if c.type_vocab_size:
            added = added + self.table("type_embedding", c.type_vocab_size)(jnp.zeros((1, 1), jnp.int32))
        norm = functools.partial(LayerNorm, epsilon=c.layer_norm_epsilon)
        x = norm(name="embedding_norm")(x + added)
        bias = mask_bias(mask)
        if c.relative_buckets:
            relative = np.arange(length)[None, :] - np.arange(length)[:, None]
            buckets = relative_buckets(relative, True, c.relative_buckets, RELATIVE_DISTANCE)
            init = nn.initializers.normal(0.02)
            table = self.param("relative_bias", init, (c.relative_buckets, c.num_heads))
            bias = bias + jnp.transpose(table[buckets], (2, 0, 1))[None]
        x = self.layers(x, bias, c.num_layers, gelu, norm, use_bias=True, norm_behind=True)
        first = jnp.tanh(Dense(c.hidden_size, name="pooler")(x[:, 0])) if c.pooler else x[:, 0]
        return first if pooled else x


@dataclass(frozen=True)
class NomicBertConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    type_vocab_size: int = 2
    rotary_theta: float = 1000.0
    layer_norm_epsilon: float = 1e-12
    dtype: Dtype = "float32"


class NomicBert(TextEncoder):
    """nomic-bert (Nussbaum et al. 2024): BERT with rotary positions, a SwiGLU feed-forward and no biases."""

    PARAM_AXES = (
        (r"word_embedding", ("vocab", None)),
        (r"type_embedding", (None, None)),
        (r"(embedding_norm|layers/\w+_norm)/(scale|bias)", (None,)),
        *ATTENTION_AXES,
        *GATED_AXES,
    )

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        c = self.config
        types = self.table("type_embedding", c.type_vocab_size)(jnp.zeros((1, 1), jnp.int32))
        norm = functools.partial(LayerNorm, epsilon=c.layer_norm_epsilon)
        x = norm(name="embedding_norm")(self.table("word_embedding", c.vocab_size)(ids) + types)
        tables = None, rotary_tables(ids.shape[1], c.hidden_size // c.num_heads, c.rotary_theta)
        options: dict[str, Any] = {"gated": True, "norm_behind": True, "tables": tables}
        return self.layers(x, mask_bias(mask), c.num_layers, jax.nn.silu, norm, **options)


def _local_tables(length: int, head_width: int, window: int, causal: bool, thetas: tuple[float, float]) -> Any:
    """Biases and rotary tables, index 0 for global layers, 1 for local ones."""
    biases = [window_bias(length, causal=causal), window_bias(length, causal=causal, window=window)]
    rotary = (rotary_tables(length, head_width, theta) for theta in thetas)
    return jnp.stack(biases), jax.tree.map(lambda *tables: jnp.stack(tables), *rotary)


@dataclass(frozen=True)
class ModernBertConfig:
    vocab_size: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    local: tuple[bool, ...]
    """of each layer: whether its tokens see only those at most `window` away"""
    window: int = 64
    local_theta: float = 10_000.0
    global_theta: float = 160_000.0
    layer_norm_epsilon: float = 1e-5
    dtype: Dtype = "float32"


class ModernBert(TextEncoder):
    """ModernBERT (Warner et al. 2024): pre-norm, rotary positions, GeGLU, no biases, local attention in most layers.

    The first layer's `attention_norm` is not used.
    """

    PARAM_AXES = (
        (r"word_embedding", ("vocab", None)),
        (r"(embedding_norm|layers/\w+_norm|final_norm)/scale", (None,)),
        *ATTENTION_AXES,
        *GATED_AXES,
    )

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        c = self.config
        norm = functools.partial(LayerNorm, epsilon=c.layer_norm_epsilon, use_bias=False)
        x = norm(name="embedding_norm")(self.table("word_embedding", c.vocab_size)(ids))
        thetas = (c.global_theta, c.local_theta)
        tables = _local_tables(ids.shape[1], c.hidden_size // c.num_heads, c.window, False, thetas)
        options: dict[str, Any] = {"gated": True, "tables": tables, "local": c.local, "bare_first": True}
        x = self.layers(x, mask_bias(mask), len(c.local), gelu, norm, **options)
        return norm(name="final_norm")(x)


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_width: int
    intermediate_size: int
    local: tuple[bool, ...]
    """of each layer: whether its tokens see only those at most `window` away"""
    window: int = 0
    causal: bool = True
    rotary_theta: float = 10_000.0
    local_theta: float = 10_000.0
    """of local layers"""
    rms_norm_epsilon: float = 1e-6
    head_norms: bool = False
    """each head's queries and keys are normalized (Qwen3, Gemma 3)"""
    gemma: bool = False
    """norms behind attention and feed-forward too, scales stored less 1, scaled embeddings, tanh-GELU (Gemma 3)"""
    attention_scale: float | None = None
    """of the scores; by default 1/sqrt(head_width)"""
    dtype: Dtype = "float32"


class Llama(TextEncoder):
    """Decoders as encoders: Llama and Mistral (Touvron et al., Jiang et al. 2023), Qwen3, Gemma 3 (reports, 2025).

    Pre-norm with RMSNorm, rotary positions, grouped queries, gated feed-forward, no biases. Padding follows the text.
    """

    PARAM_AXES = (
        (r"word_embedding", ("vocab", None)),
        (r"(layers/\w+_norm|final_norm)/scale", (None,)),
        *ATTENTION_AXES,
        *GATED_AXES,
    )

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        c = self.config
        norm: Any = functools.partial(nn.RMSNorm, epsilon=c.rms_norm_epsilon, dtype=jnp.float32)
        x = self.table("word_embedding", c.vocab_size)(ids).astype(jnp.float32)
        if c.gemma:
            norm = functools.partial(GemmaNorm, epsilon=c.rms_norm_epsilon)
            x = x * c.hidden_size**0.5
        thetas = (c.rotary_theta, c.local_theta)
        x = self.layers(
            x,
            mask_bias(mask),
            len(c.local),
            functools.partial(jax.nn.gelu, approximate=True) if c.gemma else jax.nn.silu,
            norm,
            gated=True,
            out_norms=c.gemma,
            head_norms=c.head_norms,
            scale=c.attention_scale,
            tables=_local_tables(ids.shape[1], c.head_width, c.window, c.causal, thetas),
            local=c.local,
        )
        return norm(name="final_norm")(x)


@dataclass(frozen=True)
class ClipTextConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    activation: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_epsilon: float = 1e-5
    dtype: Dtype = "float32"


class ClipText(TextEncoder):
    """CLIP's text encoder (Radford et al. 2021, section 2.4): pre-norm and causal."""

    PARAM_AXES = (
        (r"word_embedding", ("vocab", None)),
        (r"position_embedding", (None, None)),
        (r"(layers/\w+_norm|final_norm)/(scale|bias)", (None,)),
        *_WITH_BIASES,
    )

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        c, length = self.config, ids.shape[1]
        x = self.table("word_embedding", c.vocab_size)(ids)
        x = x + self.table("position_embedding", c.max_positions)(jnp.arange(length)[None])
        norm = functools.partial(LayerNorm, epsilon=c.layer_norm_epsilon)
        activation = quick_gelu if c.activation == "quick_gelu" else gelu
        bias = mask_bias(mask) + window_bias(length, causal=True)
        x = self.layers(x, bias, c.num_layers, activation, norm, use_bias=True)
        return norm(name="final_norm")(x)


EncoderConfig = BertConfig | T5Config | NomicBertConfig | ModernBertConfig | LlamaConfig | ClipTextConfig
# An encoder's configuration says which network it is.
ENCODER_OF: dict[type, Any] = {
    BertConfig: Bert,
    T5Config: T5Encoder,
    NomicBertConfig: NomicBert,
    ModernBertConfig: ModernBert,
    LlamaConfig: Llama,
    ClipTextConfig: ClipText,
}
