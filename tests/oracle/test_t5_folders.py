"""T5 folders that transformers writes, read by us, and the other way round: logits, greedy and beam search."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.equivalence import encode_t5
from tests.helpers.tiny_run import make_tokenizer
from v2t_jax.config import T5Config
from v2t_jax.decode.beam import beam_search
from v2t_jax.decode.sample import greedy
from v2t_jax.embedders.load import load_embedder
from v2t_jax.interop.hf_t5 import load_t5, save_t5
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import T5
from v2t_jax.vec2text.checkpoints import check_embedder

pytestmark = pytest.mark.oracle

FORMS: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "fewer decoder layers": {"num_decoder_layers": 1, "relative_attention_num_buckets": 8},
}
LENGTH = 12


def make_t5(form: str) -> Any:
    transformers, torch = importlib.import_module("transformers"), importlib.import_module("torch")
    torch.manual_seed(3)
    torch.set_num_threads(1)
    sizes = {"vocab_size": 80, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    config = transformers.T5Config(**sizes, **FORMS[form], decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        if form == "v1.1":
            model.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn(80, 24))
    return model


def inputs() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(2, 80, (6, 9)).astype(np.int32)
    mask = (np.arange(9)[None] < np.array([9, 9, 5, 3, 8, 1])[:, None]).astype(np.int32)
    return ids, mask


def our_logits(config: T5Config, params: Params, labels: np.ndarray) -> np.ndarray:
    ids, mask = map(jnp.asarray, inputs())
    return np.asarray(T5(config).apply({"params": params}, ids, mask, jnp.asarray(labels)))


def their_logits(model: Any, labels: np.ndarray) -> np.ndarray:
    torch = importlib.import_module("torch")
    ids, mask = (torch.tensor(array, dtype=torch.int64) for array in inputs())
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, labels=torch.tensor(labels, dtype=torch.int64))
    return output.logits.numpy()


LABELS = np.random.default_rng(1).integers(2, 80, (6, 7)).astype(np.int32)


@pytest.mark.parametrize("form", FORMS)
def test_folders_of_transformers(form: str, tmp_path: Path) -> None:
    model = make_t5(form)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    config, params = load_t5(str(tmp_path))
    params = jax.tree.map(jnp.asarray, params)
    np.testing.assert_allclose(our_logits(config, params, LABELS), their_logits(model, LABELS), atol=1e-4)

    torch = importlib.import_module("torch")
    ids, mask = (torch.tensor(array, dtype=torch.int64) for array in inputs())
    our_ids, our_mask = map(jnp.asarray, inputs())
    encoded = encode_t5(config, params, our_ids, our_mask)
    shared = {"batch_size": 6, "max_length": LENGTH}
    for num_beams in (1, 3):
        with torch.no_grad():
            theirs = model.generate(
                ids, attention_mask=mask, num_beams=num_beams, do_sample=False, max_length=LENGTH + 1
            )[:, 1:].numpy()
        start = partial(T5(config).start_decoding, params, encoded, our_mask, max_length=LENGTH, num_beams=num_beams)
        if num_beams == 1:
            ours = greedy(*start(), **shared).ids
        else:
            ours = beam_search(*start(), num_beams=num_beams, num_return=1, **shared)[0].ids[:, 0]
        np.testing.assert_array_equal(np.asarray(ours)[:, : theirs.shape[1]], theirs)
        assert not np.asarray(ours)[:, theirs.shape[1] :].any()
        assert len(np.unique(theirs)) > 5


@pytest.mark.parametrize("form", FORMS)
def test_our_folders_in_transformers(form: str, tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    make_t5(form).save_pretrained(tmp_path / "theirs")
    config, params = load_t5(str(tmp_path / "theirs"))
    save_t5(tmp_path / "ours", config, params)
    again, same = load_t5(str(tmp_path / "ours"))
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    ours = our_logits(config, jax.tree.map(jnp.asarray, params), LABELS)
    np.testing.assert_allclose(ours, their_logits(model, LABELS), atol=1e-4)


def test_a_head_that_was_left_out(tmp_path: Path) -> None:
    """v1.1 whose head equals the embedding: transformers writes one tensor, and the scale tells it from v1.0."""
    torch = importlib.import_module("torch")
    model = make_t5("v1.1")
    with torch.no_grad():
        model.lm_head.weight = model.shared.weight
    model.save_pretrained(tmp_path)
    config, params = load_t5(str(tmp_path))
    assert not config.tie_word_embeddings
    ours = our_logits(config, jax.tree.map(jnp.asarray, params), LABELS)
    np.testing.assert_allclose(ours, their_logits(model, LABELS), atol=1e-4)


def test_an_embedder_folder_that_holds_a_whole_t5(tmp_path: Path) -> None:
    """T5Model saves encoder and decoder under blocks of the same names; an embedder is the encoder."""
    transformers, torch = importlib.import_module("transformers"), importlib.import_module("torch")
    torch.manual_seed(4)
    sizes = {"vocab_size": 60, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    model = transformers.T5Model(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "whole")
    make_tokenizer().save(str(tmp_path / "whole" / "tokenizer.json"))
    assert any(key.startswith("decoder.block.0") for key in load_file(tmp_path / "whole" / "model.safetensors"))
    embedder, texts = load_embedder(f"mean@{tmp_path / 'whole'}"), ["a dog", "the old river sees one cat"]
    ids, mask = (torch.from_numpy(array).long() for array in embedder.tokenize(texts))
    with torch.no_grad():
        hidden = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    np.testing.assert_allclose(embedder.embed(texts), expected.numpy(), atol=1e-5)
    # As vec2text saves an inverter: with the encoder of its embedder inside.
    (tmp_path / "inverter").mkdir()
    inside = {f"embedder.{key}": value.contiguous().clone() for key, value in model.encoder.state_dict().items()}
    importlib.import_module("safetensors.torch").save_file(inside, tmp_path / "inverter" / "model.safetensors")
    check_embedder(tmp_path / "inverter", tmp_path / "whole", "the T5")
