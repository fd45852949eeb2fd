"""Text encoders: BERT and kin, nomic-bert, ModernBERT, Llama-style decoders, CLIP's text encoder.

They are one network; what sets the families apart is in their configurations. T5's encoder is in t5.py. All map ids and
a mask of 0 and 1 [B, L] to float32 hidden states [B, L, D].
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from v2t_jax.config import Dtype, T5Config
from v2t_jax.models.layers import (
    Attention,
    Dense,
    FeedForward,
    GemmaNorm,
    LayerNorm,
    Network,
    Tokens,
    inline,
    look_up,
    mask_bias,
    relative_bias,
    rotary_tables,
    window_bias,
)
from v2t_jax.models.t5 import T5Encoder

HiddenActivation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
Norm = Literal["layer", "layer without bias", "rms", "gemma"]
ACTIVATIONS: dict[HiddenActivation, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "silu": jax.nn.silu,
}
RELATIVE_DISTANCE = 128  # from where on MPNet's relative positions share a bucket


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes and options of a text encoder; the families below are its defaults."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int = 0
    """of learned positions; 0: there are none"""
    type_vocab_size: int = 0
    """0: there are no token types"""
    dtype: Dtype = "float32"
    num_key_value_heads: int | None = None
    head_width: int = 0
    """0: hidden_size / num_heads"""
    activation: HiddenActivation = "gelu"
    gated: bool = False
    use_bias: bool = False
    norm: Norm = "layer"
    """gemma: RMSNorm whose scale is stored less 1, and two more, of what attention and feed-forward give; its token
    embeddings are scaled by sqrt(hidden_size)"""
    norm_epsilon: float = 1e-5
    norm_behind: bool = False
    """each norm stands behind the sum with the residual (BERT), not in front of attention and feed-forward"""
    embedding_norm: bool = False
    bare_first: bool = False
    """the first layer has no norm in front of its attention (ModernBERT)"""
    head_norms: bool = False
    """each head's queries and keys are normalized (Qwen3, Gemma 3)"""
    attention_scale: float | None = None
    """of the scores; by default 1/sqrt(head width)"""
    causal: bool = False
    local: tuple[bool, ...] = ()
    """of each layer: whether its tokens see only those at most `window` away; empty: in none"""
    window: int = 0
    rotary_theta: float = 0.0
    """0: there are no rotary positions"""
    local_theta: float = 0.0
    """of local layers"""
    pad_id: int | None = None
    """if given, the first token's position is pad_id + 1, and pads are not counted (RoBERTa)"""
    relative_buckets: int = 0
    """of a relative position bias that all layers share (MPNet); 0: there is none"""
    pooler: bool = False


@dataclass(frozen=True)
class BertConfig(TextEncoderConfig):
    """BERT (Devlin et al. 2019): the body of MiniLM, BGE, E5, GTE and their kin.

    By its settings it is DistilBERT (no token types), RoBERTa and XLM-R (positions that count from behind the pad id),
    MPNet (those, no token types, and T5's relative position bias) and DPR's encoders too.
    """

    type_vocab_size: int = 2
    use_bias: bool = True
    norm_epsilon: float = 1e-12
    norm_behind: bool = True
    embedding_norm: bool = True


@dataclass(frozen=True)
class NomicBertConfig(TextEncoderConfig):
    """nomic-bert (Nussbaum et al. 2024): BERT with rotary positions, a SwiGLU feed-forward and no biases."""

    type_vocab_size: int = 2
    activation: HiddenActivation = "silu"
    gated: bool = True
    norm_epsilon: float = 1e-12
    norm_behind: bool = True
    embedding_norm: bool = True
    rotary_theta: float = 1000.0


@dataclass(frozen=True)
class ModernBertConfig(TextEncoderConfig):
    """ModernBERT (Warner et al. 2024): rotary positions, GeGLU, no biases, local attention in most layers.

    The first layer's `attention_norm` is not used.
    """

    gated: bool = True
    norm: Norm = "layer without bias"
    embedding_norm: bool = True
    bare_first: bool = True
    window: int = 64
    rotary_theta: float = 160_000.0
    local_theta: float = 10_000.0


@dataclass(frozen=True)
class LlamaConfig(TextEncoderConfig):
    """Decoders as encoders: Llama and Mistral (Touvron et al., Jiang et al. 2023), Qwen3, Gemma 3 (reports, 2025).

    Rotary positions, grouped queries, no biases. Padding follows the text.
    """

    activation: HiddenActivation = "silu"
    gated: bool = True
    norm: Norm = "rms"
    norm_epsilon: float = 1e-6
    causal: bool = True
    rotary_theta: float = 10_000.0
    local_theta: float = 10_000.0


@dataclass(frozen=True)
class ClipTextConfig(TextEncoderConfig):
    """CLIP's text encoder (Radford et al. 2021, section 2.4): pre-norm and causal."""

    activation: HiddenActivation = "quick_gelu"
    use_bias: bool = True
    causal: bool = True


@dataclass(frozen=True)
class StaticConfig(TextEncoderConfig):
    """Token embeddings alone: sentence-transformers' StaticEmbedding, of which model2vec's models consist."""

    num_layers: int = 0
    num_heads: int = 1
    intermediate_size: int = 0


EncoderConfig = TextEncoderConfig | T5Config


def _norm_of(config: TextEncoderConfig) -> Callable[..., nn.Module]:
    if config.norm == "gemma":
        return functools.partial(GemmaNorm, epsilon=config.norm_epsilon)
    if config.norm == "rms":
        return functools.partial(nn.RMSNorm, epsilon=config.norm_epsilon, dtype=jnp.float32)
    return functools.partial(LayerNorm, epsilon=config.norm_epsilon, use_bias=config.norm == "layer")


class EncoderLayer(nn.Module):
    """Attention and feed-forward. Sums and norms are float32; both blocks' parameters lie in the layer itself."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, pad_bias: jax.Array, tables: tuple[Any, Any], local: jax.Array | None, bare: Any
    ) -> tuple[jax.Array, None]:
        """x [B, L, D] -> [B, L, D].

        Args:
            pad_bias: added to the scores of every layer.
            tables: one more bias and rotary tables, or None; with a leading axis that `local` (0 or 1) chooses from.
            bare: whether this layer has no norm in front of its attention.
        """
        c, norm, width = self.config, _norm_of(self.config), _head_width(self.config)
        options: Any = {"use_bias": c.use_bias, "dtype": jnp.dtype(c.dtype)}
        heads: Any = {"scale": c.attention_scale or width**-0.5, "head_norm": norm if c.head_norms else None} | options
        attend = inline(self, Attention(c.hidden_size, c.num_heads, width, c.num_key_value_heads, **heads))
        names = ("gate", "up", "down") if c.gated else ("intermediate", "output")
        activation = ACTIVATIONS[c.activation]
        feed_forward = inline(self, FeedForward(c.hidden_size, c.intermediate_size, activation, names, **options))
        bias, rotary = tables if local is None else jax.tree.map(lambda table: table[local], tables)
        bias = pad_bias if bias is None else pad_bias + bias

        def attention(h: jax.Array) -> jax.Array:
            return attend(h, h, bias, rotary).astype(jnp.float32)

        if c.norm_behind:
            x = norm(name="attention_norm")(x + attention(x))
            return norm(name="output_norm")(x + feed_forward(x).astype(jnp.float32)), None
        h = norm(name="attention_norm")(x)
        h = attention(h if bare is None else jnp.where(bare, x, h))
        x = x + (norm(name="attention_out_norm")(h) if c.norm == "gemma" else h)
        h = feed_forward(norm(name="feed_forward_norm")(x)).astype(jnp.float32)
        return x + (norm(name="feed_forward_out_norm")(h) if c.norm == "gemma" else h), None


class TextEncoder(Network):
    """Token embeddings and a scanned stack of layers."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, ids: Tokens, mask: Int[Array, "B L"], pooled: bool = False) -> jax.Array:
        """Hidden states, or if `pooled`, BERT's own text vector [B, D]: tanh of a dense layer on the first token."""
        c, length, init = self.config, ids.shape[1], nn.initializers.normal(0.02)
        positions = jnp.arange(length)[None]
        if c.pad_id is not None:
            is_text = mask if ids.ndim == 3 else (ids != c.pad_id).astype(jnp.int32)
            positions = c.pad_id + jnp.cumsum(is_text, axis=1) * is_text

        def embed(name: str, rows: int, index: jax.Array) -> jax.Array:
            return look_up(self.param(name, init, (rows, c.hidden_size)), index)

        x = ids if ids.ndim == 3 else embed("word_embedding", c.vocab_size, ids)
        if not c.num_layers:
            return x
        added = [embed("position_embedding", c.max_positions, positions)] if c.max_positions else []
        if c.type_vocab_size:
            added.append(embed("type_embedding", c.type_vocab_size, jnp.zeros((1, 1), jnp.int32)))
        x = x + functools.reduce(operator.add, added) if added else x
        x = x * c.hidden_size**0.5 if c.norm == "gemma" else x
        norm = _norm_of(c)
        x = norm(name="embedding_norm")(x) if c.embedding_norm else x
        bias = mask_bias(mask)
        if c.relative_buckets:
            table = self.param("relative_bias", init, (c.relative_buckets, c.num_heads))
            bias = bias + relative_bias(table, length, True, c.relative_buckets, RELATIVE_DISTANCE)
        tables = _tables(c, length)
        if c.local:
            tables = jax.tree.map(lambda *both: jnp.stack(both), tables, _tables(c, length, local=True))
        axes: Any = {"variable_axes": {"params": 0}, "in_axes": (nn.broadcast, nn.broadcast, 0, 0)}
        axes["check_constancy_invariants"] = False  # would trace the layer twice
        is_local = jnp.asarray(c.local, jnp.int32) if c.local else None
        bare = jnp.arange(c.num_layers) == 0 if c.bare_first else None
        unstacked: Any = None if self.is_initializing() else self.get_variable("params", "layers")
        if isinstance(unstacked, list):  # see `unstack_layers`
            for i, params in enumerate(unstacked):
                of_layer = (None if a is None else a[i] for a in (is_local, bare))
                x, _ = EncoderLayer(c, parent=None).apply({"params": params}, x, bias, tables, *of_layer)
        else:
            layers = nn.scan(EncoderLayer, **axes, split_rngs={"params": True}, length=c.num_layers)(c, name="layers")
            x, _ = layers(x, bias, tables, is_local, bare)
        x = x if c.norm_behind else norm(name="final_norm")(x)
        first = jnp.tanh(Dense(c.hidden_size, name="pooler")(x[:, 0])) if c.pooler else x[:, 0]
        return first if pooled else x


def _head_width(config: TextEncoderConfig) -> int:
    return config.head_width or config.hidden_size // config.num_heads


def _tables(config: TextEncoderConfig, length: int, local: bool = False) -> tuple[Any, Any]:
    """What global or local layers add to their scores, and their rotary tables."""
    window, theta = (config.window, config.local_theta) if local else (None, config.rotary_theta)
    bias = window_bias(length, causal=config.causal, window=window) if config.causal or config.local else None
    return bias, rotary_tables(length, _head_width(config), theta) if theta else None


def encoder_network(config: EncoderConfig, **options: Any) -> Network:
    """The network that a configuration describes."""
    return T5Encoder(config, **options) if isinstance(config, T5Config) else TextEncoder(config, **options)
