"""What the ranker learns, against all alignments enumerated, and against the loss's definition."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v2t_jax.models.ranker import Ranking
from v2t_jax.train.ranking import LEARNED_SLOTS, MISSING_WEIGHT, align, learned_slots, ranking_losses

END, PAD = 1, 0
LENGTH = 6


def padded(words: Any, length: int = LENGTH) -> list[int]:
    return [*words, END, *[PAD] * length][:length]


def optimal(hypothesis: list[int], text: list[int]) -> list[dict[int, int]]:
    """All longest common subsequences: for each, the text's place by the hypothesis's."""
    for count in range(min(len(hypothesis), len(text)), -1, -1):
        found = [
            dict(zip(ours, theirs, strict=True))
            for ours in itertools.combinations(range(len(hypothesis)), count)
            for theirs in itertools.combinations(range(len(text)), count)
            if all(hypothesis[i] == text[j] for i, j in zip(ours, theirs, strict=True))
        ]
        if found:
            return found
    raise AssertionError


def test_alignments_are_all_the_optimal_ones() -> None:
    """A word may go into a gap if some alignment keeps what stands around it there, and in a lost token's place."""
    rng = np.random.default_rng(0)
    pairs = [[rng.integers(2, 6, rng.integers(6)).tolist() for _ in range(2)] for _ in range(60)]
    found = align(*(jnp.asarray([padded(pair[side]) for pair in pairs]) for side in (0, 1)))
    for row, (hypothesis, text) in enumerate(pairs):
        words = np.zeros((2 * LENGTH, LENGTH), bool)
        kept, lost = np.zeros((2, LENGTH), bool)
        for alignment in optimal(hypothesis, text):
            for i in range(len(hypothesis)):
                (kept if i in alignment else lost)[i] = True
            for j in set(range(len(text))) - set(alignment.values()):
                first = max((i + 1 for i, other in alignment.items() if other < j), default=0)
                last = min((i for i, other in alignment.items() if other > j), default=len(hypothesis))
                words[2 * np.arange(first, last + 1), j] = True
                words[2 * np.arange(first, last) + 1, j] = True
        np.testing.assert_array_equal(found.words[row], words, str((hypothesis, text)))
        np.testing.assert_array_equal(found.kept[row], kept)
        np.testing.assert_array_equal(found.lost[row], lost)


@pytest.fixture
def found() -> Any:
    """[4 5 5 3] -> [3 3 4], and [3] -> [3], which lacks nothing."""
    return jnp.asarray([padded([4, 5, 5, 3]), padded([3])]), jnp.asarray([padded([3, 3, 4]), padded([3])])


def test_slots_that_lack_words_are_learned_first(found: Any) -> None:
    words = align(*found).words
    is_open = np.asarray(words).any(axis=2)
    chosen = [np.asarray(learned_slots(align(*found), key)) for key in (None, *jax.random.split(jax.random.key(0), 40))]
    assert chosen[0].shape == (2, LEARNED_SLOTS)
    assert chosen[0][0].tolist() == np.flatnonzero(is_open[0])[:LEARNED_SLOTS].tolist()
    assert all(is_open[0][slots[0]].all() for slots in chosen)
    assert set(np.concatenate([slots[0] for slots in chosen]).tolist()) == set(np.flatnonzero(is_open[0]))


def test_the_loss_by_its_definition(found: Any) -> None:
    hypothesis, text = found
    rng = np.random.default_rng(0)
    alignments, slots = align(hypothesis, text), learned_slots(align(hypothesis, text), None)
    sizes = (2, 6), (2, LENGTH), (2, LENGTH), (2, LEARNED_SLOTS, 6)
    logits = [rng.normal(size=size).astype(np.float32) for size in sizes]
    loss, (right, count) = ranking_losses(
        Ranking(*(jnp.asarray(x) for x in logits)), slots, alignments, hypothesis, text
    )
    missing, surplus, gap, words = (x.astype(np.float64) for x in logits)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum())

    def binary(logit: float, label: float) -> float:
        return float(np.log1p(np.exp(logit)) - float(label) * logit)

    # Of [4 5 5 3] either the 4 or the 3 can stay; both 5 go. It lacks one 3.
    labels = np.asarray(alignments.words[0])
    each, correct = [], []
    for k, slot in enumerate(np.asarray(slots[0])):
        may = [int(text[0, j]) for j in np.flatnonzero(labels[slot])]
        each.append(-np.mean([log_softmax(words[0, k])[word] for word in may]))
        correct.append(words[0, k].argmax() in may)
    expected = np.mean(each) - MISSING_WEIGHT * log_softmax(missing[0])[3]
    expected += np.mean([binary(x, y) for x, y in zip(surplus[0, :4], (0.5, 1, 1, 0.5), strict=True)])
    expected += np.mean([binary(gap[0, i], labels[2 * i].any()) for i in range(5)])
    expected += binary(surplus[1, 0], 0) + np.mean([binary(x, 0) for x in gap[1, :2]])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert (float(right), float(count)) == (pytest.approx(np.mean(correct)), 2.0)
