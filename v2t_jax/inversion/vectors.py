"""Vectors from outside: checked, and compared with those that a model was trained on."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from v2t_jax.data.vector_file import whole_numbers
from v2t_jax.data.vectors import open_vectors
from v2t_jax.embedders.base import signs
from v2t_jax.errors import InputError, as_numpy
from v2t_jax.inversion.correction import TOLERANCE
from v2t_jax.inversion.pipeline import InversionPipeline

# Mean squared distance of vectors from the training's mean, in its own variance: 1 at home (0.84 to 1.17 for single
# texts of minilm-wordnet), about 2 for the vectors of another embedder.
MOST_SPREAD = 1.4
# Of long texts: docs/vectors.md has the figures behind these.
FEW, SEARCHED, PLATEAU = 8, 500, 0.95


def check_vectors(vectors: Any, width: int) -> np.ndarray:
    """Vectors to invert, as `as_targets` takes them, as float32 [n, width]; refuses those that can't be embeddings."""
    e, faults = as_targets(vectors, width)
    for row, fault in faults.items():
        raise InputError(f"Vector {row + 1} of {len(e)} {fault}.")
    return e


def as_targets(vectors: Any, width: int) -> tuple[np.ndarray, dict[int, str]]:
    """Vectors as float32 [n, width], and what is wrong with which of them.

    Args:
        vectors: of numpy, JAX, torch or pandas, or (nested) lists of them; one may come as 1-D. Eight signs a byte, as
            `quantize` packs them, become vectors of length 1.
    """
    try:
        array = as_numpy(vectors)
        if array.dtype == object:  # a pandas column has a row in each of its places
            rows = np.ndim(array.ravel()[:1].tolist()) > 1
            array = np.stack([as_numpy(row) for row in array.ravel()]) if rows else array.astype(np.float64)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of unequal length; RuntimeError: torch's
        raise InputError(f"The vectors are not a regular array ({error}); pass rows of {width} numbers.") from error
    # JAX's test, not numpy's: it knows bfloat16.
    if not (jnp.issubdtype(array.dtype, np.floating) or jnp.issubdtype(array.dtype, np.integer)):
        raise InputError(f"The vectors are of type {array.dtype}, not numbers; pass a float array [n, {width}].")
    if array.ndim in (1, 2) and len(array) == 0:
        raise InputError(f"There are no vectors: the array has shape {array.shape}; pass at least one row.")
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise InputError(f"The vectors have {array.ndim} dimensions; pass an array [n, {width}], or [{width}] for one.")
    if array.shape[1] == -(-width // 8) < width and whole_numbers(array):
        return signs(array, width), {}
    if array.shape[1] != width:
        raise InputError(
            f"The vectors are {array.shape[1]} wide, but this model inverts embeddings of width {width}: "
            "pass vectors of the embedder that it was trained for."
        )
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is refused
        array = array.astype(np.float32)
    infinite, zero = ~np.isfinite(array).all(axis=1), np.linalg.norm(array.astype(np.float64), axis=1) < 1e-12
    faults = dict.fromkeys(np.flatnonzero(zero).tolist(), "is (almost) zero; no text embeds to it: remove it")
    faults |= dict.fromkeys(np.flatnonzero(infinite).tolist(), "holds NaN or infinite values; remove or repair it")
    return array, dict(sorted(faults.items()))


def foreign_reasons(inverter: InversionPipeline, e: np.ndarray) -> list[str]:
    """Why vectors [n, E] hardly come from the model's embedder, judged by their lengths and coordinates."""
    if np.ptp(np.abs(e)) < 1e-6:  # signs alone, which fit no statistics
        return []
    norms, reasons = np.linalg.norm(e, axis=1), []
    if expected := (1.0, 0.0) if inverter.embedder.normalized else inverter.embedding_norm:
        mean, deviation = expected
        foreign = np.abs(norms - mean) > 6 * deviation + 0.02 * mean
        if foreign.any():
            known = f"{mean:.3g}" if deviation < 0.001 * mean else f"{mean:.3g} ± {deviation:.2g}"
            found = f"{norms.min():.3g} to {norms.max():.3g}"
            reasons.append(f"{foreign.sum()} of {len(e)} have lengths of {found}, where {known} is expected")
    statistics = inverter.params["inverter"].get("statistics")
    if statistics is not None:
        rescaled = e / norms[:, None] if inverter.embedder.normalized else e
        spread = float(np.mean(((rescaled - np.asarray(statistics["mean"])) / np.asarray(statistics["std"])) ** 2))
        if not spread < MOST_SPREAD:
            reasons.append(f"their variance is {spread:.1f} times that of the training vectors")
    if whole_numbers(e):
        reasons.append("they are whole numbers, as quantized vectors are; give the ranges: dequantize(vectors, ranges)")
    return reasons


def warn_of_foreign_vectors(inverter: InversionPipeline, e: np.ndarray) -> None:
    """Warns of vectors [n, E] that hardly come from the model's embedder."""
    if reasons := foreign_reasons(inverter, e):
        warnings.warn(
            f"The vectors don't look like {inverter.embedder.name}'s: {' and '.join(reasons)}. If they come from "
            "another embedder, pooling, prefix or normalization, the recovered texts mean nothing.",
            stacklevel=3,
        )


def warn_of_long_texts(inverter: InversionPipeline, found: Sequence[Any]) -> None:
    """Warns of results behind whose vectors are hardly texts that the model can recover.

    That none is exact tells so only after many edits. Without a calibration, the model may be at fault as well.
    """
    searched = [one for one in found if one.trace[-1].embedder_calls >= SEARCHED]
    sure = [one.cosine >= 1 - TOLERANCE if one.confidence is None else one.confidence > 0.5 for one in searched]
    if len(searched) < FEW or any(sure):
        return
    cosine = float(np.median([one.cosine for one in searched]))
    if cosine < PLATEAU:
        longest = f"longer than the {inverter.config.max_length - 1} tokens that {inverter.name} recovers"
        why = f"theirs are probably {longest}"
        if inverter.calibration is None:
            why = f"theirs may be {longest}, or it is too weak (v2t eval shows how much it recovers of known texts)"
        warnings.warn(
            f"None of {len(searched)} vectors is recovered exactly, and half of the texts stay below a cosine of "
            f"{cosine:.2f}: {why}.",
            stacklevel=3,
        )


def read_ranges(name: str, width: int) -> np.ndarray:
    """The ranges [2, width] that `v2t embed --precision int8` writes beside its vectors."""
    rows = next(open_vectors(name).batches(3)).vectors
    if rows.shape != (2, width) or not np.isfinite(rows).all() or (rows[0] > rows[1]).any():
        meant = f"the smallest and the largest value of each dimension, [2, {width}]"
        raise InputError(f"{name} doesn't hold {meant}; give the file that was written beside the vectors.")
    return rows


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, [n, E] and [n, E] -> [n]"""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.clip((a * b).sum(axis=1) / np.maximum(norms, 1e-12), -1, 1)
