"""How likely a recovered text is exact: logistic regression on how near its embedding lies, and how far off the next.

The text itself stands out: its distance to the target is that of rounding or noise, and any other text's is far larger.
The weights belong to a model, fitted by `v2t calibrate` on held-out texts, some of whose embeddings got noise.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

Weights = tuple[float, float, float]  # of 1, log10 of the distance, and log10 of how many times further the next lies
ROUNDING = 1e-7  # cosine distance below which float32 sees no difference
RIDGE = 0.01  # penalty for each squared weight: exact and other texts can often be separated


def probability(weights: Weights, cosine: np.ndarray | float, runner_up: np.ndarray | float) -> np.ndarray:
    """Probabilities for the cosines of the texts found and of the second nearest hypotheses."""
    return expit(_features(cosine, runner_up) @ np.asarray(weights))


def fit(cosine: np.ndarray, runner_up: np.ndarray, exact: np.ndarray) -> Weights:
    """Weights by penalized maximum likelihood, for texts of which `exact` [n] (0 or 1) is known."""
    x, sign = _features(cosine, runner_up), 2 * np.asarray(exact, np.float64) - 1

    def loss(weights: np.ndarray) -> float:
        return float(np.logaddexp(0, -sign * (x @ weights)).sum() + RIDGE * weights @ weights)

    first, second, third = minimize(loss, np.zeros(3)).x
    return float(first), float(second), float(third)


def _features(cosine: np.ndarray | float, runner_up: np.ndarray | float) -> np.ndarray:
    near, next_ = (np.log10(1 - np.asarray(x, np.float64) + ROUNDING) for x in (cosine, runner_up))
    return np.stack([np.ones_like(near), near, next_ - near], axis=-1)
