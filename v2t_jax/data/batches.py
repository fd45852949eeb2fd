"""Batches of token ids as a pure function of (seed, step), the same on any number of hosts.

There is no iterator state: the data position in a checkpoint is the step, and any step can be asked for at any time.

An epoch is a random order of blocks of texts: single texts in memory; of a built data set, which is shuffled already,
runs of `BLOCK_ROWS`, which a disk reads at once. In this order the texts are cut into *windows* of some ten thousand,
and a window's texts are shuffled and sorted by length into batches. Every host plans all batches, from the lengths
alone. A window's texts belong to *lanes*: a batch's first rows come from the window's first texts, and so on. So the
rows of one host are a run of the window's texts, and a host reads the blocks of these and no others. The number of
lanes depends on the batch size alone, not on the number of hosts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
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
    """How texts become batches.

    Raises:
        InputError: settings that contradict each other.
    """

    batch_size: int
    max_length: int  # most tokens in a row, end-of-sequence included
    bucket_lengths: tuple[int, ...]  # the row lengths that batches come in (one program each), rising to `max_length`
    span_share: float = 0.0  # 0..1, share of the texts that fit which are still cut to a random span
    seed: int = 0  # with the step, decides everything

    def __post_init__(self) -> None:
        if not 0 <= self.span_share <= 1:
            raise InputError(f"span_share must lie in [0, 1], not {self.span_share}.")
        lengths = self.bucket_lengths
        rising = bool(lengths) and list(lengths) == sorted(set(lengths))
        if not rising or lengths[0] < 2 or lengths[-1] != self.max_length:
            raise InputError(f"bucket_lengths must rise from 2 or more to {self.max_length}, not {lengths}.")
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {self.batch_size}.")

    def plan(self, rng: np.random.Generator, lengths: np.ndarray, lanes: int, spans: bool) -> Plan:
        """Cuts texts to length and sorts them into batches whose rows are of similar length.

        Args:
            lengths: tokens of each text [N].
            lanes: each batch takes as many rows of the first N / lanes as of the next, and so on, in this order;
                it must divide the batch size, which must divide N.
            spans: whether to cut at random; otherwise a text that is too long keeps its beginning.
        """
        longest = self.max_length - 1
        most = np.minimum(lengths, longest)
        random = rng.integers(np.minimum(SHORTEST_SPAN, most), most + 1)
        share = np.where(lengths <= longest, self.span_share, 1 - FULL_SPAN_SHARE)
        cut = np.where(rng.random(len(lengths)) < share, random, most)
        skipped = rng.integers(0, lengths - cut + 1)
        if not spans:  # drawn all the same: texts that fit come in the same order either way
            cut, skipped = most, np.zeros_like(lengths)
        steps, buckets = len(lengths) // self.batch_size, np.array(self.bucket_lengths)
        # Sorting by bucket over a random order both shuffles within a bucket and carries remainders upwards.
        order = rng.permutation(len(cut))
        lane, bucket = order * lanes // len(cut), np.searchsorted(buckets, cut[order] + 1)
        order = order[np.argsort(lane * len(buckets) + bucket, kind="stable")]
        order = order.reshape(lanes, steps, -1).swapaxes(0, 1).reshape(steps, -1)[rng.permutation(steps)]
        return Plan(order, skipped, cut, buckets[np.searchsorted(buckets, cut[order].max(1) + 1)])


class Plan(NamedTuple):
    """Batches of N texts."""

    order: np.ndarray  # int64 [steps, batch], which text stands where
    skipped: np.ndarray  # int64 [N], tokens left out at each text's beginning
    cut: np.ndarray  # int64 [N], tokens used of each text
    widths: np.ndarray  # int64 [steps], the bucket length of each batch


class _Item(NamedTuple):
    ids: np.ndarray  # int32 [rows, width]
    columns: dict[str, np.ndarray]  # each [rows, ...]


class Batches:
    """Shuffled, length-bucketed batches.

    In an epoch every text appears once (or `weights[i]` times for data set i), but for the last few that fill no
    batch. A text that fits (at most `max_length - 1` tokens) is used whole, except that with probability `span_share`
    it gives a random contiguous span; a text that is too long always gives a random span, mostly of full length.

    A thread reads ahead; call from one thread.

    Args:
        datasets: one built data set, or any number in memory.
        batching: how their texts become batches.
        weights: times that each data set's texts appear in an epoch; a fraction is a new random subset each epoch.
        columns: what else to read of each text. They belong to the beginnings of texts: there are no spans with them.
        folds, fold: with 2 folds or more, the texts of this one are left out.

    Raises:
        InputError: too few texts for a batch, weights that don't fit the data sets, or columns and spans.
    """

    def __init__(
        self,
        datasets: Sequence[TokenDataset],
        batching: Batching,
        weights: Sequence[float] | None = None,
        columns: Sequence[Column] = (),
        folds: int = 1,
        fold: int = 0,
    ):
        weights = [1.0] * len(datasets) if weights is None else list(weights)
        if len(weights) != len(datasets) or any(weight < 0 for weight in weights):
            raise InputError(f"Give one weight >= 0 a source: {len(datasets)} sources, weights {weights}.")
        if columns and batching.span_share:
            raise InputError(f"{columns[0].name} belongs to whole texts, not to spans: set data.span_share to 0.")
        self.batching, self._columns, self._block = batching, columns, datasets[0].block_rows
        self._tokens, self._offsets = datasets[0].tokens, datasets[0].offsets
        for more in datasets[1:]:
            self._offsets = np.concatenate([self._offsets, more.offsets[1:] + len(self._tokens)])
            self._tokens = np.concatenate([self._tokens, more.tokens])
        ends = np.cumsum([len(dataset) for dataset in datasets])
        self._choices: list[tuple[np.ndarray, int]] = []  # blocks to choose from, and how many to choose
        for dataset, end, weight in zip(datasets, ends, weights, strict=True):
            blocks = np.arange(end - len(dataset), end, self._block) // self._block
            if folds > 1:
                blocks = blocks[fold_of(blocks * self._block, folds) != fold]
            self._choices.append((blocks, round(weight * len(blocks))))
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._planned: tuple[tuple[int, int], np.ndarray, Plan] | None = None
        self._ahead: _Ahead | None = None
        num_rows, size = int(self._order(0)[1].max(initial=0)), batching.batch_size
        if num_rows < size:
            raise InputError(f"{num_rows} texts do not fill a batch of {size}: use more text or smaller batches.")
        self.steps_per_epoch = num_rows // size
        self._lanes = math.gcd(size, LANES) if self._block > 1 else 1
        self._window_steps = max(1, WINDOW_ROWS // size)

    def __call__(self, step: int, rows: slice = WHOLE) -> np.ndarray:
        """The batch of a step: int32 [batch_size, one of bucket_lengths], content ids + EOS + PAD.

        Args:
            rows: those that are wanted; of several processes, each reads its own.
        """
        return self._item(step, rows).ids

    def columns(self, step: int, rows: slice = WHOLE) -> dict[str, np.ndarray]:
        """What the columns hold for these rows: by name, an array [rows, ...] each."""
        return self._item(step, rows).columns

    def _item(self, step: int, rows: slice) -> _Item:
        if self._ahead is None or self._ahead.rows != rows:
            self.close()
            self._ahead = _Ahead(self._read, rows)
        return self._ahead.get(step)

    def close(self) -> None:
        """Stops reading ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _read(self, step: int, rows: slice) -> _Item:
        epoch, index = divmod(step, self.steps_per_epoch)
        window, index = divmod(index, self._window_steps)
        texts, plan = self._window(epoch, window)
        mine = plan.order[index][rows]
        chosen = texts[mine]
        starts = self._offsets[chosen] + plan.skipped[mine]
        ids = pad_rows(self._tokens, starts, plan.cut[mine], plan.widths[index])
        return _Item(ids, {column.name: column.values[chosen] for column in self._columns})

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, Plan]:
        """A window's texts, in the epoch's order, and how they become batches."""
        if self._planned is None or self._planned[0] != (epoch, window):
            order, ends = self._order(epoch)
            first = window * self._window_steps * self.batching.batch_size
            steps = min(self._window_steps, self.steps_per_epoch - window * self._window_steps)
            last = first + steps * self.batching.batch_size
            a, b = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last)
            texts = (order[a : b + 1, None] * self._block + np.arange(self._block)).ravel()
            texts = texts[texts < len(self._offsets) - 1]  # the last block of all may be shorter
            texts = texts[first - (int(ends[a - 1]) if a else 0) :][: last - first]
            # Not (seed, epoch): that gives the order of the blocks, and numpy takes (seed, epoch, 0) for the same.
            rng = np.random.default_rng((self.batching.seed, epoch, 1 + window))
            lengths = self._offsets[texts + 1] - self._offsets[texts]
            plan = self.batching.plan(rng, lengths, self._lanes, spans=not self._columns)
            self._planned = (epoch, window), texts, plan
        return self._planned[1:]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's blocks in their order, and the number of texts up to the end of each."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self.batching.seed, epoch))
            order = rng.permutation(np.concatenate([_choose(rng, *choice) for choice in self._choices]))
            sizes = np.minimum(self._block, len(self._offsets) - 1 - order * self._block)
            self._epoch = epoch, order, np.cumsum(sizes)
        return self._epoch[1:]


def _choose(rng: np.random.Generator, available: np.ndarray, count: int) -> np.ndarray:
    """`count` of the available numbers, each as often as any other, give or take one."""
    whole, rest = divmod(count, len(available)) if len(available) else (0, 0)
    return np.concatenate([np.tile(available, whole), rng.permutation(available)[:rest]])


class _Ahead:
    """Reads some rows of the next steps in a thread."""

    def __init__(self, read: Callable[[int, slice], _Item], rows: slice):
        self.rows, self._read = rows, read
        self._executor = ThreadPoolExecutor(1)
        self._pending: deque[tuple[int, Future[_Item]]] = deque()

    def get(self, step: int) -> _Item:
        # What was read last stays first in line: its ids and its columns are asked for one after the other.
        while self._pending and self._pending[0][0] != step:
            self._pending.popleft()[1].cancel()
        following = self._pending[-1][0] + 1 if self._pending else step
        for ahead in range(following, step + PREFETCHED + 1):
            self._pending.append((ahead, self._executor.submit(self._read, ahead, self.rows)))
        return self._pending[0][1].result()

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
