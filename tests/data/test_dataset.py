"""Batches of a built data set: the same on any number of hosts and at any step, every text once an epoch."""

import subprocess
import sys

import numpy as np
import pytest

from v2t_jax.data import dataset as stored_module
from v2t_jax.data.batches import Batching
from v2t_jax.data.blocks import LENGTH_DTYPE, ROWS, ColumnWriter, StoredTexts
from v2t_jax.data.build import BuildSettings, Workers, build
from v2t_jax.data.dataset import StoredBatches
from v2t_jax.data.vocabulary import EOS, PAD
from v2t_jax.errors import InputError

from .conftest import PIECES, make_tokenizer

LETTERS = [piece for piece in PIECES if len(piece) == 1 and piece.isalpha()]
BATCHING = Batching(batch_size=16, max_length=9, bucket_lengths=(5, 7, 9), span_share=0.3, seed=3)


def make_text(i):
    """A text that tells its number by its pieces: ten digits in letters, cut to between three and ten."""
    digits = f"{i * 7919 % 10**6:06d}{i:04d}"
    return " ".join(LETTERS[int(d)] for d in digits[i % 7 :])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a data set of some 4000 short texts."""
    folder = tmp_path_factory.mktemp("stored")
    source = folder / "texts.txt"
    source.write_text("\n".join(make_text(i) for i in range(4000)))
    settings = BuildSettings(shard_bytes=20_000, held_out_share=0.01)
    return build([str(source)], folder / "built", make_tokenizer(), settings, Workers()).folder


@pytest.fixture
def stored(made):
    return StoredTexts(made)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(stored_module, "WINDOW_ROWS", 500)


def all_rows(stored):
    return [row for shard in range(len(stored.manifest["shards"])) for b in stored.texts(shard) for row in b]


def contents(batch):
    return [tuple(row[row > EOS]) for row in batch]


def is_span(short, text):
    return any(short == text[i : i + len(short)] for i in range(len(text) - len(short) + 1))


def test_rows_are_content_then_end_then_padding(stored):
    batches = StoredBatches(stored, BATCHING)
    assert len(stored.manifest["shards"]) > 2 and len(stored.block_rows) > 8
    seen = set()
    for step in range(batches.steps_per_epoch + 3):
        batch = batches(step)
        assert batch.dtype == np.int32 and batch.shape[0] == 16
        seen.add(batch.shape[1])
        ends = (batch == EOS).argmax(1)
        for row, end in zip(batch, ends, strict=True):
            assert end > 0 and (row[:end] > EOS).all() and row[end] == EOS and (row[end + 1 :] == PAD).all()
    assert seen == {5, 7, 9}


def test_every_text_is_there_once_an_epoch(stored):
    rows = [tuple(row) for row in all_rows(stored)]
    whole = Batching(batch_size=16, max_length=11, bucket_lengths=(5, 8, 11), seed=3)
    batches = StoredBatches(stored, whole)
    orders = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        found = [row for step in steps for row in contents(batches(step))]
        assert len(found) == len(set(found)) == len(rows) // 16 * 16 and set(found) <= set(rows)
        orders.append(found)
    assert orders[0] != orders[1]


def test_a_batch_has_texts_from_everywhere(stored, monkeypatch):
    monkeypatch.setattr(stored_module, "WINDOW_ROWS", 1 << 16)
    place = {tuple(row): i for i, row in enumerate(all_rows(stored))}
    batches = StoredBatches(stored, Batching(batch_size=16, max_length=11, bucket_lengths=(11,), seed=3))
    for step in range(batches.steps_per_epoch):
        assert np.ptp([place[row] for row in contents(batches(step))]) > len(place) / 2


def test_long_texts_give_spans(stored):
    rows = {tuple(row) for row in all_rows(stored)}
    batches = StoredBatches(stored, BATCHING)
    found = [row for step in range(20) for row in contents(batches(step))]
    assert all(any(is_span(row, text) for text in rows) for row in found[:40])
    assert any(row not in rows for row in found) and any(row in rows for row in found)


def share(batch_size: int, index: int, count: int) -> slice:
    """A host's rows of a batch."""
    return slice(index * batch_size // count, (index + 1) * batch_size // count)


def test_any_number_of_hosts_reads_the_same_batches(stored):
    alone = StoredBatches(stored, BATCHING)
    steps = [*range(40), alone.steps_per_epoch - 1, alone.steps_per_epoch, 3 * alone.steps_per_epoch + 5]
    expected = [alone(step) for step in steps]
    for count in (2, 4, 8, 16):
        hosts = [StoredBatches(StoredTexts(stored.folder), BATCHING) for _ in range(count)]
        for step, whole in zip(steps, expected, strict=True):
            parts = [host(step, share(16, i, count)) for i, host in enumerate(hosts)]
            np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_any_step_is_the_same_however_it_is_reached(stored):
    walked = StoredBatches(stored, BATCHING)
    batches = [walked(step) for step in range(60)]
    resumed = StoredBatches(stored, BATCHING)
    for step in (41, 42, 7, 59, 0, 1, 1):
        np.testing.assert_array_equal(resumed(step), batches[step])
    other = StoredBatches(stored, Batching(16, 9, (5, 7, 9), 0.3, seed=4))
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(batches, map(other, range(60)), strict=True))


def test_a_host_reads_its_own_blocks_only(stored, monkeypatch):
    monkeypatch.setattr(stored_module, "WINDOW_ROWS", 1 << 16)  # an epoch
    blocks = []
    for index in range(4):
        batches = StoredBatches(StoredTexts(stored.folder), BATCHING)
        records, read = batches._stored.tokens, []
        monkeypatch.setattr(records, "_read", lambda b, d, r=records._read, read=read: (read.append(b), r(b, d))[1])
        for step in range(30):
            batches(step, share(16, index, 4))
        blocks.append(set(read))
        assert len(read) == len(blocks[-1])  # each once
    assert set.union(*blocks) == set(range(len(stored.block_rows)))
    assert sum(map(len, blocks)) <= len(stored.block_rows) + 3  # two hosts share a block at each border


def test_padding_is_below_a_tenth(stored, monkeypatch):
    monkeypatch.setattr(stored_module, "WINDOW_ROWS", 1 << 16)
    batches = StoredBatches(stored, Batching(32, 11, tuple(range(4, 12))))
    found = [batches(step) for step in range(batches.steps_per_epoch)]
    assert sum((batch == PAD).sum() for batch in found) / sum(batch.size for batch in found) < 0.1


def test_columns_go_with_their_rows(stored):
    writer = ColumnWriter(stored, "first-and-length", "float16", (2,), {"max_length": 9})
    for shard in writer.missing():
        blocks = (np.array([[row[0], len(row)] for row in block]) for block in stored.texts(shard))
        writer.write(shard, blocks)
    writer.finish()
    batching = Batching(16, 9, (5, 7, 9), seed=3)
    made = stored.column("first-and-length")
    hosts = [StoredBatches(StoredTexts(stored.folder), batching, [made]) for _ in range(2)]
    for step in (0, 1, 40):
        for i, host in enumerate(hosts):
            rows = share(16, i, 2)
            ids, column = host(step, rows), host.columns(step, rows)["first-and-length"]
            assert column.dtype == np.float16 and column.shape == (8, 2)
            np.testing.assert_array_equal(column[:, 0], ids[:, 0])
            np.testing.assert_array_equal(np.minimum(column[:, 1], 8), (ids > EOS).sum(1))
    with pytest.raises(InputError, match="set data.span_share to 0"):
        StoredBatches(stored, BATCHING, [made])
    with pytest.raises(InputError, match="columns/none/manifest.json is missing"):
        stored.column("none")


def test_lengths_are_those_of_the_rows(stored):
    assert stored.block_rows.max() == ROWS
    for block in range(len(stored.block_rows)):
        (lengths,), (ids,) = stored.lengths.read([block], LENGTH_DTYPE), stored.tokens.read([block], stored.token_dtype)
        assert len(lengths) == stored.block_rows[block] and lengths.sum() == len(ids)


def test_too_few_texts_are_refused(stored):
    with pytest.raises(InputError, match="do not fill a batch of 100000"):
        StoredBatches(stored, Batching(100_000, 9, (9,)))


def test_damage_reaches_the_reader_and_is_named(stored, tmp_path):
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(stored.folder), str(folder)], check=True)
    copy = StoredTexts(folder)
    for shard in range(len(copy.manifest["shards"])):
        file = folder / "tokens" / f"{shard:05d}.array_record"
        (ids,) = copy.tokens.read([copy.first_block[shard]], copy.token_dtype)
        data = bytearray(file.read_bytes())
        data[data.index(ids.tobytes())] ^= 1
        file.write_bytes(data)
    batches = StoredBatches(StoredTexts(folder), BATCHING)
    with pytest.raises(InputError, match=r"Block \d+ of .*array_record is damaged"):
        for step in range(batches.steps_per_epoch):
            batches(step)


def test_grain_brings_no_tensorflow():
    code = "import sys, grain; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert not {"tensorflow", "torch"} & set(done.stdout.split())
