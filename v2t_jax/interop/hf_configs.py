"""Text encoders from Hugging Face: what each architecture's `config.json` means to us.

What transformers would compute and we don't is refused, never ignored.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from v2t_jax.config import Dtype, T5Config
from v2t_jax.errors import InputError
from v2t_jax.interop.files import number, size
from v2t_jax.interop.hf_t5 import t5_config_from_huggingface
from v2t_jax.models.bert import BertConfig
from v2t_jax.models.clip_text import ClipTextConfig
from v2t_jax.models.embedder import EncoderConfig
from v2t_jax.models.llama import LlamaConfig
from v2t_jax.models.modernbert import ModernBertConfig
from v2t_jax.models.nomic_bert import NomicBertConfig

Json = dict[str, Any]


def _only(config: Json, **supported: Any) -> None:
    """Refuses other values than these; what is left out has them."""
    for name, value in supported.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if config.get(name) is not None and config[name] not in allowed:
            listed = " or ".join(map(repr, allowed))
            raise InputError(f"config.json says {name} = {config[name]!r}; only {listed} is read.")


def _heads(hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise InputError(f"config.json says hidden size {hidden_size} and {num_heads} heads, which doesn't divide it.")
    return num_heads


def _rotary_theta(config: Json, layers: str | None, *names: str, default: float) -> float:
    """The rotary base; newer files hold it in `rope_parameters`, by kind of layer where there are several."""
    rotary = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling")
    if layers is not None:
        rotary = rotary.get(layers) or {}
    for settings in (rotary, scaling or {}):
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise InputError(f"config.json asks for rotary positions of the type {kind!r}; only 'default' is read.")
    return number(rotary, "rope_theta", default=number(config, *names, default=default))


def _local_layers(config: Json, num_layers: int, otherwise: Callable[[int], bool]) -> tuple[bool, ...]:
    """Which layers attend locally; older files give a rule rather than a list."""
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(otherwise(i) for i in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise InputError(f"config.json's layer_types must be a list with one entry for each of {num_layers} layers.")
    if unknown := sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}):
        raise InputError(f"config.json has layers of the type {unknown[0]!r}; full and sliding attention are read.")
    return tuple(kind == "sliding_attention" for kind in kinds)


def bert(config: Json, dtype: Dtype) -> BertConfig:
    _only(config, hidden_act="gelu", position_embedding_type="absolute", is_decoder=False, projection_dim=0)
    hidden_size = size(config, "hidden_size")
    return BertConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=size(config, "num_hidden_layers"),
        num_heads=_heads(hidden_size, size(config, "num_attention_heads")),
        intermediate_size=size(config, "intermediate_size"),
        max_positions=size(config, "max_position_embeddings"),
        type_vocab_size=size(config, "type_vocab_size", default=2),
        layer_norm_epsilon=number(config, "layer_norm_eps", default=1e-12),
        dtype=dtype,
    )


def distilbert(config: Json, dtype: Dtype) -> BertConfig:
    _only(config, activation="gelu")
    names = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    names["hidden_dim"] = "intermediate_size"
    for theirs in names:
        size(config, theirs)
    read = bert({**config, **{ours: config[theirs] for theirs, ours in names.items()}}, dtype)
    return replace(read, type_vocab_size=0)


def _pad_id(config: Json) -> int:
    value = config.get("pad_token_id", 1)
    if not isinstance(value, int) or not 0 <= value < size(config, "max_position_embeddings") - 1:
        raise InputError(f"config.json says pad_token_id = {value!r}; positions count from it, so it must be one.")
    return value


def roberta(config: Json, dtype: Dtype) -> BertConfig:
    return replace(bert(config, dtype), pad_id=_pad_id(config))


def mpnet(config: Json, dtype: Dtype) -> BertConfig:
    # Its implementation counts positions from 1 and buckets by 32, whatever the config says.
    _only(config, relative_attention_num_buckets=32, pad_token_id=1)
    return replace(bert(config, dtype), type_vocab_size=0, pad_id=1, relative_buckets=32)


def t5_encoder(config: Json, dtype: Dtype) -> T5Config:
    # An encoder's file may leave out or zero what is the decoder's.
    return replace(t5_config_from_huggingface({**config, "num_decoder_layers": 1}), dtype=dtype)


def nomic(config: Json, dtype: Dtype) -> NomicBertConfig:
    # Its files are spelt as GPT-2's or, since transformers 5, as BERT's.
    _only(config, hidden_act="silu", activation_function="swiglu", prenorm=False, use_rms_norm=False, causal=False)
    _only(config, qkv_proj_bias=False, mlp_fc1_bias=False, mlp_fc2_bias=False, parallel_block=False)
    _only(config, rotary_emb_fraction=1.0, rotary_emb_interleaved=False, num_experts=(0, 1))
    if config.get("rotary_scaling_factor") is not None:
        raise InputError(
            "config.json asks for a rotary_scaling_factor, which isn't read; remove it to read 2048 tokens."
        )
    hidden_size = size(config, "hidden_size", "n_embd")
    num_heads = _heads(hidden_size, size(config, "num_attention_heads", "n_head"))
    _only(config, head_dim=hidden_size // num_heads)
    return NomicBertConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=size(config, "num_hidden_layers", "n_layer"),
        num_heads=num_heads,
        intermediate_size=size(config, "intermediate_size", "n_inner"),
        type_vocab_size=size(config, "type_vocab_size", default=2),
        rotary_theta=_rotary_theta(config, None, "rotary_emb_base", default=1000.0),
        layer_norm_epsilon=number(config, "layer_norm_eps", "layer_norm_epsilon", default=1e-12),
        dtype=dtype,
    )


def modernbert(config: Json, dtype: Dtype) -> ModernBertConfig:
    _only(config, hidden_activation="gelu", norm_bias=False, attention_bias=False, mlp_bias=False)
    hidden_size = size(config, "hidden_size")
    every = size(config, "global_attn_every_n_layers", default=3)
    return ModernBertConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        num_heads=_heads(hidden_size, size(config, "num_attention_heads")),
        intermediate_size=size(config, "intermediate_size"),
        local=_local_layers(config, size(config, "num_hidden_layers"), lambda i: i % every != 0),
        reach=size(config, "local_attention", default=128) // 2,
        local_theta=_rotary_theta(config, "sliding_attention", "local_rope_theta", default=10_000.0),
        global_theta=_rotary_theta(config, "full_attention", "global_rope_theta", default=160_000.0),
        layer_norm_epsilon=number(config, "norm_eps", default=1e-5),
        dtype=dtype,
    )


def _decoder(config: Json, dtype: Dtype) -> LlamaConfig:
    """What the Llama-like have in common."""
    _only(config, attention_bias=False, mlp_bias=False)
    hidden_size, num_heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    num_key_value_heads = size(config, "num_key_value_heads", default=num_heads)
    if num_heads % num_key_value_heads:
        raise InputError(
            f"config.json says num_key_value_heads = {num_key_value_heads}, which must divide the {num_heads} heads."
        )
    return LlamaConfig(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_width=size(config, "head_dim", default=hidden_size // _heads(hidden_size, num_heads)),
        intermediate_size=size(config, "intermediate_size"),
        local=(False,) * size(config, "num_hidden_layers"),
        rms_norm_epsilon=number(config, "rms_norm_eps", default=1e-6),
        dtype=dtype,
    )


def llama(config: Json, dtype: Dtype) -> LlamaConfig:
    _only(config, hidden_act="silu")
    theta = _rotary_theta(config, None, "rope_theta", default=10_000.0)
    return replace(_decoder(config, dtype), rotary_theta=theta, local_theta=theta)


def mistral(config: Json, dtype: Dtype) -> LlamaConfig:
    read = llama(config, dtype)
    if config.get("sliding_window") is None:
        return read
    # A window counts the token itself.
    return replace(read, local=(True,) * len(read.local), reach=size(config, "sliding_window") - 1)


def qwen3(config: Json, dtype: Dtype) -> LlamaConfig:
    read = replace(llama(config, dtype), head_norms=True)
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return read
    first = config.get("max_window_layers", 28)
    local = _local_layers(config, len(read.local), lambda i: i >= first)
    return replace(read, local=local, reach=size(config, "sliding_window") - 1)


def gemma3(config: Json, dtype: Dtype) -> LlamaConfig:
    _only(config, hidden_activation="gelu_pytorch_tanh")
    if config.get("attn_logit_softcapping") is not None:
        raise InputError("config.json asks for attn_logit_softcapping, which isn't read.")
    read = _decoder({"head_dim": 256, **config}, dtype)
    both_ways = bool(config.get("use_bidirectional_attention"))
    pattern = size(config, "sliding_window_pattern", "_sliding_window_pattern", default=6)
    window = size(config, "sliding_window", default=4096)
    return replace(
        read,
        local=_local_layers(config, len(read.local), lambda i: (i + 1) % pattern != 0),
        # A window counts the token itself, and both ways it is halved.
        reach=window // 2 if both_ways else window - 1,
        causal=not both_ways,
        rotary_theta=_rotary_theta(config, "full_attention", "rope_theta", default=1_000_000.0),
        local_theta=_rotary_theta(config, "sliding_attention", "rope_local_base_freq", default=10_000.0),
        head_norms=True,
        gemma=True,
        attention_scale=number(config, "query_pre_attn_scalar", default=256) ** -0.5,
    )


def clip(config: Json, dtype: Dtype) -> ClipTextConfig:
    config = config.get("text_config", config)
    _only(config, hidden_act=("quick_gelu", "gelu"))
    hidden_size = size(config, "hidden_size", default=512)
    return ClipTextConfig(
        vocab_size=size(config, "vocab_size", default=49408),
        hidden_size=hidden_size,
        num_layers=size(config, "num_hidden_layers", default=12),
        num_heads=_heads(hidden_size, size(config, "num_attention_heads", default=8)),
        intermediate_size=size(config, "intermediate_size", default=2048),
        max_positions=size(config, "max_position_embeddings", default=77),
        activation=config.get("hidden_act") or "quick_gelu",
        layer_norm_epsilon=number(config, "layer_norm_eps", default=1e-5),
        dtype=dtype,
    )


def longest_text(config: EncoderConfig, json: Json) -> int | None:
    """Tokens that an encoder has positions for; None where there is no limit."""
    if isinstance(config, BertConfig):
        return config.max_positions - (0 if config.pad_id is None else config.pad_id + 1)
    if isinstance(config, ClipTextConfig):
        return config.max_positions
    return None if isinstance(config, T5Config) else size(json, "max_position_embeddings", "n_positions")
