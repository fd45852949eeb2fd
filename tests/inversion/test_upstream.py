"""Ranking of equal scores, by orders that torch.topk gave; tests/oracle compares it with torch live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v2t_jax.inversion.upstream import rank, topk_order

# Scores, and what torch 2.13 on a CPU made of torch.tensor(scores).topk(len(scores)).indices.
ORDERS = [
    ([0.5], [0]),
    ([0.1, 0.4, 0.3, 0.2], [1, 2, 3, 0]),
    ([0.590, 0.697, 0.591, 0.591], [1, 3, 2, 0]),
    ([0.865, 0.881, 0.881, 0.881], [2, 3, 1, 0]),
    ([0.5, 0.5, 0.0, 0.5, 0.25, 0.25, 0.25, 0.0, 0.5], [1, 8, 3, 0, 6, 4, 5, 7, 2]),
    (
        [0.0, 0.25, 0.25, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.75, 0.0, 0.5, 0.75, 0.0, 0.25],
        [13, 10, 3, 12, 1, 15, 2, 4, 11, 0, 14, 9, 7, 8, 6, 5],
    ),
    (
        [
            0.25,
            0.0,
            0.5,
            0.0,
            0.5,
            0.5,
            0.5,
            0.0,
            0.25,
            0.25,
            0.25,
            0.25,
            0.5,
            0.25,
            0.0,
            0.5,
            0.25,
            0.5,
            0.0,
            0.25,
            0.5,
            0.0,
            0.0,
            0.25,
            0.5,
        ],
        [24, 20, 17, 15, 6, 2, 5, 4, 12, 0, 19, 16, 23, 13, 11, 10, 9, 8, 22, 21, 1, 14, 7, 18, 3],
    ),
]


@pytest.mark.parametrize(("scores", "expected"), ORDERS)
def test_equal_scores_are_ranked_as_recorded(scores: list[float], expected: list[int]) -> None:
    np.testing.assert_array_equal(rank(np.array(scores, np.float32)), expected)


def test_batches_in_a_compiled_program_with_absent_scores_last() -> None:
    """An absent score isn't in torch's list at all: the others are ranked as if alone."""
    scores, order = ORDERS[3]
    absent = -np.inf
    rows = np.array([[*scores, absent, absent], [absent, scores[0], absent, *scores[1:]]], np.float32)
    places = [1, 3, 4, 5]
    expected = [[*order, 4, 5], [*(places[i] for i in order), 0, 2]]
    np.testing.assert_array_equal(jax.jit(topk_order)(jnp.asarray(rows)), expected)


def test_without_equal_scores_it_is_the_sorted_order() -> None:
    scores = np.random.default_rng(0).permutation(200).astype(np.float32)
    np.testing.assert_array_equal(rank(scores), np.argsort(-scores))
