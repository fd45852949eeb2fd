"""Text encoders as transformers has them: tiny random ones of every architecture, their files and their outputs."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from torch import nn
from transformers import PreTrainedModel

from tests.helpers.equivalence import Case


def randomize(model: nn.Module, seed: int) -> None:
    """Weights large enough that outputs depend on everything: no scale is 1, no bias 0, and no logits are flat.

    They are numpy's, and the model computes in float64: torch's normal numbers and its rounding in float32 differ
    from one processor to the next.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)))
            if p.ndim < 2:
                is_scale = "norm" in name.lower() and name.endswith("weight")
                value = 1 + 0.3 * noise if is_scale else 0.3 * noise
                value = 3 * value if "final" in name else value
            elif "shared" in name:
                value = 0.6 * noise  # small beside the layers' outputs, or a tied head repeats its input
            elif "embed" in name and "transform" not in name or "relative" in name:
                value = noise
            else:
                value = noise * p.shape[1] ** -0.5
            p.copy_(value.half())
    model.double().eval()


def make_inputs(seed: int, vocab: int, batch: int = 4, source: int = 9, target: int = 7) -> Any:
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, vocab, (batch, source))
    lengths = np.array([source, *rng.integers(2, source, batch - 1)])
    mask = (np.arange(source) < lengths[:, None]).astype(np.int64)
    labels = rng.integers(2, vocab, (batch, target))
    return tuple(torch.from_numpy(a) for a in (ids * mask, mask, labels))


def to_numpy(**tensors: torch.Tensor) -> Case:
    return {
        name.replace("__", "/"): t.to(torch.float32 if t.is_floating_point() else torch.int32).numpy()
        for name, t in tensors.items()
    }


_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
_DISTILBERT = {
    "vocab_size": 64,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 24,
}
_T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
_ENDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_MODERN = {**_ENDS, "cls_token_id": 2, "sep_token_id": 1, "local_attention": 6, "num_hidden_layers": 4}
_DECODER = {**_SIZES, **_ENDS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
_GEMMA = {**_DECODER, "num_hidden_layers": 3, "sliding_window": 4, "query_pre_attn_scalar": 10}
_GEMMA |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
_VISION |= {"image_size": 4, "patch_size": 2}
_CLIP = {**_SIZES, "projection_dim": 12, "eos_token_id": 1}

# Golden file -> (configuration class, model class, sizes, pooling)
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertModel", _SIZES, "pooler"),
    "distilbert": ("DistilBertConfig", "DistilBertModel", _DISTILBERT, "mean"),
    "roberta": ("RobertaConfig", "RobertaModel", {**_SIZES, "type_vocab_size": 1}, "mean"),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaModel", {**_SIZES, "type_vocab_size": 1}, "cls"),
    "mpnet": ("MPNetConfig", "MPNetModel", _SIZES, "mean"),
    "dpr_question": ("DPRConfig", "DPRQuestionEncoder", _SIZES, "cls"),
    "dpr_context": ("DPRConfig", "DPRContextEncoder", _SIZES, "cls"),
    "t5_encoder": ("T5Config", "T5EncoderModel", _T5, "mean"),
    "t5_v1_1_encoder": ("T5Config", "T5EncoderModel", {**_T5, "feed_forward_proj": "gated-gelu"}, "mean"),
    "nomic_bert": ("NomicBertConfig", "NomicBertModel", _SIZES, "mean"),
    "modernbert": ("ModernBertConfig", "ModernBertModel", {**_SIZES, **_MODERN}, "mean"),
    "clip_text": ("CLIPTextConfig", "CLIPTextModelWithProjection", {**_CLIP, "hidden_act": "gelu"}, "last"),
    "clip": ("CLIPConfig", "CLIPModel", {"text_config": _CLIP, "vision_config": _VISION, "projection_dim": 12}, "last"),
    "llama": ("LlamaConfig", "LlamaModel", _DECODER, "mean"),
    "mistral": ("MistralConfig", "MistralModel", {**_DECODER, "sliding_window": 4}, "last"),
    "qwen3": ("Qwen3Config", "Qwen3Model", _DECODER, "last"),
    "gemma3": ("Gemma3TextConfig", "Gemma3TextModel", _GEMMA, "last"),
    "gemma3_bidirectional": (
        *("Gemma3TextConfig", "Gemma3TextModel"),
        *({**_GEMMA, "use_bidirectional_attention": True}, "mean"),
    ),
}


def make_encoder(name: str, seed: int) -> PreTrainedModel:
    config, model, sizes, _ = MODELS[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    randomize(made, seed)
    return made


def saved(model: PreTrainedModel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and weights as transformers writes them: its files have other keys than its modules."""
    with tempfile.TemporaryDirectory() as folder:
        model.float().save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return config, load_file(Path(folder) / "model.safetensors")


def encoder_inputs(name: str, model: PreTrainedModel, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of texts of several lengths, padding behind them, and CLIP's end token at the end."""
    ids, mask, _ = make_inputs(seed, 64, source=17)
    if name.startswith("clip"):
        ids[torch.arange(len(ids)), mask.sum(1) - 1] = 1
    pad = getattr(model.config, "pad_token_id", None)
    return torch.where(mask == 1, ids, pad if isinstance(pad, int) else 0), mask


def encoder_outputs(
    name: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states, and vectors pooled as the model itself does it, else as its embedder's card says."""
    pooling = MODELS[name][3]
    with torch.no_grad():
        if name == "clip":
            return model.text_model(**inputs).last_hidden_state, model.get_text_features(**inputs).pooler_output
        out = model(**inputs, output_hidden_states=True)
    if name.startswith("dpr"):
        return out.hidden_states[-1], out.pooler_output
    hidden, mask = out.last_hidden_state, inputs["attention_mask"]
    pool: dict[str, Callable[[], torch.Tensor]] = {
        "pooler": lambda: out.pooler_output,
        "cls": lambda: hidden[:, 0],
        "last": lambda: hidden[torch.arange(len(mask)), mask.sum(1) - 1],
        "mean": lambda: torch.stack([row[: int(m.sum())].mean(0) for row, m in zip(hidden, mask, strict=True)]),
    }
    return hidden, out.text_embeds if name == "clip_text" else pool[pooling]()


def encoder_case(name: str, seed: int) -> Case:
    model = make_encoder(name, seed)
    ids, mask = encoder_inputs(name, model, seed)
    hidden, pooled = encoder_outputs(name, model, {"input_ids": ids, "attention_mask": mask})
    config, state = saved(model)
    # The image side is not ours to check, but its keys must not disturb.
    keep = {key: value for key, value in state.items() if "vision" not in key or "layernorm" in key}
    return {
        "config": np.array(json.dumps(config)),
        "pooling": np.array(MODELS[name][3]),
        **{f"state/{key}": value.astype(np.float16) for key, value in keep.items()},
        **to_numpy(ids=ids, mask=mask, hidden=hidden, pooled=pooled),
    }
