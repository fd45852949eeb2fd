"""Text encoders from Hugging Face: each architecture's key names beside ours.

A table maps our module to theirs: `kernel` and `scale` are their `weight`, {} is the layer's number, and (key, i, n) is
the i-th of n matrices that they store as one.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax

from v2t_jax.config import Dtype, T5Config
from v2t_jax.errors import InputError
from v2t_jax.interop import hf_configs
from v2t_jax.interop.hf_configs import Json
from v2t_jax.interop.hf_t5 import stack_entries
from v2t_jax.interop.weights import Entry, Tensor, fill
from v2t_jax.models.embedder import NETWORKS, EncoderConfig
from v2t_jax.models.layers import Params

Source = str | tuple[str, int, int]


@dataclass(frozen=True)
class Architecture:
    """One `model_type`."""

    config: Callable[[Json, Dtype], EncoderConfig]
    table: Mapping[str, Source]
    prefixes: tuple[str, ...] = ()
    """with which all keys of the encoder may begin; keys without it are then another task's heads"""
    absent: tuple[str, ...] = ()
    """keys of the table that no file has"""
    ignored: str = r"pooler\..*|.*position_ids"
    """keys that may be there and aren't read"""


_BERT: dict[str, Source] = {
    "word_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "type_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers/query": "encoder.layer.{}.attention.self.query",
    "layers/key": "encoder.layer.{}.attention.self.key",
    "layers/value": "encoder.layer.{}.attention.self.value",
    "layers/attention_out": "encoder.layer.{}.attention.output.dense",
    "layers/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers/intermediate": "encoder.layer.{}.intermediate.dense",
    "layers/output": "encoder.layer.{}.output.dense",
    "layers/output_norm": "encoder.layer.{}.output.LayerNorm",
    "pooler": "pooler.dense",
}
_DISTILBERT: dict[str, Source] = {
    "word_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "layers/query": "transformer.layer.{}.attention.q_lin",
    "layers/key": "transformer.layer.{}.attention.k_lin",
    "layers/value": "transformer.layer.{}.attention.v_lin",
    "layers/attention_out": "transformer.layer.{}.attention.out_lin",
    "layers/attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layers/intermediate": "transformer.layer.{}.ffn.lin1",
    "layers/output": "transformer.layer.{}.ffn.lin2",
    "layers/output_norm": "transformer.layer.{}.output_layer_norm",
}
_MPNET: dict[str, Source] = {
    **_BERT,
    "relative_bias": "encoder.relative_attention_bias",
    "layers/query": "encoder.layer.{}.attention.attn.q",
    "layers/key": "encoder.layer.{}.attention.attn.k",
    "layers/value": "encoder.layer.{}.attention.attn.v",
    "layers/attention_out": "encoder.layer.{}.attention.attn.o",
    "layers/attention_norm": "encoder.layer.{}.attention.LayerNorm",
}
_NOMIC: dict[str, Source] = {
    "word_embedding": "embeddings.word_embeddings",
    "type_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "emb_ln",
    "layers/query": ("encoder.layers.{}.attn.Wqkv", 0, 3),
    "layers/key": ("encoder.layers.{}.attn.Wqkv", 1, 3),
    "layers/value": ("encoder.layers.{}.attn.Wqkv", 2, 3),
    "layers/attention_out": "encoder.layers.{}.attn.out_proj",
    "layers/attention_norm": "encoder.layers.{}.norm1",
    "layers/up": "encoder.layers.{}.mlp.fc11",
    "layers/gate": "encoder.layers.{}.mlp.fc12",
    "layers/down": "encoder.layers.{}.mlp.fc2",
    "layers/output_norm": "encoder.layers.{}.norm2",
}
_MODERNBERT: dict[str, Source] = {
    "word_embedding": "embeddings.tok_embeddings",
    "embedding_norm": "embeddings.norm",
    "layers/attention_norm": "layers.{}.attn_norm",
    "layers/query": ("layers.{}.attn.Wqkv", 0, 3),
    "layers/key": ("layers.{}.attn.Wqkv", 1, 3),
    "layers/value": ("layers.{}.attn.Wqkv", 2, 3),
    "layers/attention_out": "layers.{}.attn.Wo",
    "layers/feed_forward_norm": "layers.{}.mlp_norm",
    "layers/gate": ("layers.{}.mlp.Wi", 0, 2),
    "layers/up": ("layers.{}.mlp.Wi", 1, 2),
    "layers/down": "layers.{}.mlp.Wo",
    "final_norm": "final_norm",
}
_LLAMA: dict[str, Source] = {
    "word_embedding": "embed_tokens",
    "layers/attention_norm": "layers.{}.input_layernorm",
    "layers/query": "layers.{}.self_attn.q_proj",
    "layers/key": "layers.{}.self_attn.k_proj",
    "layers/value": "layers.{}.self_attn.v_proj",
    "layers/attention_out": "layers.{}.self_attn.o_proj",
    "layers/query_norm": "layers.{}.self_attn.q_norm",
    "layers/key_norm": "layers.{}.self_attn.k_norm",
    "layers/feed_forward_norm": "layers.{}.post_attention_layernorm",
    "layers/gate": "layers.{}.mlp.gate_proj",
    "layers/up": "layers.{}.mlp.up_proj",
    "layers/down": "layers.{}.mlp.down_proj",
    "final_norm": "norm",
}
_GEMMA3: dict[str, Source] = {
    **_LLAMA,
    "layers/attention_out_norm": "layers.{}.post_attention_layernorm",
    "layers/feed_forward_norm": "layers.{}.pre_feedforward_layernorm",
    "layers/feed_forward_out_norm": "layers.{}.post_feedforward_layernorm",
}
_CLIP: dict[str, Source] = {
    "word_embedding": "embeddings.token_embedding",
    "position_embedding": "embeddings.position_embedding",
    "layers/attention_norm": "encoder.layers.{}.layer_norm1",
    "layers/query": "encoder.layers.{}.self_attn.q_proj",
    "layers/key": "encoder.layers.{}.self_attn.k_proj",
    "layers/value": "encoder.layers.{}.self_attn.v_proj",
    "layers/attention_out": "encoder.layers.{}.self_attn.out_proj",
    "layers/feed_forward_norm": "encoder.layers.{}.layer_norm2",
    "layers/intermediate": "encoder.layers.{}.mlp.fc1",
    "layers/output": "encoder.layers.{}.mlp.fc2",
    "final_norm": "final_layer_norm",
}

_HEADS = r"lm_head\..*|.*inv_freq"
ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(hf_configs.bert, _BERT, ("bert.",)),
    "distilbert": Architecture(hf_configs.distilbert, _DISTILBERT, ("distilbert.",)),
    "roberta": Architecture(hf_configs.roberta, _BERT, ("roberta.",)),
    "xlm-roberta": Architecture(hf_configs.roberta, _BERT, ("roberta.",)),
    "mpnet": Architecture(hf_configs.mpnet, _MPNET, ("mpnet.",)),
    "dpr": Architecture(hf_configs.bert, _BERT, ("question_encoder.bert_model.", "ctx_encoder.bert_model.")),
    "t5": Architecture(hf_configs.t5_encoder, {}, ignored=r"decoder\..*|lm_head\.weight|encoder\.embed_tokens\.weight"),
    "nomic_bert": Architecture(hf_configs.nomic, _NOMIC),
    # Its embeddings are normalized already: the first layer has no norm in front.
    "modernbert": Architecture(hf_configs.modernbert, _MODERNBERT, ("model.",), absent=("layers.0.attn_norm.weight",)),
    "llama": Architecture(hf_configs.llama, _LLAMA, ("model.",), ignored=_HEADS),
    "mistral": Architecture(hf_configs.mistral, _LLAMA, ("model.",), ignored=_HEADS),
    "qwen3": Architecture(hf_configs.qwen3, _LLAMA, ("model.",), ignored=_HEADS),
    "gemma3_text": Architecture(hf_configs.gemma3, _GEMMA3, ("model.",), ignored=_HEADS),
    "clip": Architecture(hf_configs.clip, _CLIP, ("text_model.",)),
    "clip_text_model": Architecture(hf_configs.clip, _CLIP, ("text_model.",)),
}


def encoder_config(json: Json, dtype: Dtype = "float32") -> EncoderConfig:
    """An encoder's configuration from its `config.json`.

    Raises:
        InputError: the `model_type` isn't read, a size is missing or impossible, or a setting isn't supported.
    """
    name = json.get("model_type")
    if name not in ARCHITECTURES:
        raise InputError(f"config.json is of model_type {name!r}; those that are read are {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name].config(json, dtype)


def encoder_from_huggingface(
    tensors: Mapping[str, Tensor], model_type: str, config: EncoderConfig, put: Callable = jax.device_put
) -> Params:
    """Parameters from a checkpoint of this architecture, array by array; `put` takes each.

    Raises:
        InputError: a key is missing, unknown, or of a shape that `config` doesn't mean.
    """
    architecture = ARCHITECTURES[model_type]
    for prefix in architecture.prefixes:
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    # As TensorFlow's BERT named them; the oldest files still do.
    old = {".gamma": ".weight", ".beta": ".bias"}
    tensors = {re.sub(r"(?<=LayerNorm)\.(gamma|beta)$", lambda m: old[m[0]], key): t for key, t in tensors.items()}
    abstract = jax.eval_shape(functools.partial(NETWORKS[type(config)].init, config), jax.random.key(0))
    if isinstance(config, T5Config):
        entries = [
            Entry("shared.weight", ("word_embedding",), None, False),
            *stack_entries(config, "encoder", config.num_encoder_layers),
        ]
    else:
        entries = [
            entry
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
            for entry in _entries(architecture.table, tuple(step.key for step in path), leaf.shape)
            if entry.theirs not in architecture.absent
        ]
    ignored = re.compile(architecture.ignored)
    return fill(
        abstract, entries, tensors, model_type, lambda key: ignored.fullmatch(key) is not None, config.dtype, put
    )


def _entries(table: Mapping[str, Source], path: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[Entry]:
    """Their tensors for one array of ours."""
    module, part = (path[:-1], path[-1]) if path[-1] in ("kernel", "scale", "bias") else (path, "table")
    source = table["/".join(module)]
    key, i, n = (source, 0, 1) if isinstance(source, str) else source
    key += ".bias" if part == "bias" else ".weight"
    for layer in range(shape[0]) if path[0] == "layers" else [None]:
        yield Entry(key.format(layer), path, layer, part == "kernel", (i, n))
