"""A model that is cut over a mesh recovers what one device recovers, and no device ever holds its weights whole."""

import jax
import numpy as np
import pytest

from tests.helpers.sharded_programs import gathered
from tests.helpers.tiny_run import make_embedder, make_texts
from v2t_jax.config import MeshConfig, ModelConfig, T5Config
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.load import load_embedder
from v2t_jax.inversion.api import invert_strings
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.models.layers import TRANSPOSED
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import decoding_on, decoding_rows, make_mesh
from v2t_jax.train.setup import random_params

T5 = T5Config(vocab_size=60, d_model=208, d_kv=8, d_ff=736, num_heads=4, num_encoder_layers=1, num_decoder_layers=1)
MODEL = ModelConfig(t5=T5, embedding_width=16, num_pseudo_tokens=2, max_length=8)
ROWS, WIDTH = 16, 2


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """On a mesh of eight devices, weights over two of them."""
    embedder = load_embedder(str(make_embedder(tmp_path_factory.mktemp("models") / "embedder")))
    mesh = make_mesh(MeshConfig(2, 2, 2))
    params = {}
    for stage in NETWORKS:
        program, _ = random_params(stage, MODEL, mesh)
        params[stage] = program(np.asarray(jax.random.key_data(jax.random.key(len(params)))))
    vocabulary = Vocabulary.full(embedder.tokenizer)
    return InversionPipeline("cut", MODEL, params, embedder, vocabulary, mesh=mesh, decode="model")


def test_no_weights_are_gathered(cut):
    weights = cut.loop_params()
    layer = weights["corrector"]["t5"]["decoder"]["layers"][0]
    assert layer["feed_forward"]["wi" + TRANSPOSED].addressable_shards[0].data.shape == (368, 208)
    loop = cut.correction_loop(WIDTH, "best")
    e = processes.put(np.ones((ROWS, 16), np.float32), decoding_rows(cut.mesh, "model"))
    with decoding_on(cut.mesh, "model"):
        found = loop.run.lower(weights, e, np.int32(ROWS), np.int32(1), np.int32(1), room=1).compile().as_text()
    shapes = gathered(found)
    assert shapes and max(np.prod(shape) for shape in shapes) <= ROWS * WIDTH**2 * T5.vocab_size  # logits at most
    assert not [shape for shape in shapes if {208, 104, 736, 368} & set(shape)]


@pytest.mark.parametrize("stage", ["inverter", "corrector"])
def test_it_recovers_what_one_device_recovers(cut, stage):
    names = [name for name in NETWORKS if stage == "corrector" or name == "inverter"]
    params = {name: cut.params[name] for name in names}
    there = InversionPipeline("cut", MODEL, params, cut.embedder, cut.vocabulary, mesh=cut.mesh, decode="model")
    here = InversionPipeline("whole", MODEL, processes.fetch(params), cut.embedder, cut.vocabulary)
    options = {"num_steps": int(stage == "corrector"), "sequence_beam_width": 1, "mode": "upstream"}
    found, expected = (invert_strings(model, make_texts(5), **options) for model in (there, here))
    for one, other in zip(found, expected, strict=True):
        assert [step.text for step in one.trace] == [step.text for step in other.trace]
        np.testing.assert_allclose([s.cosine for s in one.trace], [s.cosine for s in other.trace], atol=1e-5)
    assert len(found) == 5 and len(found[0].trace) == 1 + options["num_steps"]
