"""Batches of token ids as a pure function of (seed, step), the same on any number of hosts.

There is no iterator state: the data position in a checkpoint is the step, and any step can be asked for at any time.

An epoch is a random order of blocks of texts: single texts in memory; of a built data set, which is shuffled already,
runs of `BLOCK_ROWS`, which a disk reads at once. In this order the texts are cut into *windows* of some ten thousand,
and a window's texts are shuffled and sorted by length into batches. Every host plans all batches, from the lengths
alone. A window's texts belong to *lanes*: a batch's first rows come from the window's first texts, and so on. So a host
reads only the blocks of its own rows. The number of lanes depends on the batch size alone.
"""

import functools
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from v2t_jax.data.columns import Column
from v2t_jax.data.dataset import TokenDataset, fold_of, pad_rows
from v2t_jax.errors import InputError

SHORTEST_SPAN = 3
FULL_SPAN_SHARE = 0.75
WHOLE = slice(None)  # all rows of a batch
LANES = 8  # at most; more would agree less on lengths and pad more; of more hosts, several read the same lane
WINDOW_ROWS = 65536  # about: with wider windows lanes agree better, and more pages must stay in memory
PREFETCHED = 16  # steps


@dataclass(frozen=True)
class Batching:
    """How texts become batches."""

    batch_size: int
    max_length: int  # most tokens in a row, end-of-sequence included
    bucket_lengths: tuple[int, ...]  # the row lengths that batches come in (one program each), rising to `max_length`
    span_share: float = 0.0  # 0..1, share of the texts that fit which are still cut to a random span
    seed: int = 0  # with the step, decides everything

    def __post_init__(self) -> None:
        lengths = self.bucket_lengths
        if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 2 or lengths[-1] != self.max_length:
            raise InputError(f"bucket_lengths must rise from 2 or more to {self.max_length}, not {lengths}.")


class _Window(NamedTuple):
    texts: np.ndarray  # int64 [steps, batch], which text stands where
    starts: np.ndarray  # int64 [steps, batch], where its tokens begin
    lengths: np.ndarray  # int64 [steps, batch], how many of them are used
    widths: np.ndarray  # int64 [steps], the bucket length of each batch


_Item = tuple[np.ndarray, dict[str, np.ndarray]]  # ids int32 [rows, width]; columns, each [rows, ...]


class Batches:
    """Shuffled, length-bucketed batches.

    In an epoch every text appears once, but for the last few that fill no batch. A text that fits (at most
    `max_length - 1` tokens) is used whole, except that with probability `span_share` it gives a random contiguous span;
    a text that is too long always gives a random span, mostly of full length. A thread reads ahead; call from one.

    Args:
        datasets: one built data set, or any number in memory.
        weights: times that each data set's texts appear in an epoch; a fraction is a new random subset each epoch.
        columns: what else to read of each text. They belong to the beginnings of texts: there are no spans with them.
        folds, fold: with 2 folds or more, the texts of this one are left out.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        batching: Batching,
        weights: Sequence[float] = (),
        columns: Sequence[Column] = (),
        folds: int = 1,
        fold: int = 0,
    ):
        if columns and batching.span_share:
            raise InputError(f"{columns[0].name} belongs to whole texts, not to spans: set data.span_share to 0.")
        self.batching, self._columns, self._block = batching, columns, datasets[0].block_rows
        self._tokens, self._offsets = datasets[0].tokens, datasets[0].offsets
        for more in datasets[1:]:
            self._offsets = np.concatenate([self._offsets, more.offsets[1:] + len(self._tokens)])
            self._tokens = np.concatenate([self._tokens, more.tokens])
        self._choices: list[tuple[np.ndarray, int]] = []  # blocks to choose from, and how many to choose
        end = 0
        for dataset, weight in zip(datasets, weights or [1.0] * len(datasets), strict=True):
            blocks = np.arange(end, end + len(dataset), self._block) // self._block
            end += len(dataset)
            if folds > 1:
                blocks = blocks[fold_of(blocks * self._block, folds) != fold]
            self._choices.append((blocks, round(weight * len(blocks))))
        self._order, self._window = functools.lru_cache(1)(self._make_order), functools.lru_cache(1)(self._make_window)
        num_rows, size = int(self._order(0)[1].max(initial=0)), batching.batch_size
        if num_rows < size:
            raise InputError(f"{num_rows} texts do not fill a batch of {size}: use more text or smaller batches.")
        self.steps_per_epoch = num_rows // size
        self._lanes = math.gcd(size, LANES) if self._block > 1 else 1
        self._window_steps = max(1, WINDOW_ROWS // size)
        self._executor = ThreadPoolExecutor(1)
        self._ahead: dict[tuple[int, int | None, int | None], Future[_Item]] = {}

    def __call__(self, step: int, rows: slice = WHOLE) -> np.ndarray:
        """A step's batch, or some rows of it: int32 [batch_size, one of bucket_lengths], content ids + EOS + PAD."""
        return self._item(step, rows)[0]

    def columns(self, step: int, rows: slice = WHOLE) -> dict[str, np.ndarray]:
        """What the columns hold for these rows, [rows, ...] each."""
        return self._item(step, rows)[1]

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _item(self, step: int, rows: slice) -> _Item:
        wanted = [(ahead, rows.start, rows.stop) for ahead in range(step, step + PREFETCHED + 1)]
        for left in self._ahead.keys() - set(wanted):
            self._ahead.pop(left).cancel()
        for key in wanted:
            if key not in self._ahead:
                self._ahead[key] = self._executor.submit(self._read, key[0], rows)
        return self._ahead[wanted[0]].result()

    def _read(self, step: int, rows: slice) -> _Item:
        epoch, step = divmod(step, self.steps_per_epoch)
        number, step = divmod(step, self._window_steps)
        window = self._window(epoch, number)
        ids = pad_rows(self._tokens, window.starts[step, rows], window.lengths[step, rows], window.widths[step])
        return ids, {column.name: column.values[window.texts[step, rows]] for column in self._columns}

    def _make_window(self, epoch: int, number: int) -> _Window:
        """Cuts a window's texts to length and sorts them into batches whose rows are of similar length."""
        order, ends = self._order(epoch)
        size, longest = self.batching.batch_size, self.batching.max_length - 1
        steps = min(self._window_steps, self.steps_per_epoch - number * self._window_steps)
        first = number * self._window_steps * size
        a, b = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, first + steps * size)
        texts = (order[a : b + 1, None] * self._block + np.arange(self._block)).ravel()
        texts = texts[texts < len(self._offsets) - 1]  # the last block of all may be shorter
        texts = texts[first - (int(ends[a - 1]) if a else 0) :][: steps * size]
        starts = self._offsets[texts]
        lengths = self._offsets[texts + 1] - starts
        # Not (seed, epoch): that gives the order of the blocks, and numpy takes (seed, epoch, 0) for the same.
        rng = np.random.default_rng((self.batching.seed, epoch, 1 + number))
        used = np.minimum(lengths, longest)
        random = rng.integers(np.minimum(SHORTEST_SPAN, used), used + 1)
        share = np.where(lengths <= longest, self.batching.span_share, 1 - FULL_SPAN_SHARE)
        cut = np.where(rng.random(len(lengths)) < share, random, used)
        skipped = rng.integers(0, lengths - cut + 1)
        if not self._columns:  # drawn all the same: texts that fit come in the same order either way
            used, starts = cut, starts + skipped
        buckets = np.array(self.batching.bucket_lengths)
        # Sorting by bucket over a random order both shuffles within a bucket and carries remainders upwards.
        shuffled = rng.permutation(len(used))
        lane, bucket = shuffled * self._lanes // len(used), np.searchsorted(buckets, used[shuffled] + 1)
        shuffled = shuffled[np.argsort(lane * len(buckets) + bucket, kind="stable")]
        # Each batch takes as many rows of every lane.
        rows = shuffled.reshape(self._lanes, steps, -1).swapaxes(0, 1).reshape(steps, -1)[rng.permutation(steps)]
        return _Window(texts[rows], starts[rows], used[rows], buckets[np.searchsorted(buckets, used[rows].max(1) + 1)])

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's blocks in their order, and the number of texts up to the end of each."""
        rng = np.random.default_rng((self.batching.seed, epoch))
        order = rng.permutation(np.concatenate([_choose(rng, *choice) for choice in self._choices]))
        sizes = np.minimum(self._block, len(self._offsets) - 1 - order * self._block)
        return order, np.cumsum(sizes)


def _choose(rng: np.random.Generator, available: np.ndarray, count: int) -> np.ndarray:
    """`count` of the available numbers, each as often as any other, give or take one."""
    whole, rest = divmod(count, len(available)) if len(available) else (0, 0)
    return np.concatenate([np.tile(available, whole), rng.permutation(available)[:rest]])
