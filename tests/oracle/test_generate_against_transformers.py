"""Greedy and beam search against `generate` of transformers, token by token, on a tiny random T5 in torch.

The step function asks the same torch model, through a callback, for the logits of the whole prefix that the cache
has kept: only the decoding is compared, and a beam with another beam's cache would be found out.
"""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v2t_jax.decode.beam import CHUNK, beam_search
from v2t_jax.decode.sample import greedy
from v2t_jax.decode.state import EOS, PAD, START, TokensToLogits

pytestmark = pytest.mark.oracle

ITEMS, LENGTH, VOCAB = 12, 10, 18


class Oracle:
    """The torch model, its inputs, and the step function made of it."""

    def __init__(self) -> None:
        # Imported here: the default suite collects this file where there is no torch.
        self.torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        self.torch.set_num_threads(1)
        self.torch.manual_seed(1)
        config = transformers.T5Config(
            vocab_size=VOCAB,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=START,
            eos_token_id=EOS,
            pad_token_id=PAD,
            tie_word_embeddings=False,
        )
        self.model = transformers.T5ForConditionalGeneration(config).eval()
        with self.torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(std=0.8)  # its own initialization repeats one token for ever
            self.model.lm_head.weight[EOS] *= 3.0  # and seldom ends
        self.input_ids = self.torch.randint(2, VOCAB, (ITEMS, 6))
        self.hidden = self.model.encoder(input_ids=self.input_ids).last_hidden_state.detach()

    def logits(self, history: Any, item: Any, index: Any) -> np.ndarray:
        prefix = self.torch.tensor(np.asarray(history)[:, : int(index) + 1], dtype=self.torch.int64)
        encoded = self.hidden[self.torch.tensor(np.asarray(item), dtype=self.torch.int64)]
        with self.torch.no_grad():
            output = self.model(encoder_outputs=(encoded,), decoder_input_ids=prefix, use_cache=False)
        return output.logits[:, -1].numpy()

    def step_function(self) -> TokensToLogits:
        def tokens_to_logits(ids: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, Any]:
            history = cache["history"].at[:, index].set(ids)
            shape = jax.ShapeDtypeStruct((ids.shape[0], VOCAB), jnp.float32)
            logits = jax.pure_callback(self.logits, shape, history, cache["item"], index)
            return logits, {**cache, "history": history}

        return tokens_to_logits

    def generate(self, **options: Any) -> Any:
        return self.model.generate(
            input_ids=self.input_ids,
            do_sample=False,
            max_length=LENGTH + 1,  # theirs counts the start id
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def make_cache(beams: int) -> dict[str, jax.Array]:
    item = jnp.repeat(jnp.arange(ITEMS, dtype=jnp.int32), beams)
    return {"history": jnp.zeros((ITEMS * beams, LENGTH), jnp.int32), "item": item}


def trimmed(ids: Any) -> list[list[int]]:
    """Rows up to their first end of sequence: what `generate` puts behind it differs from decoder to decoder."""
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in ids.tolist()]


def test_greedy(oracle: Oracle) -> None:
    ours = jax.jit(partial(greedy, oracle.step_function(), batch_size=ITEMS, max_length=LENGTH))(make_cache(1))
    theirs = oracle.generate(num_beams=1)
    found = trimmed(ours.ids)
    width = theirs.sequences.shape[1] - 1  # they cut the batch at its longest row
    assert [row[:width] for row in found] == trimmed(theirs.sequences[:, 1:])
    assert len({len(row) for row in found}) > 1  # or it would prove little


@pytest.mark.parametrize(("beams", "chunk"), [(2, CHUNK), (3, 2), (4, 2), (8, 1), (8, CHUNK)])
def test_beam_search(oracle: Oracle, beams: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v2t_jax.decode.beam.CHUNK", chunk)
    search = partial(
        beam_search,
        oracle.step_function(),
        batch_size=ITEMS,
        num_beams=beams,
        num_return=beams,
        max_length=LENGTH,
    )
    ours, scores = jax.jit(search)(make_cache(beams))
    theirs = oracle.generate(num_beams=beams, num_return_sequences=beams)
    found = trimmed(ours.ids.reshape(ITEMS * beams, LENGTH))
    assert found == trimmed(theirs.sequences[:, 1:])
    np.testing.assert_allclose(scores.reshape(-1), theirs.sequences_scores.numpy(), rtol=1e-4, atol=1e-6)
    lengths = np.array([len(row) for row in found])
    np.testing.assert_allclose(ours.log_probs.reshape(-1), scores.reshape(-1) * lengths, rtol=1e-4)
    assert len(set(lengths.tolist())) > 1
