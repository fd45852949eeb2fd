"""The scores, against values worked out by hand."""

import numpy as np
import pytest

from v2t_jax.errors import InputError
from v2t_jax.eval.metrics import exact_match, score, sentence_bleu, text_scores, token_f1


def test_mean_and_standard_error() -> None:
    assert score([1.0, 3.0]) == pytest.approx((2.0, 1.0))  # deviation sqrt(2), over sqrt(2)
    assert score([5.0]) == (5.0, None)


def test_bleu_is_that_of_sentences() -> None:
    found = sentence_bleu(["the red cat sees a dog", "tree", ""], ["the red cat sees a dog", "boat", "boat"])
    np.testing.assert_allclose(found, [100, 0, 0], atol=1e-9)
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no four (smoothed to half a match): no brevity penalty
    expected = 100 * (3 / 4 * 2 / 3 * 1 / 2 * 0.5 / 1) ** 0.25
    assert sentence_bleu(["a b c x"], ["a b c d"])[0] == pytest.approx(expected)


def test_token_f1_is_over_sets_of_words() -> None:
    # {the, cat, sees, .} and {the, dog, sees}: 2 in common
    assert token_f1(["the the cat sees."], ["the dog sees"])[0] == pytest.approx(2 * 2 / (4 + 3))
    np.testing.assert_array_equal(token_f1(["", "a b"], ["a", "b a"]), [0.0, 1.0])


def test_exact_match_is_equality() -> None:
    np.testing.assert_array_equal(exact_match(["a", "A"], ["a", "a"]), [1.0, 0.0])


def test_no_texts_are_refused_and_lengths_must_agree() -> None:
    with pytest.raises(InputError, match="no texts"):
        text_scores([], [])
    with pytest.raises(ValueError, match="argument 2"):
        text_scores(["a"], ["a", "b"])
