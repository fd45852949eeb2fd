"""The order in which torch ranks equal scores.

The original keeps the first W of `torch.topk` over all candidates, and equal scores are common: texts spelled in two
ways have one embedding. On a CPU, `topk` of all n values is C++'s `nth_element` and then `sort`, neither of them
stable; mode "upstream" follows GNU's versions of both, the introselect and introsort of Musser (1997).
"""

import jax
import jax.numpy as jnp
import numpy as np

SMALL = 16  # sort leaves ranges of this many to one last insertion sort, which is stable

Queue = list[tuple[float, int]]  # scores and their indices


def topk_order(scores: jax.Array) -> jax.Array:
    """Indices [B, P] int32 of scores [B, P], best first, as torch.topk(scores, P) ranks them; -inf is absent: last."""
    shape = jax.ShapeDtypeStruct(scores.shape, jnp.int32)
    return jax.pure_callback(lambda rows: np.stack([rank(row) for row in np.asarray(rows)]), shape, scores)


def rank(scores: np.ndarray) -> np.ndarray:
    """One row of `topk_order`."""
    present, absent = np.flatnonzero(scores > -np.inf), np.flatnonzero(scores == -np.inf)
    queue = [(float(scores[i]), int(i)) for i in present]
    # std::nth_element for the last place partitions the upper range until three are left, and sorts those.
    first = 0
    while len(queue) - first > 3:
        first = _partition(queue, first, len(queue))
    queue[first:] = _sorted(queue[first:])
    front, last = queue[:-1], queue[-1:]  # the n-th has its place: `topk` sorts the others
    _partition_for_sort(front, 0, len(front))
    return np.array([i for _, i in _sorted(front) + last] + absent.tolist(), np.int32)


def _sorted(queue: Queue) -> Queue:
    return sorted(queue, key=lambda item: -item[0])


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
