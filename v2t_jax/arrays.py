"""Arrays from outside, of whatever library."""

from typing import Any

import numpy as np


def as_numpy(values: Any) -> np.ndarray:
    """Numbers of numpy, JAX or torch, or (nested) lists of them, as a numpy array; torch isn't imported for it.

    Raises:
        ValueError, TypeError, RuntimeError: what the libraries raise where that can't be done.
    """
    if isinstance(values, list | tuple) and any(hasattr(row, "detach") for row in values):
        values = [_detached(row) for row in values]
    return np.asarray(_detached(values))


def _detached(values: Any) -> Any:
    """A torch tensor made ready for numpy, which knows neither gradients nor GPUs nor torch's bfloat16."""
    return values.detach().cpu().float() if hasattr(values, "detach") else values
