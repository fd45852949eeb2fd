"""The logit rules, each against a plain loop written from its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v2t_jax.decode.logits import ban_repeated_ngrams, ban_tokens, first_argmax, keep_top_k, keep_top_p

VOCAB, WIDTH = 5, 8


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), size=st.integers(1, 4), index=st.integers(0, WIDTH - 2))
def test_repeated_ngrams_are_banned_and_nothing_else(seed: int, size: int, index: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 3, (6, WIDTH), dtype=np.int32)
    banned = np.isneginf(
        jax.jit(ban_repeated_ngrams, static_argnums=3)(jnp.zeros((6, VOCAB)), tokens, jnp.int32(index), size)
    )
    for row, history in enumerate(tokens[:, : index + 1].tolist()):
        seen = {tuple(history[i : i + size]) for i in range(len(history) - size + 1)}
        suffix = history[len(history) - size + 1 :] if size > 1 else []
        expected = [len(suffix) == size - 1 and (*suffix, token) in seen for token in range(VOCAB)]
        assert banned[row].tolist() == expected


def test_an_ngram_longer_than_any_history_bans_nothing() -> None:
    logits = jnp.ones((2, VOCAB))
    assert (ban_repeated_ngrams(logits, jnp.zeros((2, 3), jnp.int32), jnp.int32(1), 4) == logits).all()


def test_end_of_sequence_is_banned_until_min_length_tokens_are_there() -> None:
    tokens = jnp.zeros((1, WIDTH), jnp.int32)
    for index in range(5):
        out = ban_tokens(jnp.zeros((1, VOCAB)), tokens, jnp.int32(index), eos=1, min_length=3, no_repeat_ngram=0)
        assert np.isneginf(out)[0].tolist() == [False, index < 3, False, False, False]


@pytest.mark.parametrize("k", [1, 3, VOCAB, 100])
def test_top_k_keeps_the_k_best(k: int) -> None:
    logits = np.random.default_rng(k).normal(size=(7, VOCAB)).astype(np.float32)
    kept = np.isfinite(keep_top_k(jnp.asarray(logits), k))
    rank = (-logits).argsort(axis=-1).argsort(axis=-1)
    assert (kept == (rank < k)).all()


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 0.999999])
def test_top_p_keeps_the_smallest_set_with_that_mass(p: float) -> None:
    logits = np.random.default_rng(3).normal(size=(20, VOCAB)).astype(np.float32) * 2
    kept = np.isfinite(keep_top_p(jnp.asarray(logits), p))
    for row, mask in zip(logits.astype(np.float64), kept, strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        expected, mass = set(), 0.0
        for token in (-row).argsort():
            expected.add(int(token))
            mass += probabilities[token]
            if mass >= p:
                break
        assert set(mask.nonzero()[0].tolist()) == expected


def test_first_argmax_is_argmax_and_takes_the_first_of_equals() -> None:
    logits = jnp.asarray(np.random.default_rng(0).integers(-3, 3, (50, 9)).astype(np.float32))
    assert (first_argmax(logits) == jnp.argmax(logits, axis=-1)).all()
    assert (first_argmax(jnp.full((2, 4), -jnp.inf)) == 0).all()
    assert (first_argmax(jnp.full((2, 4), jnp.nan)) < 4).all()
