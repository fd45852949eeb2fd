"""Batches of a built data set (`blocks`), read while they are needed: like `pipeline.Batches`, a function of
(seed, step) alone, for data sets that don't fit into memory and any number of hosts.

An epoch is a random order of blocks; as the build has shuffled texts over the whole data set, a block's texts have
nothing in common. Their rows, in this order, are cut into *windows* of some ten thousand, and a window's rows are
shuffled and sorted into batches as `pipeline.Batching` does, by their lengths, which take two bytes a row to read. So
every host knows the shape of every batch, and the batches, whatever part of them it reads itself.

A window's rows belong to *lanes*: the first batch rows come from the window's first rows, and so on. The rows of one
host are then a run of the window's rows: it reads the ids (and vectors) of the blocks that these lie in, and no others.
The number of lanes depends on the batch size alone, so the batches are the same on any number of hosts.

Grain (https://github.com/google/grain) prefetches: its `MapDataset` calls `_read` in a thread, ahead of the training
loop. Its own shuffle and sharding aren't used: they shuffle records, which here are blocks, know nothing of lengths,
and a host's part of them depends on the number of hosts. Its iterator's state is {"next_index": step}: the step in a
checkpoint holds it.
"""

import math
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from v2t_jax.data.batches import WHOLE, Batching, Plan, fill, steps_per_epoch
from v2t_jax.data.blocks import LENGTH_DTYPE, Column, StoredTexts, fold_of
from v2t_jax.errors import InputError

LANES = 8  # at most; more would agree less on lengths and pad more, and of more hosts, several read the same lane
WINDOW_ROWS = 65536  # about: with wider windows lanes agree better, and more must be in memory
PREFETCHED = 16  # steps


class _Item(NamedTuple):
    """Some rows of a batch."""

    ids: np.ndarray  # int32 [rows, width]
    columns: dict[str, np.ndarray]  # each [rows, ...]


class _Part(NamedTuple):
    """Consecutive rows of a window, in memory."""

    first: int  # row in the window
    tokens: np.ndarray  # [T], end to end
    starts: np.ndarray  # int64 [rows], where each row begins
    columns: dict[str, np.ndarray]


class StoredBatches:
    """Shuffled, length-bucketed batches of a built data set.

    In an epoch every text appears once, but the last few that fill no batch. Use one reader from one thread.

    Args:
        stored: the data set.
        batching: how its texts become batches.
        columns: what else to read of each text, of `stored`'s columns. They belong to the beginnings of texts, so there
            are no random spans with them.
        folds, fold: with 2 folds or more, the texts of this one (`blocks.fold_of`) are left out.

    Raises:
        InputError: fewer texts than one batch, or columns and spans; in reading, damaged files.
    """

    def __init__(
        self, stored: StoredTexts, batching: Batching, columns: Sequence[Column] = (), folds: int = 1, fold: int = 0
    ):
        self.batching = batching
        self._stored = stored
        self._columns = columns
        if columns and batching.span_share:
            raise InputError(
                f"{columns[0].name} belongs to whole texts, not to spans of them: set data.span_share to 0."
            )
        self._blocks_used = np.arange(len(stored.block_rows))
        if folds > 1:
            self._blocks_used = self._blocks_used[fold_of(self._blocks_used, folds) != fold]
        self.steps_per_epoch = steps_per_epoch(int(stored.block_rows[self._blocks_used].sum()), batching.batch_size)
        self._lanes = math.gcd(batching.batch_size, LANES)
        self._window_steps = max(1, WINDOW_ROWS // batching.batch_size)
        self._lock = threading.Lock()
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._planned: dict[tuple[int, int], Plan] = {}
        self._parts: dict[tuple[int, ...], _Part] = {}
        self._ahead: _Ahead | None = None

    def __call__(self, step: int, rows: slice = WHOLE) -> np.ndarray:
        """The batch of a step: int32 [batch_size, one of bucket_lengths], content ids + EOS + PAD.

        Args:
            rows: those that are wanted: of several processes, each reads its own. Other rows begin to read anew.
        """
        return self._item(step, rows).ids

    def columns(self, step: int, rows: slice = WHOLE) -> dict[str, np.ndarray]:
        """What the columns hold for these rows: by name, an array [rows, ...] each."""
        return self._item(step, rows).columns

    def close(self) -> None:
        """Stops reading ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _item(self, step: int, rows: slice) -> _Item:
        if self._ahead is None or self._ahead.rows != rows:
            self.close()
            self._ahead = _Ahead(self, rows)
        return self._ahead.get(step)

    def _read(self, step: int, rows: slice) -> _Item:
        epoch, index = divmod(step, self.steps_per_epoch)
        window, index = divmod(index, self._window_steps)
        with self._lock:
            plan = self._plan(epoch, window)
            mine = plan.order[index][rows]
            lane_rows = plan.order.size // self._lanes
            first, last = mine.min() // lane_rows * lane_rows, -(-(mine.max() + 1) // lane_rows) * lane_rows
            part = self._part(epoch, window, int(first), int(last))
        local = mine - part.first
        ids = fill(part.tokens, part.starts[local] + plan.skipped[mine], plan.cut[mine], plan.widths[index])
        return _Item(ids, {name: column[local] for name, column in part.columns.items()})

    def _plan(self, epoch: int, window: int) -> Plan:
        if (epoch, window) not in self._planned:
            _drop_oldest(self._planned)
            steps = min(self._window_steps, self.steps_per_epoch - window * self._window_steps)
            blocks, rows = self._blocks(epoch, window, 0, steps * self.batching.batch_size)
            lengths = np.concatenate(self._stored.lengths.read(blocks, LENGTH_DTYPE))[rows].astype(np.int64)
            # Not (seed, epoch): that gives the order of the blocks, and numpy takes (seed, epoch, 0) for the same.
            rng = np.random.default_rng((self.batching.seed, epoch, 1 + window))
            self._planned[epoch, window] = self.batching.plan(rng, lengths, self._lanes, spans=not self._columns)
        return self._planned[epoch, window]

    def _part(self, epoch: int, window: int, first: int, last: int) -> _Part:
        key = (epoch, window, first, last)
        if key not in self._parts:
            _drop_oldest(self._parts)
            blocks, rows = self._blocks(epoch, window, first, last)
            lengths = np.concatenate(self._stored.lengths.read(blocks, LENGTH_DTYPE))
            tokens = np.concatenate(self._stored.tokens.read(blocks, self._stored.token_dtype))
            starts = np.cumsum(lengths, dtype=np.int64) - lengths
            columns = {column.name: column.read(blocks)[rows] for column in self._columns}
            self._parts[key] = _Part(first, tokens, starts[rows], columns)
        return self._parts[key]

    def _blocks(self, epoch: int, window: int, first: int, last: int) -> tuple[np.ndarray, slice]:
        """The blocks in which rows `first` to `last` of a window lie, and where in them."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng((self.batching.seed, epoch)).permutation(self._blocks_used)
            self._epoch = epoch, order, np.cumsum(self._stored.block_rows[order])
        _, order, ends = self._epoch
        begin = window * self._window_steps * self.batching.batch_size
        a, b = np.searchsorted(ends, begin + first, side="right"), np.searchsorted(ends, begin + last)
        skipped = begin + first - (int(ends[a - 1]) if a else 0)
        return order[a : b + 1], slice(skipped, skipped + last - first)


def _drop_oldest(cache: dict[Any, Any]) -> None:
    """Two windows are enough: the one that is used and the one that is read ahead."""
    while len(cache) > 1:
        del cache[next(iter(cache))]


class _Ahead:
    """Grain's iterator over some rows of every step, which may be set to any step."""

    def __init__(self, batches: StoredBatches, rows: slice):
        import grain  # a second's work that the in-memory batches do without

        class Steps:
            def __len__(self) -> int:
                return sys.maxsize

            def __getitem__(self, step: Any) -> _Item:
                return batches._read(int(step), rows)

        self.rows = rows
        steps: Any = grain.MapDataset.source(Steps())
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED)
        self._iterator = iter(steps.to_iter_dataset(options))
        self._latest: tuple[int, _Item] | None = None

    def get(self, step: int) -> _Item:
        if self._latest is None or self._latest[0] != step:
            if step != (self._latest[0] + 1 if self._latest else 0):
                self._iterator.set_state({"next_index": step})
            self._latest = None  # an error leaves nothing to go on from
            self._latest = step, next(self._iterator)
        return self._latest[1]

    def close(self) -> None:
        self._iterator.close()
