"""Parameter names, shapes and dtypes of every network are frozen: saved models and checkpoints depend on them.

`python -m tests.models.test_param_trees` prints the file. Where it differs, old files no longer load.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.encoders import (
    BertConfig,
    ClipTextConfig,
    LlamaConfig,
    ModernBertConfig,
    NomicBertConfig,
    StaticConfig,
    TextEncoder,
    TextEncoderConfig,
)
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.layers import Network
from v2t_jax.models.ranker import Ranker
from v2t_jax.models.t5 import T5, T5Encoder

GOLDEN = Path(__file__).parent.parent / "golden" / "param_trees.json"
V1_0 = T5Config(vocab_size=10, d_model=8, d_kv=3, d_ff=12, num_heads=2, num_encoder_layers=2, num_decoder_layers=3)
V1_1 = dataclasses.replace(V1_0, feed_forward="gated-gelu", tie_word_embeddings=False)
MODEL = ModelConfig(t5=V1_0, embedding_width=6, num_pseudo_tokens=2, max_length=4)
OPTIONS = dataclasses.replace(MODEL, t5=V1_1, standardize=True, bag_of_words=True)
BERT = BertConfig(10, 8, 2, 2, 12, 7)
LLAMA = LlamaConfig(10, 8, 2, 4, 12, num_key_value_heads=2, head_width=4)
GEMMA = dataclasses.replace(LLAMA, local=(True, False), head_norms=True, norm="gemma")
CASES: dict[str, Network] = {
    "t5 v1.0": T5(V1_0),
    "t5 v1.1": T5(V1_1),
    "inverter": Inverter(MODEL),
    "inverter, all options": Inverter(OPTIONS),
    "corrector": Corrector(MODEL),
    "corrector, all options": Corrector(OPTIONS),
    "corrector without input norm": Corrector(dataclasses.replace(MODEL, input_norm=False)),
    "ranker": Ranker(MODEL),
    "ranker that reads states": Ranker(dataclasses.replace(MODEL, state_width=5, num_ranker_layers=1)),
    "bert": TextEncoder(BERT),
    "bert with pooler": TextEncoder(dataclasses.replace(BERT, pooler=True)),
    "distilbert": TextEncoder(dataclasses.replace(BERT, type_vocab_size=0)),
    "roberta": TextEncoder(dataclasses.replace(BERT, type_vocab_size=1, pad_id=1)),
    "mpnet": TextEncoder(dataclasses.replace(BERT, type_vocab_size=0, pad_id=1, relative_buckets=8)),
    "t5 v1.0 encoder": T5Encoder(V1_0),
    "t5 v1.1 encoder": T5Encoder(V1_1),
    "nomic-bert": TextEncoder(NomicBertConfig(10, 8, 2, 2, 12)),
    "modernbert": TextEncoder(ModernBertConfig(10, 8, 3, 2, 12, local=(False, True, True))),
    "llama": TextEncoder(LLAMA),
    "qwen3": TextEncoder(dataclasses.replace(LLAMA, head_norms=True)),
    "gemma 3": TextEncoder(GEMMA),
    "clip text": TextEncoder(ClipTextConfig(10, 8, 2, 2, 12, 7)),
    "static": TextEncoder(StaticConfig(10, 8)),
}


def tree(name: str) -> dict[str, list[Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(CASES[name].abstract_params())
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [*leaf.shape, str(leaf.dtype)] for path, leaf in leaves
    }


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_dtypes_are_frozen(name: str) -> None:
    assert tree(name) == json.loads(GOLDEN.read_text())[name]


def test_every_kind_of_encoder_is_frozen() -> None:
    kinds = {type(network.config) for network in CASES.values() if isinstance(network, TextEncoder)}
    assert kinds == set(TextEncoderConfig.__subclasses__())
    assert set(json.loads(GOLDEN.read_text())) == set(CASES)


if __name__ == "__main__":
    text = json.dumps({name: dict(sorted(tree(name).items())) for name in CASES}, indent=1)
    print(
        re.sub(r"\[[^\]]+\]", lambda shape: re.sub(r"\s+", " ", shape[0]).replace("[ ", "[").replace(" ]", "]"), text)
    )
