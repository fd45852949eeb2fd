"""Defences as functions on vectors: embeddings [n, E] of length 1 -> what a store holds, as floats, [n, E'].

`public` embeddings [N, E], of texts that anybody has, fit what is fitted: directions, ranges, codebooks.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.cluster.vq import kmeans2, vq
from scipy.stats import ortho_group

from v2t_jax.embedders.base import dequantize, quantize, ranges_of

Function = Callable[[np.ndarray], np.ndarray]
CENTROIDS = 256  # a byte


@dataclass(frozen=True)
class Defence:
    """A function that is applied before vectors are stored, and what a search does to its query."""

    family: str
    strength: str
    store: Function
    query: Function  # to compare with what is stored

    @property
    def name(self) -> str:
        return f"{self.family} {self.strength}".strip()


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors with length 1, but for zeros."""
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def none() -> Defence:
    return Defence("none", "", unit, unit)


def noise(level: float, seed: int = 0) -> Defence:
    """Gaussian noise, whose length is `level` of the embedding's (Morris et al. 2023, section 7)."""
    rng = np.random.default_rng(seed)

    def store(e: np.ndarray) -> np.ndarray:
        return unit(e + level * rng.standard_normal(e.shape) / e.shape[1] ** 0.5)

    return Defence("noise", f"{level:g}", store, unit)


def matryoshka(width: int) -> Defence:
    """The first dimensions alone (Kusupati et al. 2022)."""
    return _alike("first dimensions", str(width), lambda e: unit(e[:, :width]))


def pca(width: int, public: np.ndarray) -> Defence:
    """The directions in which public embeddings vary most."""
    directions = np.linalg.svd(public - public.mean(axis=0), full_matrices=False)[2][:width]
    return _alike("PCA", str(width), lambda e: unit(e @ directions.T))


def masking(part: float, width: int, seed: int = 0) -> Defence:
    """A share of the dimensions set to zero, the same of every vector."""
    kept = np.ones(width, np.float32)
    kept[np.random.default_rng(seed).permutation(width)[: round(part * width)]] = 0
    return _alike("masking", f"{part:.0%}", lambda e: unit(e * kept))


def scalar(bits: int, public: np.ndarray) -> Defence:
    """Each dimension in 2^bits steps of its public range; one bit is its sign."""
    if bits == 1:
        return Defence("quantization", "1 bit", lambda e: unit(np.where(e > 0, 1.0, -1.0)), unit)
    low, high = ranges = ranges_of(public)
    if bits == 8:
        return Defence("quantization", "8 bits", lambda e: unit(dequantize(quantize(e, "int8", ranges), ranges)), unit)
    step = (high - low) / (2**bits - 1)

    def store(e: np.ndarray) -> np.ndarray:
        return unit(low[None] + step[None] * np.round((np.clip(e, low, high) - low) / step))

    return Defence("quantization", f"{bits} bits", store, unit)


def product(parts: int, public: np.ndarray, seed: int = 0) -> Defence:
    """Product quantization (Jégou et al. 2011): each part of a vector as the nearest of 256 centroids, a byte each."""
    pieces = np.array_split(np.arange(public.shape[1]), parts)
    count = min(CENTROIDS, len(public) // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of centroids that nothing is near: they are never used
        books = [
            kmeans2(public[:, piece].astype(np.float64), count, 8, minit="points", seed=seed)[0] for piece in pieces
        ]

    def store(e: np.ndarray) -> np.ndarray:
        codes = [vq(e[:, piece].astype(np.float64), book)[0] for piece, book in zip(pieces, books, strict=True)]
        return unit(np.concatenate([book[code] for book, code in zip(books, codes, strict=True)], axis=1))

    return Defence("product quantization", f"{parts} bytes", store, unit)


def rotation(width: int, key: int) -> Defence:
    """A secret orthogonal matrix: all distances stay, and a search rotates its query by the same key."""
    turned = ortho_group.rvs(width, random_state=key).astype(np.float32)
    return _alike("rotation", "", lambda e: unit(e @ turned))


def _alike(family: str, strength: str, function: Function) -> Defence:
    return Defence(family, strength, function, function)
