"""Batches of a built data set: the same on any number of hosts and at any step, every text once an epoch."""

import dataclasses
import shutil

import numpy as np
import pytest

from v2t_jax.config import BuildSettings
from v2t_jax.data import batches as batches_module
from v2t_jax.data.batches import PREFETCHED, Batches, Batching
from v2t_jax.data.build import build
from v2t_jax.data.columns import Column, ColumnWriter, open_column
from v2t_jax.data.dataset import BLOCK_ROWS, TokenDataset
from v2t_jax.decode.state import EOS, PAD
from v2t_jax.errors import InputError

from .conftest import PIECES, make_tokenizer

LETTERS = [piece for piece in PIECES if len(piece) == 1 and piece.isalpha()]
BATCHING = Batching(batch_size=16, max_length=9, bucket_lengths=(5, 7, 9), span_share=0.3, seed=3)


def make_text(i):
    """A text that tells its number by its tokens: ten digits in letters, cut to between three and ten."""
    digits = f"{i * 7919 % 10**6:06d}{i:04d}"
    return " ".join(LETTERS[int(d)] for d in digits[i % 7 :])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A data set of some 4000 short texts."""
    folder = tmp_path_factory.mktemp("stored")
    source = folder / "texts.txt"
    source.write_text("\n".join(make_text(i) for i in range(4000)))
    return build([str(source)], folder / "built", make_tokenizer(), BuildSettings(held_out_share=0.01))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW_ROWS", 500)


def all_rows(dataset):
    return np.split(dataset.tokens, dataset.offsets[1:-1])


def contents(batch):
    return [tuple(row[row > EOS]) for row in batch]


def is_span(short, text):
    return any(short == text[i : i + len(short)] for i in range(len(text) - len(short) + 1))


def test_rows_are_content_then_end_then_padding(dataset):
    batches = Batches([dataset], BATCHING)
    assert len(dataset) > 8 * BLOCK_ROWS and dataset.tokens.dtype == np.uint16
    seen = set()
    for step in range(batches.steps_per_epoch + 3):
        batch = batches(step)
        assert batch.dtype == np.int32 and batch.shape[0] == 16
        seen.add(batch.shape[1])
        ends = (batch == EOS).argmax(1)
        for row, end in zip(batch, ends, strict=True):
            assert end > 0 and (row[:end] > EOS).all() and row[end] == EOS and (row[end + 1 :] == PAD).all()
    assert seen == {5, 7, 9}


def test_every_text_is_there_once_an_epoch(dataset):
    rows = [tuple(row) for row in all_rows(dataset)]
    whole = Batching(batch_size=16, max_length=11, bucket_lengths=(5, 8, 11), seed=3)
    batches = Batches([dataset], whole)
    orders = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        found = [row for step in steps for row in contents(batches(step))]
        assert len(found) == len(set(found)) == len(rows) // 16 * 16 and set(found) <= set(rows)
        orders.append(found)
    assert orders[0] != orders[1]


def test_a_batch_has_texts_from_everywhere(dataset, monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW_ROWS", 1 << 16)
    place = {tuple(row): i for i, row in enumerate(all_rows(dataset))}
    batches = Batches([dataset], Batching(batch_size=16, max_length=11, bucket_lengths=(11,), seed=3))
    for step in range(batches.steps_per_epoch):
        assert np.ptp([place[row] for row in contents(batches(step))]) > len(place) / 2


def test_long_texts_give_spans(dataset):
    rows = {tuple(row) for row in all_rows(dataset)}
    batches = Batches([dataset], BATCHING)
    found = [row for step in range(20) for row in contents(batches(step))]
    assert all(any(is_span(row, text) for text in rows) for row in found[:40])
    assert any(row not in rows for row in found) and any(row in rows for row in found)


def share(batch_size: int, index: int, count: int) -> slice:
    """A host's rows of a batch."""
    return slice(index * batch_size // count, (index + 1) * batch_size // count)


def test_any_number_of_hosts_reads_the_same_batches(dataset):
    alone = Batches([dataset], BATCHING)
    steps = [*range(40), alone.steps_per_epoch - 1, alone.steps_per_epoch, 3 * alone.steps_per_epoch + 5]
    expected = [alone(step) for step in steps]
    for count in (2, 4, 8, 16):
        hosts = [Batches([TokenDataset.open(dataset.folder)], BATCHING) for _ in range(count)]
        for step, whole in zip(steps, expected, strict=True):
            parts = [host(step, share(16, i, count)) for i, host in enumerate(hosts)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_any_step_is_the_same_however_it_is_reached(dataset):
    walked = Batches([dataset], BATCHING)
    batches = [walked(step) for step in range(60)]
    resumed = Batches([dataset], BATCHING)
    for step in (41, 42, 7, 59, 0, 1, 1, 40):
        np.testing.assert_array_equal(resumed(step), batches[step])
    other = Batches([dataset], dataclasses.replace(BATCHING, seed=4))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(batches, map(other, range(60)), strict=True))


class Recorded:
    """An array that remembers which rows were read."""

    def __init__(self, array):
        self.array, self.read = array, set()

    def __getitem__(self, rows):
        self.read |= set(rows.tolist())
        return self.array[rows]


def test_a_host_reads_its_own_blocks_only(dataset, monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW_ROWS", 1 << 16)  # an epoch
    blocks = []
    batching = dataclasses.replace(BATCHING, span_share=0.0)
    for index in range(4):
        column = Column("vectors", Recorded(np.zeros((len(dataset), 1))), {})
        batches = Batches([dataset], batching, columns=[column])
        for step in range(batches.steps_per_epoch - PREFETCHED):
            batches(step, share(16, index, 4))
        batches.close()
        blocks.append({row // BLOCK_ROWS for row in column.values.read})
    total = -(-len(dataset) // BLOCK_ROWS)
    assert set.union(*blocks) == set(range(total))
    assert sum(map(len, blocks)) <= total + 3  # two hosts share a block at each border


def test_padding_is_below_a_tenth(dataset, monkeypatch):
    monkeypatch.setattr(batches_module, "WINDOW_ROWS", 1 << 16)
    batches = Batches([dataset], Batching(32, 11, tuple(range(4, 12))))
    found = [batches(step) for step in range(batches.steps_per_epoch)]
    assert sum((batch == PAD).sum() for batch in found) / sum(batch.size for batch in found) < 0.1


def test_columns_go_with_their_rows(dataset, tmp_path):
    dataset = TokenDataset.open(shutil.copytree(dataset.folder, tmp_path / "copy"))
    writer = ColumnWriter(dataset, "first-and-length", "float16", (2,), {"max_length": 9})
    values = np.stack([dataset.tokens[dataset.offsets[:-1]], np.diff(dataset.offsets)], 1)
    for piece in writer.missing():
        writer.write(piece, values[writer.rows(piece)])
    writer.finish()
    batching = Batching(16, 9, (5, 7, 9), seed=3)
    made = open_column(dataset, "first-and-length")
    hosts = [Batches([dataset], batching, columns=[made]) for _ in range(2)]
    for step in (0, 1, 40):
        for i, host in enumerate(hosts):
            rows = share(16, i, 2)
            ids, column = host(step, rows), host.columns(step, rows)["first-and-length"]
            assert column.dtype == np.float16 and column.shape == (8, 2)
            np.testing.assert_array_equal(column[:, 0], ids[:, 0])
            np.testing.assert_array_equal(np.minimum(column[:, 1], 8), (ids > EOS).sum(1))
    with pytest.raises(InputError, match="set data.span_share to 0"):
        Batches([dataset], BATCHING, columns=[made])
    with pytest.raises(InputError, match="columns/none/manifest.json is missing"):
        open_column(dataset, "none")


def test_texts_that_fit_come_in_the_same_order_with_and_without_columns(dataset):
    batching = Batching(16, 12, (12,), seed=3)
    column = Column("row", np.arange(len(dataset)), {})
    plain, with_column = Batches([dataset], batching), Batches([dataset], batching, columns=[column])
    for step in (0, 1, 200, 300):
        np.testing.assert_array_equal(plain(step), with_column(step))


def test_folds_leave_out_whole_blocks(dataset):
    column = Column("row", np.arange(len(dataset)), {})
    for fold in range(3):
        batches = Batches([dataset], Batching(16, 9, (9,)), columns=[column], folds=3, fold=fold)
        rows = np.concatenate([batches.columns(step)["row"] for step in range(batches.steps_per_epoch)])
        assert set(rows // BLOCK_ROWS % 3) == {0, 1, 2} - {fold}


def test_too_few_texts_are_refused(dataset):
    with pytest.raises(InputError, match="do not fill a batch of 100000"):
        Batches([dataset], Batching(100_000, 9, (9,)))
