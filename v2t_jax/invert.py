"""Vectors or texts in, texts out: the public functions around a loaded `Inverter`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from v2t_jax import progress
from v2t_jax.correct import correct_in_batches
from v2t_jax.errors import InputError
from v2t_jax.pretrained import Inverter

BATCH_SIZE = 32
# Sizes that batches are padded up to, so that a few texts don't pay for a full batch, and few shapes are compiled.
BATCH_SIZES = (1, 8, BATCH_SIZE)


@dataclass(frozen=True)
class TraceStep:
    """The best text after a correction step (step 0: the inverter's guess), and its cosine to the target."""

    step: int
    text: str
    cosine: float


@dataclass(frozen=True)
class Recovered:
    """A recovered text. `cosine` is of the text embedded anew by the embedder, from its letters."""

    text: str
    cosine: float
    step: int
    """the step at which the text was found"""
    trace: tuple[TraceStep, ...]
    reference: str | None = None
    exact_match: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; without the reference's fields where the text isn't known."""
        values = asdict(self) | {"trace": [asdict(step) for step in self.trace]}
        return values if self.reference is not None else {k: v for k, v in values.items() if v is not None}


def check_vectors(vectors: Any, width: int) -> np.ndarray:
    """Vectors to invert as float32 [n, width]; one vector may come as 1-D.

    Raises:
        InputError: not numbers, no rows, wrong width or dimensions, NaN or infinite values, or zero vectors.
    """
    try:
        array = np.asarray(vectors)
    except ValueError as error:  # rows of unequal length
        raise InputError(
            f"The vectors are not a regular array ({error}); give one row of {width} numbers a vector."
        ) from error
    if array.dtype == object or not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise InputError(f"The vectors are of type {array.dtype}, not numbers; give a float array [n, {width}].")
    if array.ndim == 1 and array.size:
        array = array[None]
    if array.ndim != 2:
        raise InputError(f"The vectors have {array.ndim} dimensions; give an array [n, {width}], or [{width}] for one.")
    if len(array) == 0:
        raise InputError(f"There are no vectors: the array has shape {array.shape}; give at least one row.")
    if array.shape[1] != width:
        raise InputError(f"The vectors are {array.shape[1]} wide, but this model inverts embeddings of width {width}.")
    array = array.astype(np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise InputError(f"Vector {row + 1} of {len(array)} holds NaN or infinite values; remove or repair it.")
    zero = ~np.any(array, axis=1)
    if zero.any():
        row = int(np.argmax(zero))
        raise InputError(f"Vector {row + 1} of {len(array)} is all zeros, which no text embeds to; remove it.")
    return array


def read_vectors(path: str) -> Any:
    """The array of a .npy file; never unpickles.

    Raises:
        InputError: the file is missing, empty, or not a plain array.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"There is no file {path}; give a .npy file of vectors.")
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path} is not a .npy file of plain numbers ({str(error).splitlines()[0]}); save one with numpy.save."
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of arrays; save the one array of vectors with numpy.save.")
    return array


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, [n, E] and [n, E] -> [n]"""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.clip((a * b).sum(axis=1) / np.maximum(norms, 1e-12), -1, 1)


def invert_embeddings(
    inverter: Inverter,
    vectors: Any,
    *,
    num_steps: int = 8,
    sequence_beam_width: int = 4,
    mode: Literal["best", "upstream"] = "best",
    patience: int = 0,
    batch_size: int | None = None,
) -> list[Recovered]:
    """Recovers the texts of embeddings.

    Args:
        vectors: [n, E], or [E] for one.
        num_steps: N, correction steps; 0 gives the inverter's guess.
        sequence_beam_width: W, hypotheses kept between steps.
        mode: best keeps the best hypothesis ever seen; upstream selects as the original does.
        patience: stop a vector after so many steps without improvement; 0 doesn't.
        batch_size: vectors at a time; the result doesn't depend on it.
    Raises:
        InputError: see `check_vectors`; or the model has no corrector and num_steps > 0.
    """
    e = check_vectors(vectors, inverter.config.embedding_width)
    if num_steps < 0:
        raise InputError(f"num_steps is {num_steps}; give 0 or more.")
    if num_steps and not inverter.has_corrector:
        raise InputError(f"The model {inverter.name} has no corrector; use num_steps=0, or train one.")
    loop = inverter.correction_loop(sequence_beam_width, mode, patience=patience)
    if batch_size is None:
        batch_size = next((size for size in BATCH_SIZES if size >= len(e)), BATCH_SIZE)
    with progress.bar(len(e), f"recovering ({num_steps} steps, beam {sequence_beam_width})", unit="texts") as update:

        def on_progress(done: int, cosine: float) -> None:
            update(done, cosine=round(cosine, 4))

        found = correct_in_batches(loop, inverter.loop_params(), e, num_steps, batch_size, on_progress)
    # What is reported is embedded anew from its text, by the victim's own tokenizer: a sequence of pieces that the
    # tokenizer would never make of the text can't flatter.
    n, steps = found.trace_ids.shape[:2]
    texts = np.array(inverter.vocabulary.decode(found.trace_ids.reshape(n * steps, -1)), object)
    known, where = np.unique(texts.astype(str), return_inverse=True)
    embedded = np.zeros((len(known), e.shape[1]), np.float32)
    full = np.array([bool(text.strip()) for text in known])
    if full.any():
        embedded[full] = inverter.embedder.embed(list(known[full]))
    values = cosines(embedded[where], np.repeat(e, steps, axis=0)).reshape(n, steps)
    texts = texts.reshape(n, steps)
    return [_recovered(texts[i], values[i], mode) for i in range(n)]


def _recovered(texts: np.ndarray, values: np.ndarray, mode: str) -> Recovered:
    best, trace = 0, []
    for step in range(len(texts)):
        # Rounding in the last place of a cosine is no improvement.
        if mode == "upstream" or values[step] > values[best] + 1e-6:
            best = step
        trace.append(TraceStep(step, str(texts[best]), float(values[best])))
    return Recovered(str(texts[best]), float(values[best]), best, tuple(trace))


def invert_strings(inverter: Inverter, texts: Sequence[str], **options: Any) -> list[Recovered]:
    """Embeds texts and recovers them from their embeddings; options as `invert_embeddings`.

    Texts are cut to what the model recovers at most, and compared in the tokenizer's normal form (word-pieces lose case
    and spacing): `reference` is that form.
    """
    references = inverter.vocabulary.normalise(texts, inverter.config.max_length)
    for i, (text, reference) in enumerate(zip(texts, references, strict=True)):
        if not reference.strip():
            raise InputError(f"Text {i + 1} of {len(texts)} is empty; give it at least one word.")
        whole = inverter.vocabulary.normalise([text], 1_000_000)[0]
        if whole != reference:
            progress.note(
                f"Text {i + 1} is cut to the {inverter.config.max_length - 1} word-pieces that the model takes: {reference!r}"
            )
    found = invert_embeddings(inverter, inverter.embedder.embed(references), **options)
    return [
        Recovered(f.text, f.cosine, f.step, f.trace, reference, f.text == reference)
        for f, reference in zip(found, references, strict=True)
    ]


def embed(texts: Sequence[str], embedder: str = "all-MiniLM-L6-v2") -> np.ndarray:
    """Embeddings [len(texts), E] float32 by an embedder's name or folder."""
    from v2t_jax.interop.sentence_transformers import load_embedder

    return load_embedder(embedder).embed(list(texts))
