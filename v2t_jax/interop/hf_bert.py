"""BERT between Hugging Face's key names and ours."""

from typing import Any

import numpy as np

from v2t_jax.errors import InputError
from v2t_jax.models.bert import BertConfig
from v2t_jax.models.layers import Params

# (Hugging Face's key, our path). Torch keeps linear weights as [out, in]; ours are [in, out].
_TABLES = (
    ("embeddings.word_embeddings.weight", "word_embedding"),
    ("embeddings.position_embeddings.weight", "position_embedding"),
    ("embeddings.token_type_embeddings.weight", "type_embedding"),
)
_LINEAR = (
    ("attention.self.query", "query"),
    ("attention.self.key", "key"),
    ("attention.self.value", "value"),
    ("attention.output.dense", "attention_out"),
    ("intermediate.dense", "intermediate"),
    ("output.dense", "output"),
)
_NORMS = (("attention.output.LayerNorm", "attention_norm"), ("output.LayerNorm", "output_norm"))
_IGNORED = ("embeddings.position_ids",)  # a constant buffer that old checkpoints hold


def bert_from_huggingface(state: dict[str, np.ndarray], config: BertConfig) -> Params:
    """Parameters from a state dict of `BertModel` (with or without the prefix `bert.`).

    Raises:
        InputError: a key is missing, unknown, or of a shape that `config` doesn't mean.
    """
    state = {key.removeprefix("bert."): value for key, value in state.items()}
    used = set(_IGNORED)

    def take(key: str, shape: tuple[int, ...]) -> np.ndarray:
        if key not in state:
            raise InputError(f"The BERT weights lack {key!r}; the file is incomplete or of another architecture.")
        if state[key].shape != shape:
            raise InputError(f"BERT weight {key!r} has shape {state[key].shape}; its config means {shape}.")
        used.add(key)
        return np.asarray(state[key], np.float32)

    def linear(key: str, num_in: int, num_out: int) -> Params:
        return {"kernel": take(f"{key}.weight", (num_out, num_in)).T, "bias": take(f"{key}.bias", (num_out,))}

    def norm(key: str) -> Params:
        return {"scale": take(f"{key}.weight", (width,)), "bias": take(f"{key}.bias", (width,))}

    width, ff = config.hidden_size, config.intermediate_size
    sizes = {"intermediate": (width, ff), "output": (ff, width)}
    rows = {"word_embedding": config.vocab_size, "position_embedding": config.max_positions}
    params: dict[str, Any] = {
        ours: take(theirs, (rows.get(ours, config.type_vocab_size), width)) for theirs, ours in _TABLES
    }
    params["embedding_norm"] = norm("embeddings.LayerNorm")
    layers = []
    for i in range(config.num_layers):
        prefix = f"encoder.layer.{i}."
        layer = {ours: linear(prefix + theirs, *sizes.get(ours, (width, width))) for theirs, ours in _LINEAR}
        layers.append(layer | {ours: norm(prefix + theirs) for theirs, ours in _NORMS})
    params["layers"] = {
        name: {part: np.stack([layer[name][part] for layer in layers]) for part in layers[0][name]}
        for name in layers[0]
    }
    if config.pooler:
        params["pooler"] = linear("pooler.dense", width, width)
    else:
        used |= {"pooler.dense.weight", "pooler.dense.bias"}  # saved by AutoModel whether or not it is used
    unknown = sorted(set(state) - used)
    if unknown:
        raise InputError(f"The BERT weights hold the unknown key {unknown[0]!r}; is this another architecture?")
    return params
