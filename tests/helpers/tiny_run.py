"""A whole training setup small enough for tests: an embedder folder of 60 word-pieces, a text file and a recipe."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from v2t_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    T5Config,
)
from v2t_jax.models.encoders import BertConfig, TextEncoder

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = [
    *("a", "the", "one", "two", "red", "blue", "green", "old", "new", "big", "small", "very", "quickly", "slowly"),
    *("cat", "dog", "bird", "fish", "horse", "man", "woman", "child", "house", "tree", "river", "road", "boat"),
    *("hill", "sees", "finds", "likes", "takes", "leaves", "under", "over", "near", "behind", "with", "and", "or"),
    *("not", "today"),
]
PIECES = (*SPECIAL, *WORDS, "##s", "##ed", "##ing", *"bcdefghijkm")
BERT = BertConfig(vocab_size=60, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=32)


def make_tokenizer() -> Tokenizer:
    """A BERT-like word-piece tokenizer."""
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    made.add_special_tokens(list(SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def _huggingface_state(params: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Random BERT parameters under the key names of a published `model.safetensors`."""
    for theirs, ours in (("word", "word"), ("position", "position"), ("token_type", "type")):
        yield f"embeddings.{theirs}_embeddings.weight", params[f"{ours}_embedding"]
    norms = {"embeddings.LayerNorm": params["embedding_norm"]}
    modules = {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "attention_out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "intermediate",
        "output.dense": "output",
        "output.LayerNorm": "output_norm",
    }
    for i in range(BERT.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        norms |= {f"encoder.layer.{i}.{theirs}": layer[ours] for theirs, ours in modules.items()}
    for key, module in norms.items():
        yield f"{key}.weight", module["scale"] if "scale" in module else module["kernel"].T
        yield f"{key}.bias", module["bias"]


def make_embedder(folder: Path, seed: int = 0, width: int = BERT.hidden_size) -> Path:
    """Writes a random embedder as a sentence-transformers folder: mean pooling and L2, 32 positions."""
    assert len(PIECES) == BERT.vocab_size
    bert = dataclasses.replace(BERT, hidden_size=width)
    (folder / "1_Pooling").mkdir(parents=True)
    state = dict(_huggingface_state(TextEncoder(bert).init_params(jax.random.key(seed))))
    save_file({k: np.ascontiguousarray(v, np.float32) for k, v in state.items()}, folder / "model.safetensors")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    files = {
        "config.json": {
            "model_type": "bert",
            "vocab_size": BERT.vocab_size,
            "hidden_size": bert.hidden_size,
            "num_hidden_layers": BERT.num_layers,
            "num_attention_heads": BERT.num_heads,
            "intermediate_size": BERT.intermediate_size,
            "max_position_embeddings": BERT.max_positions,
            "type_vocab_size": BERT.type_vocab_size,
            "layer_norm_eps": BERT.norm_epsilon,
        },
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 32},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def make_static_embedder(folder: Path, *kinds: str) -> np.ndarray:
    """Writes a random StaticEmbedding of sentence-transformers, with modules of these kinds behind it; its table."""
    (folder / "0_StaticEmbedding").mkdir(parents=True)
    table = np.random.default_rng(0).normal(size=(len(PIECES), 16)).astype(np.float32)
    save_file({"embedding.weight": table}, folder / "0_StaticEmbedding" / "model.safetensors")
    make_tokenizer().save(str(folder / "0_StaticEmbedding" / "tokenizer.json"))
    names = ["StaticEmbedding", *kinds]
    modules = [{"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(names)]
    (folder / "modules.json").write_text(json.dumps(modules))
    return table


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct texts of three to six of the tokenizer's words."""
    rng = np.random.default_rng(seed)
    texts = {" ".join(rng.choice(WORDS, rng.integers(3, 7), replace=False)): None for _ in range(count)}
    return list(texts)


def make_recipe(folder: Path, **changes: Any) -> Config:
    """A recipe on a new embedder and text file in `folder`; both stages take seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "texts.txt"
    source.write_text("\n".join(make_texts(400)) + "\n")
    t5 = T5Config(
        d_model=16, d_kv=8, d_ff=32, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, dropout_rate=0.1
    )
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5)
    # Of this seed, the few held-out texts scatter as the training texts do: no warning of foreign vectors.
    embedder = make_embedder(folder / "embedder", seed=4)
    config = Config(
        name="test",
        embedder=str(embedder),
        model=ModelConfig(
            t5=t5, num_pseudo_tokens=2, max_length=8, projection_dropout=0.1, standardize=True, bag_of_words=True
        ),
        data=DataConfig(sources=(str(source),), held_out=str(source), span_share=0.2),
        inverter=StageConfig(num_steps=60, batch_size=16, optimizer=optimizer),
        corrector=StageConfig(num_steps=150, batch_size=16, optimizer=optimizer),
        evaluation=EvalConfig(every_steps=0, num_examples=4, num_steps=(0, 2), sequence_beam_width=(1, 2)),
        checkpoint=CheckpointConfig(every_steps=20),
        log_every_steps=5,
    )
    return dataclasses.replace(config, **changes)
