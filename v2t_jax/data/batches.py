"""Batches of token ids as a pure function of (seed, step).

There is no iterator state: the data position in a checkpoint is the step, and any step can be asked for
at any time. Texts are kept as one flat array of ids, so an epoch's plan and each batch are a few numpy
operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from v2t_jax.data.vocabulary import EOS, PAD, Vocabulary
from v2t_jax.errors import InputError

SHORTEST_SPAN = 3
FULL_SPAN_SHARE = 0.75
WHOLE = slice(None)  # all rows of a batch


class TokenStore(NamedTuple):
    """Tokenized texts, end to end."""

    tokens: np.ndarray  # int32 [T], model ids without end-of-sequence
    offsets: np.ndarray  # int64 [M + 1], text i is tokens[offsets[i]:offsets[i + 1]]
    dropped: int = 0  # texts left out: empty, or with pieces that the vocabulary lacks

    @property
    def lengths(self) -> np.ndarray:
        """int64 [M], pieces in each text, end-of-sequence not counted."""
        return np.diff(self.offsets)


def tokenize(texts: Sequence[str], vocabulary: Vocabulary, chunk: int = 20_000) -> TokenStore:
    """Tokenizes texts; drops (and counts) those that are empty or have pieces outside the vocabulary."""
    kept: list[np.ndarray] = []
    for i in range(0, len(texts), chunk):
        kept += [ids for ids in vocabulary.encode(texts[i : i + chunk]) if len(ids) and ids.min() >= 0]
    tokens = np.concatenate([np.zeros(0, np.int32), *kept])
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in kept])]).astype(np.int64)
    return TokenStore(tokens, offsets, len(texts) - len(kept))


@dataclass(frozen=True)
class Batching:
    """How rows become batches.

    Raises:
        InputError: settings that contradict each other.
    """

    batch_size: int
    max_length: int  # most tokens in a row, end-of-sequence included
    bucket_lengths: tuple[int, ...]  # the row lengths that batches come in (one program each), rising to `max_length`
    span_share: float = 0.0  # 0..1, share of the texts that fit which are cut to a random span all the same
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

    def plan(self, rng: np.random.Generator, lengths: np.ndarray, lanes: int = 1, spans: bool = True) -> Plan:
        """Cuts rows to length and sorts them into batches whose rows are about as long as each other.

        Args:
            lengths: pieces of each row [N].
            lanes: each batch takes as many rows of the first N / lanes as of the next, and so on, in this order;
                with more than one, `lanes` must divide the batch's size, and that N.
            spans: whether to cut at random; otherwise a row that is too long keeps its beginning.
        """
        cut = self._cut(rng, lengths)
        skipped = rng.integers(0, lengths - cut + 1)
        if not spans:  # drawn all the same: texts that fit come in the same order either way
            cut, skipped = np.minimum(lengths, self.max_length - 1), np.zeros_like(lengths)
        steps, buckets = len(lengths) // self.batch_size, np.array(self.bucket_lengths)
        # Sorting by bucket over a random order both shuffles within a bucket and carries remainders upwards.
        order = rng.permutation(len(cut))
        lane, bucket = order * lanes // len(cut), np.searchsorted(buckets, cut[order] + 1)
        order = order[np.argsort(lane * len(buckets) + bucket, kind="stable")]
        order = order[: steps * self.batch_size].reshape(lanes, steps, self.batch_size // lanes)
        order = order.swapaxes(0, 1).reshape(steps, self.batch_size)[rng.permutation(steps)]
        return Plan(order, skipped, cut, buckets[np.searchsorted(buckets, cut[order].max(1) + 1)])

    def _cut(self, rng: np.random.Generator, lengths: np.ndarray) -> np.ndarray:
        """Pieces to use of each text."""
        longest = self.max_length - 1
        fits = lengths <= longest
        most = np.minimum(lengths, longest)
        random = rng.integers(np.minimum(SHORTEST_SPAN, most), most + 1)
        chance = rng.random(len(lengths))
        return np.where(chance < np.where(fits, self.span_share, 1 - FULL_SPAN_SHARE), random, most)


class Plan(NamedTuple):
    """Batches of N rows."""

    order: np.ndarray  # int64 [steps, batch], which row stands where
    skipped: np.ndarray  # int64 [N], pieces left out at each row's beginning
    cut: np.ndarray  # int64 [N], pieces used of each row
    widths: np.ndarray  # int64 [steps], the bucket length of each batch

    @property
    def padding_share(self) -> float:
        """Share of positions that are padding."""
        return 1 - float((self.cut[self.order] + 1).sum() / (self.widths.sum() * self.order.shape[1]))


def fill(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Rows int32 [n, width]: `lengths` [n] ids of the flat `tokens` from `starts` [n] on, end-of-sequence, padding."""
    position, lengths = np.arange(width), lengths[:, None]
    inside = position < lengths
    ids = tokens[np.where(inside, starts[:, None] + position, 0)]
    return np.where(inside, ids, np.where(position == lengths, EOS, PAD)).astype(np.int32)


class Batches:
    """Shuffled, length-bucketed batches over one or more token stores.

    In an epoch every text appears once (or `weights[i]` times for store i). A text that fits (at most
    `max_length - 1` pieces) is used whole, except that with probability `span_share` it gives a random
    contiguous span; a text that is too long always gives a random span, mostly of full length. Rows are
    grouped by length, so padding is small; what is left over in a bucket goes into the next longer one,
    so that exactly `rows // batch_size` batches come out and only the last few rows of an epoch are
    dropped.

    Args:
        stores: where texts come from.
        batching: how they become batches.
        weights: times that each store's texts appear in an epoch; a fraction is a fresh random subset.

    Raises:
        InputError: fewer rows than one batch, or weights that don't fit the stores.
    """

    def __init__(self, stores: Sequence[TokenStore], batching: Batching, weights: Sequence[float] | None = None):
        weights = [1.0] * len(stores) if weights is None else list(weights)
        if len(weights) != len(stores) or any(weight < 0 for weight in weights):
            raise InputError(f"Give one weight >= 0 a source: {len(stores)} sources, weights {weights}.")
        self.batching = batching
        self._tokens = np.concatenate([np.zeros(0, np.int32), *(store.tokens for store in stores)])
        shifts = np.cumsum([0, *(len(store.tokens) for store in stores)])
        self._starts = [store.offsets[:-1] + shift for store, shift in zip(stores, shifts, strict=False)]
        self._lengths = [store.lengths for store in stores]
        self._counts = [round(weight * len(store.lengths)) for weight, store in zip(weights, stores, strict=True)]
        self.steps_per_epoch = steps_per_epoch(sum(self._counts), batching.batch_size)
        self._planned: tuple[int, np.ndarray, Plan] | None = None

    def __call__(self, step: int, rows: slice = WHOLE) -> np.ndarray:
        """The batch of a step: int32 [batch_size, one of bucket_lengths], content ids + EOS + PAD.

        Args:
            rows: those that are wanted: of several processes, each makes its own.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        starts, plan = self._plan(epoch)
        mine = plan.order[index][rows]
        return fill(self._tokens, starts[mine], plan.cut[mine], plan.widths[index])

    @property
    def padding_share(self) -> float:
        """Share of positions that are padding in the current epoch (the first one, if none was begun)."""
        return self._plan(self._planned[0] if self._planned else 0)[1].padding_share

    def _plan(self, epoch: int) -> tuple[np.ndarray, Plan]:
        if self._planned is None or self._planned[0] != epoch:
            rng = np.random.default_rng((self.batching.seed, epoch))
            chosen = [_choose(rng, len(lengths), n) for lengths, n in zip(self._lengths, self._counts, strict=True)]
            starts = np.concatenate([s[c] for s, c in zip(self._starts, chosen, strict=True)])
            lengths = np.concatenate([n[c] for n, c in zip(self._lengths, chosen, strict=True)])
            plan = self.batching.plan(rng, lengths)
            self._planned = epoch, starts + plan.skipped, plan
        return self._planned[1:]


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches that `count` rows fill.

    Raises:
        InputError: none.
    """
    if count < batch_size:
        raise InputError(f"{count} texts do not fill a batch of {batch_size}: use more text or smaller batches.")
    return count // batch_size


def _choose(rng: np.random.Generator, available: int, count: int) -> np.ndarray:
    """`count` of `available` indices, each as often as any other, give or take one."""
    whole, rest = divmod(count, available) if available else (0, 0)
    return np.concatenate([np.tile(np.arange(available), whole), rng.permutation(available)[:rest]])
