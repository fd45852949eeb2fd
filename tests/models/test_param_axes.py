"""Every parameter of every network has a sharding rule, and every rule a parameter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.models import bert, clip_text, corrector, inverter, llama, modernbert, nomic_bert, t5, t5_encoder
from v2t_jax.parallel.mesh import param_specs

V1_0 = T5Config(vocab_size=8, d_model=8, d_kv=2, d_ff=8, num_heads=2, num_encoder_layers=2, num_decoder_layers=2)
V1_1 = dataclasses.replace(V1_0, feed_forward="gated-gelu", tie_word_embeddings=False)
BERT = bert.BertConfig(8, 8, 2, 2, 8, 4, pooler=True)
MPNET = bert.BertConfig(8, 8, 2, 2, 8, 4, type_vocab_size=0, relative_buckets=32)
GEMMA = llama.LlamaConfig(8, 8, 2, 1, 4, 8, (True, False), head_norms=True, gemma=True)
MODEL = ModelConfig(t5=V1_1, embedding_width=4, num_pseudo_tokens=2, max_length=4)
OPTIONS = dataclasses.replace(MODEL, standardize=True, bag_of_words=True)


@pytest.mark.parametrize(
    ("network", "config"),
    [
        (t5, V1_0),
        (t5, V1_1),
        (bert, BERT),
        (bert, MPNET),
        (t5_encoder, V1_0),
        (nomic_bert, nomic_bert.NomicBertConfig(8, 8, 2, 2, 8)),
        (modernbert, modernbert.ModernBertConfig(8, 8, 2, 8, (False, True))),
        (clip_text, clip_text.ClipTextConfig(8, 8, 2, 2, 8, 4)),
        (llama, llama.LlamaConfig(8, 8, 2, 1, 4, 8, (False,))),
        (llama, GEMMA),
        (inverter, MODEL),
        (inverter, OPTIONS),
        (corrector, MODEL),
        (corrector, OPTIONS),
    ],
)
def test_tables_are_complete_both_ways(network: Any, config: Any) -> None:
    params = jax.eval_shape(lambda key: network.init(config, key), jax.random.key(0))
    specs = param_specs(params, network.PARAM_AXES)
    jax.tree.map(lambda leaf, spec: len(spec) <= leaf.ndim or pytest.fail(str(spec)), params, specs)
    with pytest.raises(ValueError, match="No sharding rule matches"):
        param_specs({**params, "stranger": jnp.zeros(2)}, network.PARAM_AXES)
    with pytest.raises(ValueError, match="No parameter uses"):
        param_specs(params, (*network.PARAM_AXES, ("stranger", (None,))))


def test_matrices_are_cut_over_width_and_over_heads_or_the_hidden_layer() -> None:
    params = jax.eval_shape(lambda key: t5.init(V1_1, key), jax.random.key(0))
    layers = param_specs(params, t5.PARAM_AXES)["decoder"]["layers"]
    assert layers["cross_attention"]["q"] == PartitionSpec(None, "fsdp", "model")
    assert layers["feed_forward"]["wo"] == PartitionSpec(None, "model", "fsdp")
