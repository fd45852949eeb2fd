"""The attacker who knows the defence: what is stored -> the best estimate of the embedding, which is then inverted."""

import numpy as np

from v2t_jax.defences.vectors import Function, unit
from v2t_jax.inversion.vectors import cosines

RIDGES = (1e-5, 1e-3, 1e-1)  # of the mean variance of what is stored


def estimator(stored: np.ndarray, public: np.ndarray) -> Function:
    """Ridge regression of public embeddings [N, E] on what the defence makes of them, [N, E'].

    For Gaussian noise it tends to Wiener's filter; for truncation and masking it fills in what was left out; for
    quantization to the mean of the embeddings that share a code, as far as that is linear. A tenth of the embeddings
    decides how strongly it is held to the vectors as they are stored.
    """
    tenth = len(public) // 10
    tried = [cosines(_ridge(stored[tenth:], public[tenth:], r)(stored[:tenth]), public[:tenth]).mean() for r in RIDGES]
    return _ridge(stored, public, RIDGES[int(np.argmax(tried))])


def _ridge(stored: np.ndarray, public: np.ndarray, ridge: float) -> Function:
    center, target = stored.mean(axis=0), public.mean(axis=0)
    x, y = (stored - center).astype(np.float64), (public - target).astype(np.float64)
    start = np.eye(x.shape[1], y.shape[1]) * (x.shape == y.shape)  # as stored, where the widths agree
    gram = x.T @ x
    gram += ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = start + np.linalg.solve(gram, x.T @ (y - x @ start))
    return lambda vectors: unit((vectors - center) @ weights + target)


def procrustes(stored: np.ndarray, known: np.ndarray) -> Function:
    """The orthogonal matrix that best takes stored vectors [k, E] to embeddings of known texts (Schönemann 1966)."""
    left, _, right = np.linalg.svd(stored.T.astype(np.float64) @ known)
    return lambda vectors: unit(vectors @ (left @ right))
