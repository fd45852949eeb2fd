"""Vectors from outside: read, checked, and compared with those that a model was trained on."""

import warnings
from pathlib import Path
from tokenize import TokenError
from typing import Any

import jax.numpy as jnp
import numpy as np

from v2t_jax.errors import InputError, as_numpy
from v2t_jax.inversion.pipeline import InversionPipeline

# Mean squared distance of vectors from the training's mean, in its own variance: 1 at home (0.84 to 1.17 for single
# texts of minilm-wordnet), about 2 for the vectors of another embedder.
MOST_SPREAD = 1.4


def check_vectors(vectors: Any, width: int) -> np.ndarray:
    """Vectors to invert, of numpy, JAX or torch, as float32 [n, width]; one vector may come as 1-D."""
    try:
        array = as_numpy(vectors)
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
    if array.shape[1] != width:
        raise InputError(
            f"The vectors are {array.shape[1]} wide, but this model inverts embeddings of width {width}: "
            "pass vectors of the embedder that it was trained for."
        )
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is refused
        array = array.astype(np.float32)
    infinite, zero = ~np.isfinite(array).all(axis=1), np.linalg.norm(array.astype(np.float64), axis=1) < 1e-12
    if (infinite | zero).any():
        first, what = int(np.argmax(infinite | zero)), "is (almost) zero; no text embeds to it: remove it"
        what = "holds NaN or infinite values; remove or repair it" if infinite[first] else what
        raise InputError(f"Vector {first + 1} of {len(array)} {what}.")
    return array


def warn_of_foreign_vectors(inverter: InversionPipeline, e: np.ndarray) -> None:
    """Warns of vectors [n, E] that hardly come from the model's embedder, judged by their lengths and coordinates."""
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
    if reasons:
        warnings.warn(
            f"The vectors don't look like {inverter.embedder.name}'s: {' and '.join(reasons)}. If they come from "
            "another embedder, pooling, prefix or normalization, the recovered texts mean nothing.",
            stacklevel=3,
        )


def read_vectors(path: str) -> Any:
    """The array of a .npy file; never unpickles."""
    file, advice = Path(path), "save the array of vectors with numpy.save"
    if file.exists() and not file.is_file():
        raise InputError(f"{path!r} is a folder, a pipe or a device; {advice}.")
    with file.open("rb") as content:
        magic = content.read(len(np.lib.format.MAGIC_PREFIX))
    if magic != np.lib.format.MAGIC_PREFIX:
        kinds = {b"": "empty", b"PK": "an archive, perhaps of arrays"}
        raise InputError(f"{path} is {kinds.get(magic[:2], 'not a .npy file')}; {advice}.")
    try:
        # Mapped, not read: a header that promises more than the file holds is refused before memory is asked for.
        return np.array(np.load(file, allow_pickle=False, mmap_mode="r"))
    # numpy reads the header as Python source, so damage in it shows as that language's errors too.
    except (ValueError, EOFError, OverflowError, TypeError, SyntaxError, TokenError, OSError) as error:
        raise InputError(f"{path} is truncated, damaged or holds something other than numbers; {advice}.") from error


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, [n, E] and [n, E] -> [n]"""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.clip((a * b).sum(axis=1) / np.maximum(norms, 1e-12), -1, 1)
