"""The attacker who knows the defence: what is stored -> the best estimate of the embedding, which is then inverted."""

import numpy as np

from v2t_jax.defences.vectors import Function, unit

RIDGE = 1e-3  # of the mean variance of what is stored


def estimator(stored: np.ndarray, public: np.ndarray) -> Function:
    """Ridge regression of public embeddings [N, E] on what the defence makes of them, [N, E'].

    For Gaussian noise it tends to Wiener's filter; for truncation and masking it fills in what was left out; for
    quantization to the mean of the embeddings that share a code, as far as that is linear.
    """
    center, target = stored.mean(axis=0), public.mean(axis=0)
    x, y = (stored - center).astype(np.float64), (public - target).astype(np.float64)
    gram = x.T @ x
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    weights = np.linalg.solve(gram, x.T @ y)
    return lambda vectors: unit((vectors - center) @ weights + target)


def procrustes(stored: np.ndarray, known: np.ndarray) -> Function:
    """The orthogonal matrix that best takes stored vectors [k, E] to embeddings of known texts (Schönemann 1966)."""
    left, _, right = np.linalg.svd(stored.T.astype(np.float64) @ known)
    return lambda vectors: unit(vectors @ (left @ right))
