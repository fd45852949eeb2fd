"""Batches: what is in them, and that they depend on (seed, step) alone."""

import numpy as np
import pytest

from v2t_jax.data import dataset as dataset_module
from v2t_jax.data.batches import Batches, Batching
from v2t_jax.data.dataset import TokenDataset
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.decode.state import EOS, PAD
from v2t_jax.errors import InputError

BUCKETS = (6, 9, 11, 13, 15, 17)
SETTINGS = {"batch_size": 8, "max_length": 17, "span_share": 0.3, "bucket_lengths": BUCKETS, "seed": 3}


def make_dataset(count, seed, longest=30):
    """Texts of consecutive ids that no other text has, so that a row tells which span of which text it is."""
    lengths = np.random.default_rng(seed).integers(1, longest, count)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])  # a gap between texts
    tokens = np.arange(offsets[-1], dtype=np.int32) + 2 + 100_000 * seed
    kept = np.concatenate([tokens[a : a + n] for a, n in zip(offsets[:-1], lengths, strict=True)])
    return TokenDataset(kept, np.concatenate([[0], np.cumsum(lengths)]))


def rows_of(batches, steps):
    return [row[row > EOS] for step in steps for row in batches(step)]


def test_rows_are_content_then_end_then_padding():
    batches = Batches([make_dataset(200, 1)], Batching(**SETTINGS))
    assert batches.steps_per_epoch == 25
    for step in range(60):
        batch = batches(step)
        assert batch.dtype == np.int32 and batch.shape[0] == 8 and batch.shape[1] in BUCKETS
        for row in batch:
            (end,) = np.flatnonzero(row == EOS)
            assert end > 0 and (row[:end] > EOS).all() and (row[end + 1 :] == PAD).all()
            assert (np.diff(row[:end]) == 1).all()  # contiguous, inside one text


def test_an_epoch_uses_every_text_once_and_long_ones_as_spans():
    dataset = make_dataset(200, 1)
    batches = Batches([dataset], Batching(**SETTINGS))
    owner = np.repeat(np.arange(200), np.diff(dataset.offsets))
    for epoch in range(2):
        seen = {}
        for row in rows_of(batches, range(25 * epoch, 25 * epoch + 25)):
            at = np.searchsorted(dataset.tokens, row[0])
            seen[owner[at]] = len(row)
        assert len(seen) == 200
        assert all(n == min(np.diff(dataset.offsets)[i], n) and n <= 16 for i, n in seen.items())
        long = [n for i, n in seen.items() if np.diff(dataset.offsets)[i] > 16]
        assert np.mean(np.array(long) == 16) > 0.5 and min(long) >= 3
        whole = [n == np.diff(dataset.offsets)[i] for i, n in seen.items() if np.diff(dataset.offsets)[i] <= 16]
        assert 0.6 < np.mean(whole) < 0.95


def test_without_spans_short_texts_are_whole():
    dataset = make_dataset(100, 1, longest=17)
    rows = rows_of(Batches([dataset], Batching(**{**SETTINGS, "span_share": 0.0, "batch_size": 10})), range(10))
    assert sorted(map(len, rows)) == sorted(np.diff(dataset.offsets))


def test_any_step_is_the_same_however_it_is_reached():
    datasets = [make_dataset(100, 1), make_dataset(57, 2)]
    first = Batches(datasets, Batching(**SETTINGS))
    walked = [first(step) for step in range(50)]
    resumed = Batches(datasets, Batching(**SETTINGS))
    for step in (37, 38, 5, 49, 0):
        np.testing.assert_array_equal(resumed(step), walked[step])
    other = Batches(datasets, Batching(**{**SETTINGS, "seed": 4}))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(walked, map(other, range(50)), strict=True))
    epochs = [np.concatenate([row for row in rows_of(first, range(19 * e, 19 * e + 19))]) for e in (0, 1)]
    assert len(epochs[0]) != len(epochs[1]) or (epochs[0] != epochs[1]).any()


def test_weights_repeat_and_thin_out():
    batches = Batches(
        [make_dataset(40, 1), make_dataset(100, 2)], Batching(**{**SETTINGS, "batch_size": 10}), [3.0, 0.2]
    )
    assert batches.steps_per_epoch == 14
    assert sum(row[0] < 200_000 for row in rows_of(batches, range(14))) == 3 * 40
    thin = [
        frozenset(row[0] for row in rows_of(batches, range(14 * e, 14 * e + 14)) if row[0] > 200_000) for e in (0, 1)
    ]
    assert len(thin[0]) == 20 and thin[0] != thin[1]


def test_padding_is_small():
    lengths = np.clip(np.random.default_rng(0).poisson(11, 20_000), 1, 40)
    dataset = TokenDataset(np.full(lengths.sum(), 5, np.int32), np.concatenate([[0], np.cumsum(lengths)]))
    batches = Batches([dataset], Batching(**{**SETTINGS, "batch_size": 128}))
    measured = [batches(step) for step in range(batches.steps_per_epoch)]
    share = sum((b == PAD).sum() for b in measured) / sum(b.size for b in measured)
    assert share < 0.1


def test_texts_with_unknown_tokens_are_dropped(tokenizer, monkeypatch):
    vocabulary = Vocabulary.full(tokenizer)
    monkeypatch.setattr(dataset_module, "ENCODED_TEXTS", 3)
    dataset = TokenDataset.from_texts(["the cat", "the zebra", "", "dogs"], vocabulary)
    assert np.diff(dataset.offsets).tolist() == [2, 2]
    assert vocabulary.decode(np.append(dataset.tokens[:2], EOS)) == ["the cat"]
    assert TokenDataset.from_texts(["zebra"], vocabulary).offsets.tolist() == [0]


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 500},
        {"bucket_lengths": ()},
        {"bucket_lengths": (6, 9)},
        {"bucket_lengths": (9, 6, 17)},
        {"bucket_lengths": (1, 17)},
    ],
)
def test_bad_settings_are_refused(changed):
    with pytest.raises(InputError):
        Batches([make_dataset(20, 1)], Batching(**{**SETTINGS, **changed}))


def share(batch_size, index, count):
    """A process's rows of a batch."""
    return slice(index * batch_size // count, (index + 1) * batch_size // count)


def test_processes_share_a_batch():
    batches = Batches([make_dataset(200, 1)], Batching(**SETTINGS))
    for count in (1, 2, 4, 8):
        for step in (0, 31):
            parts = [batches(step, share(8, i, count)) for i in range(count)]
            np.testing.assert_array_equal(np.concatenate(parts), batches(step))
