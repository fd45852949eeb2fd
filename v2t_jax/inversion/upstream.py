"""What `mode="upstream"` changes, so that texts and the choices of every step equal the original's:

- one first guess, not W * W; only the last step's candidates count; no row stops (correction.py);
- before the last step, equal scores (of texts spelled in two ways) are ranked as by torch.topk (`topk_order`);
- models with a tokenizer of their own write texts of the original's length (`upstream_lengths`);
- a beam search for corrections ends by an older rule, `stop_rule="any"` (proposals.py, decode/beam.py);
- the result is the last step's text, even where an earlier one is nearer (api.py);
- vec2text.invert_strings embeds texts as they are, up to 128 tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.config import ModelConfig

UPSTREAM_LENGTH = 127  # tokens that the original's calls generate at most: 128 with the decoder's start id
SMALL = 16  # sort leaves ranges of this many to one last insertion sort, which is stable
Queue = list[tuple[float, int]]  # scores and their indices


def upstream_lengths(config: ModelConfig) -> tuple[ModelConfig, int]:
    """As the original's calls: texts of its length, but first guesses of the training texts', with the start id."""
    return dataclasses.replace(config, max_length=UPSTREAM_LENGTH), config.max_length - 1


def topk_order(scores: jax.Array) -> jax.Array:
    """Indices [B, P] int32 of scores [B, P], best first, as torch.topk(scores, P) ranks them; -inf is absent: last."""
    shape = jax.ShapeDtypeStruct(scores.shape, jnp.int32)
    return jax.pure_callback(lambda rows: np.stack([rank(row) for row in np.asarray(rows)]), shape, scores)


def rank(scores: np.ndarray) -> np.ndarray:
    """One row of `topk_order`."""
    # As torch on a CPU: GNU's nth_element, then sort, the introselect and introsort of Musser (1997), neither stable.
    present, absent = np.flatnonzero(scores > -np.inf), np.flatnonzero(scores == -np.inf)
    queue = [(float(scores[i]), int(i)) for i in present]
    # std::nth_element for the last place partitions the upper range until three are left, and sorts those.
    first = 0
    while len(queue) - first > 3:
        first = _partition(queue, first, len(queue))
    queue[first:] = sorted(queue[first:], key=lambda item: -item[0])
    front, last = queue[:-1], queue[-1:]  # the n-th has its place: `topk` sorts the others
    _partition_for_sort(front, 0, len(front))
    return np.array([i for _, i in sorted(front, key=lambda item: -item[0]) + last] + absent.tolist(), np.int32)


def _partition_for_sort(queue: Queue, first: int, last: int) -> None:
    """std::sort, but for its last pass."""
    while last - first > SMALL:
        cut = _partition(queue, first, last)
        _partition_for_sort(queue, cut, last)
        last = cut


def _partition(queue: Queue, first: int, last: int) -> int:
    """Moves the median of three to the front and better scores than it before worse ones; returns where those begin."""

    def better(i: int, j: int) -> bool:
        return queue[i][0] > queue[j][0]

    def swap(i: int, j: int) -> None:
        queue[i], queue[j] = queue[j], queue[i]

    # Of the second, the middle and the last, the one between the others; among equals, the one that comparing finds.
    second, middle, end = first + 1, first + (last - first) // 2, last - 1
    high, low = (second, middle) if better(second, middle) else (middle, second)
    between = end if better(high, end) else high
    swap(first, low if better(low, end) else between)
    low, high = first + 1, last
    while True:
        while better(low, first):
            low += 1
        high -= 1
        while better(first, high):
            high -= 1
        if low >= high:
            return low
        swap(low, high)
        low += 1
