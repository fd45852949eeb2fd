"""Batches of token ids as a pure function of (seed, step).

There is no iterator state: the data position in a checkpoint is the step, and any step can be asked for
at any time. Texts are kept as one flat array of ids, so an epoch's plan and each batch are a few numpy
operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from v2t_jax.data.tokenize import EOS, PAD, Vocabulary
from v2t_jax.errors import InputError

SHORTEST_SPAN = 3
FULL_SPAN_SHARE = 0.75


class TokenStore(NamedTuple):
    """Tokenised texts, end to end."""

    tokens: np.ndarray  # int32 [T], model ids without end-of-sequence
    offsets: np.ndarray  # int64 [M + 1], text i is tokens[offsets[i]:offsets[i + 1]]
    dropped: int = 0  # texts left out: empty, or with pieces that the vocabulary lacks

    @property
    def lengths(self) -> np.ndarray:
        """int64 [M], pieces in each text, end-of-sequence not counted."""
        return np.diff(self.offsets)


def tokenize(texts: Sequence[str], vocabulary: Vocabulary, chunk: int = 20_000) -> TokenStore:
    """Tokenises texts; drops (and counts) those that are empty or have pieces outside the vocabulary."""
    kept: list[np.ndarray] = []
    for i in range(0, len(texts), chunk):
        kept += [ids for ids in vocabulary.encode(texts[i : i + chunk]) if len(ids) and ids.min() >= 0]
    tokens = np.concatenate([np.zeros(0, np.int32), *kept])
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in kept])]).astype(np.int64)
    return TokenStore(tokens, offsets, len(texts) - len(kept))


class _Plan(NamedTuple):
    """One epoch: rows [N] sorted into batches, and the batches' order."""

    starts: np.ndarray  # int64 [steps, batch], into the flat tokens
    lengths: np.ndarray  # int64 [steps, batch], without end-of-sequence
    widths: np.ndarray  # int64 [steps], the batch's bucket length


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
        weights: times that each store's texts appear in an epoch; a fraction is a fresh random subset.
        batch_size: rows in every batch.
        max_length: most tokens in a row, end-of-sequence included.
        span_share: 0..1, see above.
        bucket_lengths: the row lengths that batches come in (one program each), rising to `max_length`.
        seed: with the step, decides everything.

    Raises:
        InputError: fewer rows than one batch, or settings that contradict each other.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float] | None = None,
        *,
        batch_size: int,
        max_length: int,
        span_share: float,
        bucket_lengths: tuple[int, ...],
        seed: int,
    ):
        weights = [1.0] * len(stores) if weights is None else list(weights)
        if len(weights) != len(stores) or any(weight < 0 for weight in weights):
            raise InputError(f"Give one weight >= 0 a source: {len(stores)} sources, weights {weights}.")
        if not 0 <= span_share <= 1:
            raise InputError(f"span_share must lie in [0, 1], not {span_share}.")
        rising = bool(bucket_lengths) and list(bucket_lengths) == sorted(set(bucket_lengths))
        if not rising or bucket_lengths[0] < 2 or bucket_lengths[-1] != max_length:
            raise InputError(f"bucket_lengths must rise from 2 or more to {max_length}, not {bucket_lengths}.")
        self.batch_size, self.max_length = batch_size, max_length
        self.span_share, self.seed = span_share, seed
        self._buckets = np.array(bucket_lengths, np.int64)
        self._tokens = np.concatenate([np.zeros(0, np.int32), *(store.tokens for store in stores)])
        shifts = np.cumsum([0, *(len(store.tokens) for store in stores)])
        self._starts = [store.offsets[:-1] + shift for store, shift in zip(stores, shifts, strict=False)]
        self._lengths = [store.lengths for store in stores]
        self._counts = [round(weight * len(store.lengths)) for weight, store in zip(weights, stores, strict=True)]
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}.")
        self.steps_per_epoch = sum(self._counts) // batch_size
        if self.steps_per_epoch < 1:
            count = sum(self._counts)
            raise InputError(f"{count} texts do not fill a batch of {batch_size}: use more text or smaller batches.")
        self._planned: tuple[int, _Plan] | None = None

    def __call__(self, step: int, rows: slice = slice(None)) -> np.ndarray:  # noqa: B008 (slices don't change)
        """The batch of a step: int32 [batch_size, one of bucket_lengths], content ids + EOS + PAD.

        `rows` are those that are wanted of it: a process of several makes its own only.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        plan = self._plan(epoch)
        position = np.arange(plan.widths[index])
        starts, lengths = plan.starts[index][rows, None], plan.lengths[index][rows, None]
        inside = position < lengths
        tokens = self._tokens[np.where(inside, starts + position, 0)]
        return np.where(inside, tokens, np.where(position == lengths, EOS, PAD)).astype(np.int32)

    @property
    def padding_share(self) -> float:
        """Share of positions that are padding in the current epoch (the first one, if none was begun)."""
        plan = self._planned[1] if self._planned else self._plan(0)
        return 1 - float((plan.lengths + 1).sum() / (plan.widths.sum() * self.batch_size))

    def _plan(self, epoch: int) -> _Plan:
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._make_plan(np.random.default_rng((self.seed, epoch)))
        return self._planned[1]

    def _make_plan(self, rng: np.random.Generator) -> _Plan:
        chosen = [_choose(rng, len(lengths), count) for lengths, count in zip(self._lengths, self._counts, strict=True)]
        starts = np.concatenate([s[c] for s, c in zip(self._starts, chosen, strict=True)])
        lengths = np.concatenate([n[c] for n, c in zip(self._lengths, chosen, strict=True)])
        cut = self._cut(rng, lengths)
        starts = starts + rng.integers(0, lengths - cut + 1)
        # Sorting by bucket over a random order both shuffles within a bucket and carries remainders upwards.
        order = rng.permutation(len(cut))
        order = order[np.argsort(np.searchsorted(self._buckets, cut[order] + 1), kind="stable")]
        order = order[: self.steps_per_epoch * self.batch_size].reshape(self.steps_per_epoch, self.batch_size)
        order = order[rng.permutation(self.steps_per_epoch)]
        widths = self._buckets[np.searchsorted(self._buckets, cut[order].max(1) + 1)]
        return _Plan(starts[order], cut[order], widths)

    def _cut(self, rng: np.random.Generator, lengths: np.ndarray) -> np.ndarray:
        """Pieces to use of each text."""
        longest = self.max_length - 1
        fits = lengths <= longest
        most = np.minimum(lengths, longest)
        random = rng.integers(np.minimum(SHORTEST_SPAN, most), most + 1)
        chance = rng.random(len(lengths))
        return np.where(chance < np.where(fits, self.span_share, 1 - FULL_SPAN_SHARE), random, most)


def _choose(rng: np.random.Generator, available: int, count: int) -> np.ndarray:
    """`count` of `available` indices, each as often as any other, give or take one."""
    whole, rest = divmod(count, available) if available else (0, 0)
    return np.concatenate([np.tile(np.arange(available), whole), rng.permutation(available)[:rest]])
