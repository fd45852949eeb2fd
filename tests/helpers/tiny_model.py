"""A whole model small enough for tests: random weights, its own embedder, saved as a model folder."""

from pathlib import Path

import jax

from tests.helpers.tiny_run import make_embedder
from v2t_jax.config import ModelConfig, Stage, T5Config
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.load import load_embedder
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.models.layers import Params
from v2t_jax.models.ranker import NETWORKS

WIDTH, MAX_LENGTH = 16, 8


def make_model(folder: Path, stages: tuple[Stage, ...] = ("inverter", "corrector"), name: str = "tiny") -> Path:
    """Writes a random model to `folder / name`, and its embedder beside it; returns the model's folder."""
    if not (folder / "embedder").exists():
        make_embedder(folder / "embedder")
    embedder = load_embedder(str(folder / "embedder"))
    vocabulary = Vocabulary.full(embedder.tokenizer)
    t5 = T5Config(
        vocab_size=vocabulary.size, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
    )
    sizes = {"embedding_width": WIDTH, "state_width": embedder.config.state_width}
    config = ModelConfig(t5=t5, num_pseudo_tokens=2, max_length=MAX_LENGTH, num_ranker_layers=1, **sizes)
    params: dict[Stage, Params] = {
        stage: NETWORKS[stage](config).init_params(jax.random.key(seed)) for seed, stage in enumerate(stages)
    }
    InversionPipeline(name, config, params, embedder, vocabulary).save(folder / name, record={})
    return folder / name
