"""Text encoders from Hugging Face: what a `config.json` means to us, and each architecture's key names beside ours.

transformers reads config.json and fills in what it leaves out; what it would compute and we don't is refused, never
ignored.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np

from v2t_jax.config import Dtype, T5Config
from v2t_jax.errors import InputError
from v2t_jax.interop import hf_t5
from v2t_jax.interop.files import Tensor, fill, part, size
from v2t_jax.models import encoders
from v2t_jax.models.encoders import BertConfig, EncoderConfig, LlamaConfig
from v2t_jax.models.layers import Params

Json = dict[str, Any]
Kind = TypeVar("Kind", bound=encoders.TextEncoderConfig)

# Our sizes under their names. Architectures with names of their own come first: transformers leaves Nomic's as they
# are and fills in defaults under BERT's.
_SIZES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("dim", "n_embd", "hidden_size"),
    "num_layers": ("n_layers", "n_layer", "num_hidden_layers"),
    "num_heads": ("n_heads", "n_head", "num_attention_heads"),
    "intermediate_size": ("hidden_dim", "n_inner", "intermediate_size"),
    "max_positions": ("max_position_embeddings",),
    "type_vocab_size": ("type_vocab_size",),
    "num_key_value_heads": ("num_key_value_heads",),
}
_EPSILONS = ("norm_eps", "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


def _read(kind: type[Kind], config: Json, dtype: Dtype, *names: str, **settings: Any) -> Kind:
    """The sizes that every encoder has and those of `names`; `settings` come before what the file says."""
    settings |= {n: size(config, *_SIZES[n]) for n in (*list(_SIZES)[:5], *names) if n not in settings}
    epsilon = next((name for name in _EPSILONS if name in config), None)  # DistilBERT's isn't written down
    if epsilon is not None:
        if not 0 < config[epsilon] <= sys.float_info.max:
            raise InputError(f"config.json has {epsilon} = {config[epsilon]!r}; it must be a positive number.")
        settings["norm_epsilon"] = float(config[epsilon])
    read = kind(**settings, dtype=dtype)
    if not read.head_width and read.hidden_size % read.num_heads:
        raise InputError(f"config.json has hidden size {read.hidden_size}, which {read.num_heads} heads don't divide.")
    if read.num_heads % (groups := read.num_key_value_heads or 1):
        raise InputError(f"config.json has num_key_value_heads = {groups}, which must divide num_attention_heads.")
    return read


def _only(config: Json, **supported: Any) -> None:
    """Refuses other values than these; an absent setting has them."""
    for name, value in supported.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if config.get(name) is not None and config[name] not in allowed:
            listed = " or ".join(map(repr, allowed))
            raise InputError(f"config.json has {name} = {config[name]!r}; only {listed} is supported.")


def _rotary(config: Json) -> dict[str, float]:
    """The rotary bases of global and of local layers; a file may have one for both."""
    bases: dict[str, float] = {}
    for name, layers in (("rotary_theta", "full_attention"), ("local_theta", "sliding_attention")):
        rotary = config["rope_parameters"].get(layers, config["rope_parameters"])
        if (kind := rotary["rope_type"]) != "default":
            raise InputError(f"config.json has rotary positions of type {kind!r}; only 'default' is supported.")
        bases[name] = float(rotary["rope_theta"])
    return bases


def _local(config: Json, window: int) -> dict[str, Any]:
    """Which layers attend to tokens at most `window` away only."""
    kinds = config["layer_types"]
    if unknown := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        raise InputError(f"config.json has layers of type {unknown[0]!r}; supported are full and sliding attention.")
    return {"local": tuple(kind == "sliding_attention" for kind in kinds), "window": window}


def _bert(config: Json, dtype: Dtype, **settings: Any) -> BertConfig:
    _only(config, hidden_act="gelu", activation="gelu", is_decoder=False, projection_dim=0)
    _only(config, position_embedding_type="absolute")
    return _read(BertConfig, config, dtype, "max_positions", "type_vocab_size", **settings)


def _roberta(config: Json, dtype: Dtype) -> BertConfig:
    pad_id = config.get("pad_token_id")
    if type(pad_id) is not int or not 0 <= pad_id < config["max_position_embeddings"] - 1:
        raise InputError(f"config.json has pad_token_id = {pad_id!r}; it must be a token, as positions count from it.")
    return _bert(config, dtype, pad_id=pad_id)


def _mpnet(config: Json, dtype: Dtype) -> BertConfig:
    # transformers' MPNet counts positions from 1 and uses 32 buckets, whatever the config says.
    _only(config, relative_attention_num_buckets=32, pad_token_id=1)
    return _bert(config, dtype, type_vocab_size=0, pad_id=1, relative_buckets=32)


def _t5(config: Json, dtype: Dtype) -> T5Config:
    # An encoder's file may leave out or zero what is the decoder's.
    return replace(hf_t5.t5_config(config | {"num_decoder_layers": 1}), dtype=dtype)


def _nomic(config: Json, dtype: Dtype) -> encoders.NomicBertConfig:
    # Its files are spelled like GPT-2's or, since transformers 5, like BERT's.
    _only(config, hidden_act="silu", activation_function="swiglu", prenorm=False, use_rms_norm=False, causal=False)
    _only(config, qkv_proj_bias=False, mlp_fc1_bias=False, mlp_fc2_bias=False, parallel_block=False)
    _only(config, rotary_emb_fraction=1.0, rotary_emb_interleaved=False, rotary_scaling_factor=None, num_experts=(0, 1))
    theta = float(config.get("rotary_emb_base") or _rotary(config)["rotary_theta"])
    read = _read(encoders.NomicBertConfig, config, dtype, "type_vocab_size", rotary_theta=theta)
    if "n_embd" not in config:
        _only(config, head_dim=read.hidden_size // read.num_heads)
    return read


def _modernbert(config: Json, dtype: Dtype) -> encoders.ModernBertConfig:
    _only(config, hidden_activation="gelu", norm_bias=False, attention_bias=False, mlp_bias=False)
    local = _local(config, size(config, "local_attention") // 2)
    return _read(encoders.ModernBertConfig, config, dtype, **local, **_rotary(config))


def _llama(config: Json, dtype: Dtype, **settings: Any) -> LlamaConfig:
    _only(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    settings |= {"head_width": config.get("head_dim") or 0, **_rotary(config)}
    return _read(LlamaConfig, config, dtype, "num_key_value_heads", **settings)


def _mistral(config: Json, dtype: Dtype) -> LlamaConfig:
    if config["sliding_window"] is None:
        return _llama(config, dtype)
    layers, window = size(config, "num_hidden_layers"), size(config, "sliding_window")
    return _llama(config, dtype, local=(True,) * layers, window=window - 1)  # a window counts the token itself


def _qwen3(config: Json, dtype: Dtype) -> LlamaConfig:
    local = {} if config["sliding_window"] is None else _local(config, size(config, "sliding_window") - 1)
    return _llama(config, dtype, head_norms=True, **local)


def _gemma3(config: Json, dtype: Dtype) -> LlamaConfig:
    _only(config, hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=None)
    both_ways, window = bool(config.get("use_bidirectional_attention")), size(config, "sliding_window")
    settings: Json = {"activation": "gelu_tanh", "norm": "gemma", "head_norms": True}
    # When attention goes both ways, transformers halves the window.
    settings |= {"causal": not both_ways, **_local(config, window // 2 if both_ways else window - 1)}
    return _llama(config, dtype, **settings, attention_scale=size(config, "query_pre_attn_scalar") ** -0.5)


def _clip(config: Json, dtype: Dtype) -> encoders.ClipTextConfig:
    config = config.get("text_config") or config
    _only(config, hidden_act=("quick_gelu", "gelu"))
    return _read(encoders.ClipTextConfig, config, dtype, "max_positions", activation=config["hidden_act"])


@dataclass(frozen=True)
class Architecture:
    """One `model_type`."""

    config: Callable[[Json, Dtype], EncoderConfig]
    table: Mapping[str, str]  # see `files.places`
    prefixes: tuple[str, ...] = ()  # of all the encoder's keys; keys without it are then another task's heads
    ignored: str = r"pooler\..*|.*position_ids"  # keys that may be there and aren't read


def _table(text: str) -> dict[str, str]:
    """`ours=theirs`, separated by blanks: modules on their own, then, behind `stack:`, those of its layers."""
    table: dict[str, str] = {}
    ours = theirs = ""
    for word in text.split():
        if word.endswith(":"):
            ours, theirs = "layers/", word[:-1]
        else:
            module, _, key = word.partition("=")
            table[ours + module] = theirs + key
    return table


_BERT = _table("""
    word_embedding=embeddings.word_embeddings position_embedding=embeddings.position_embeddings
    type_embedding=embeddings.token_type_embeddings embedding_norm=embeddings.LayerNorm pooler=pooler.dense
    encoder.layer.{}.: query=attention.self.query key=attention.self.key value=attention.self.value
    attention_out=attention.output.dense attention_norm=attention.output.LayerNorm
    intermediate=intermediate.dense output=output.dense output_norm=output.LayerNorm""")
_DISTILBERT = _BERT | _table("""
    transformer.layer.{}.: query=attention.q_lin key=attention.k_lin value=attention.v_lin
    attention_out=attention.out_lin attention_norm=sa_layer_norm
    intermediate=ffn.lin1 output=ffn.lin2 output_norm=output_layer_norm""")
_MPNET = _BERT | _table("""
    relative_bias=encoder.relative_attention_bias
    encoder.layer.{}.attention.: query=attn.q key=attn.k value=attn.v attention_out=attn.o attention_norm=LayerNorm""")
_NOMIC = _BERT | _table("""
    embedding_norm=emb_ln
    encoder.layers.{}.: query=attn.Wqkv[0/3] key=attn.Wqkv[1/3] value=attn.Wqkv[2/3] attention_out=attn.out_proj
    attention_norm=norm1 up=mlp.fc11 gate=mlp.fc12 down=mlp.fc2 output_norm=norm2""")
_MODERNBERT = _table("""
    word_embedding=embeddings.tok_embeddings embedding_norm=embeddings.norm final_norm=final_norm
    layers.{}.: query=attn.Wqkv[0/3] key=attn.Wqkv[1/3] value=attn.Wqkv[2/3] attention_out=attn.Wo
    attention_norm=attn_norm gate=mlp.Wi[0/2] up=mlp.Wi[1/2] down=mlp.Wo feed_forward_norm=mlp_norm""")
_LLAMA = _table("""
    word_embedding=embed_tokens final_norm=norm
    layers.{}.: query=self_attn.q_proj key=self_attn.k_proj value=self_attn.v_proj attention_out=self_attn.o_proj
    query_norm=self_attn.q_norm key_norm=self_attn.k_norm attention_norm=input_layernorm
    gate=mlp.gate_proj up=mlp.up_proj down=mlp.down_proj feed_forward_norm=post_attention_layernorm""")
_GEMMA3 = _LLAMA | _table("""
    layers.{}.: attention_out_norm=post_attention_layernorm feed_forward_norm=pre_feedforward_layernorm
    feed_forward_out_norm=post_feedforward_layernorm""")
_CLIP = _table("""
    word_embedding=embeddings.token_embedding position_embedding=embeddings.position_embedding
    final_norm=final_layer_norm
    encoder.layers.{}.: query=self_attn.q_proj key=self_attn.k_proj value=self_attn.v_proj
    attention_out=self_attn.out_proj attention_norm=layer_norm1
    intermediate=mlp.fc1 output=mlp.fc2 feed_forward_norm=layer_norm2""")


def _static(config: Json, dtype: Dtype) -> encoders.StaticConfig:
    return encoders.StaticConfig(size(config, "vocab_size"), size(config, "hidden_size"), dtype=dtype)


_HEADS = r"lm_head\..*|.*inv_freq"
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(_bert, _BERT, ("bert.",)),
    "distilbert": Architecture(functools.partial(_bert, type_vocab_size=0), _DISTILBERT, ("distilbert.",)),
    **dict.fromkeys(("roberta", "xlm-roberta"), Architecture(_roberta, _BERT, ("roberta.",))),
    "mpnet": Architecture(_mpnet, _MPNET, ("mpnet.",)),
    "dpr": Architecture(_bert, _BERT, ("question_encoder.bert_model.", "ctx_encoder.bert_model.")),
    "t5": Architecture(_t5, hf_t5.TABLE, ignored=r"decoder\..*|lm_head\.weight|encoder\.embed_tokens\.weight"),
    "nomic_bert": Architecture(_nomic, _NOMIC),
    "modernbert": Architecture(_modernbert, _MODERNBERT, ("model.",)),
    "llama": Architecture(_llama, _LLAMA, ("model.",), ignored=_HEADS),
    "mistral": Architecture(_mistral, _LLAMA, ("model.",), ignored=_HEADS),
    "qwen3": Architecture(_qwen3, _LLAMA, ("model.",), ignored=_HEADS),
    "gemma3_text": Architecture(_gemma3, _GEMMA3, ("model.",), ignored=_HEADS),
    "static": Architecture(_static, _table("word_embedding=embedding"), ignored=""),
    **dict.fromkeys(("clip", "clip_text_model"), Architecture(_clip, _CLIP, ("text_model.",))),
}


def encoder_config(config: Json, dtype: Dtype = "float32") -> EncoderConfig:
    """An encoder's configuration from its `config.json`, completed (see `complete_config`)."""
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        raise InputError(f"config.json has model_type {name!r}; supported are {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name].config(config, dtype)


def longest_text(encoder: EncoderConfig, config: Json) -> int | None:
    """Tokens that an encoder has positions for; None where there is no limit."""
    if isinstance(encoder, T5Config):
        return None
    if encoder.max_positions:
        return encoder.max_positions - (0 if encoder.pad_id is None else encoder.pad_id + 1)
    return size(config, "n_positions", "max_position_embeddings")


def encoder_from_huggingface(
    tensors: Mapping[str, Tensor], model_type: str, config: EncoderConfig, put: Callable = jax.device_put
) -> Params:
    """Parameters from a checkpoint of this architecture, array by array; `put` takes each."""
    architecture = ARCHITECTURES[model_type]
    for prefix in architecture.prefixes:
        tensors = part(tensors, prefix) or tensors
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):  # TensorFlow's
        tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    if isinstance(config, encoders.ModernBertConfig):  # the one norm that isn't used isn't stored
        tensors = {"layers.0.attn_norm.weight": np.zeros(config.hidden_size, np.float32), **tensors}
    abstract = encoders.encoder_network(config).abstract_params()
    ignored, dtype = architecture.ignored, config.dtype
    return fill(abstract, architecture.table, tensors, model_type, ignored=ignored, dtype=dtype, put=put)
