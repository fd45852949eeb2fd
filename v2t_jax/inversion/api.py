"""Vectors or texts in, texts out: the public functions around a loaded `InversionPipeline`."""

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax import progress
from v2t_jax.config import MeshConfig
from v2t_jax.embedders.base import TextEmbedder, embed_texts, named_or_embedder
from v2t_jax.embedders.black_box import is_metered
from v2t_jax.errors import InputError, as_numpy, check_texts, check_whole
from v2t_jax.inversion.correction import Correction, Mode, check_num_steps, correct_in_batches
from v2t_jax.inversion.host_callback import host_errors
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import batch_sharding, decoding_on, decoding_rows, make_mesh, replicated

BATCH_SIZE = 32
# Mean squared distance of vectors from the training's mean, in its own variance: 1 at home (0.84 to 1.17 for single
# texts of minilm-wordnet), about 2 for the vectors of another embedder.
MOST_SPREAD = 1.4
MOST_ROWS = 1024  # sequences decoded side by side, unless a batch size is asked for
# Sizes that batches are padded up to, so that a few texts don't pay for a full batch, and few shapes are compiled;
# beyond them, multiples of the last.
BATCH_SIZES = (1, 8, BATCH_SIZE)


@dataclass(frozen=True)
class TraceStep:
    """The best text after a correction step (step 0: the inverter's guess), and its cosine to the target."""

    step: int
    text: str
    cosine: float


@dataclass(frozen=True)
class InversionResult:
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
    """Vectors to invert, of numpy, JAX or torch, as float32 [n, width]; one vector may come as 1-D.

    Raises:
        InputError: not numbers, no rows, wrong width or dimensions, NaN or infinite values, or zero vectors.
    """
    try:
        array = as_numpy(vectors)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of unequal length; RuntimeError: torch's
        raise InputError(
            f"The vectors are not a regular array ({error}); give one row of {width} numbers a vector."
        ) from error
    # JAX's test, not numpy's: it knows bfloat16.
    if not (jnp.issubdtype(array.dtype, np.floating) or jnp.issubdtype(array.dtype, np.integer)):
        raise InputError(f"The vectors are of type {array.dtype}, not numbers; give a float array [n, {width}].")
    if array.ndim in (1, 2) and len(array) == 0:
        raise InputError(f"There are no vectors: the array has shape {array.shape}; give at least one row.")
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise InputError(f"The vectors have {array.ndim} dimensions; give an array [n, {width}], or [{width}] for one.")
    if array.shape[1] != width:
        raise InputError(
            f"The vectors are {array.shape[1]} wide, but this model inverts embeddings of width {width}: "
            "give vectors of the embedder that it was trained for."
        )
    with np.errstate(over="ignore"):  # what float32 can't hold becomes infinite, and is refused as such
        array = array.astype(np.float32)
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise InputError(f"Vector {row + 1} of {len(array)} holds NaN or infinite values; remove or repair it.")
    zero = np.linalg.norm(array.astype(np.float64), axis=1) < 1e-12
    if zero.any():
        row = int(np.argmax(zero))
        raise InputError(
            f"Vector {row + 1} of {len(array)} is all zeros, or as good as, which no text embeds to; remove it."
        )
    return array


def warn_of_foreign_vectors(inverter: InversionPipeline, e: np.ndarray) -> None:
    """Warns of vectors [n, E] that hardly come from the model's embedder: by their lengths, and by their coordinates.

    Another embedder of the same width, another pooling, prefix or normalization: none of it can be seen in a shape, and
    all of it makes the recovered texts meaningless.
    """
    norms, reasons = np.linalg.norm(e, axis=1), []
    expected = (1.0, 0.0) if inverter.embedder.normalized else inverter.embedding_norm
    if expected is not None:
        mean, deviation = expected
        foreign = np.abs(norms - mean) > 6 * deviation + 0.02 * mean
        if foreign.any():
            known = f"{mean:.3g}" if deviation < 0.001 * mean else f"{mean:.3g} ± {deviation:.2g}"
            found = f"{norms.min():.3g} to {norms.max():.3g}"
            reasons.append(f"{foreign.sum()} of {len(e)} have other lengths ({found}; known are {known})")
    statistics = inverter.params["inverter"].get("statistics")
    if statistics is not None:
        rescaled = e / norms[:, None] if inverter.embedder.normalized else e
        spread = float(np.mean(((rescaled - np.asarray(statistics["mean"])) / np.asarray(statistics["std"])) ** 2))
        if not spread < MOST_SPREAD:
            reasons.append(f"they scatter {spread:.1f} times as far around the mean as those of the training")
    if reasons:
        warnings.warn(
            f"The vectors don't look like {inverter.embedder.name}'s: {' and '.join(reasons)}. If they come from "
            "another embedder, pooling, prefix or normalization, the recovered texts mean nothing.",
            stacklevel=3,
        )


def read_vectors(path: str) -> Any:
    """The array of a .npy file; never unpickles.

    Raises:
        InputError: the file is missing, empty, or not a plain array.
    """
    file, advice = Path(path), "save the array of vectors with numpy.save"
    if file.exists() and not file.is_file():
        raise InputError(f"{path!r} is a folder, a pipe or a device; {advice}.")
    try:
        with file.open("rb") as content:
            magic = content.read(len(np.lib.format.MAGIC_PREFIX))
        if not magic:
            raise InputError(f"{path} is empty; {advice}.")
        if magic.startswith(b"PK"):
            raise InputError(f"{path} is an archive, of arrays maybe; {advice}.")
        if magic != np.lib.format.MAGIC_PREFIX:
            raise InputError(f"{path} is not a .npy file; {advice}.")
        # Mapped, not read: a header that promises more than the file holds is refused before memory is asked for.
        return np.array(np.load(file, allow_pickle=False, mmap_mode="r"))
    except FileNotFoundError:
        raise InputError(f"There is no file {path}; give a .npy file of vectors.") from None
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error}); {advice}.") from error
    except InputError:
        raise
    # numpy reads the header as Python source, so damage in it shows as that language's errors too.
    except (ValueError, EOFError, OverflowError, TypeError, SyntaxError, TokenError) as error:
        raise InputError(f"{path} is truncated, damaged or holds something else than numbers; {advice}.") from error


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row, [n, E] and [n, E] -> [n]"""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.clip((a * b).sum(axis=1) / np.maximum(norms, 1e-12), -1, 1)


def invert_embeddings(
    inverter: InversionPipeline,
    vectors: Any,
    *,
    num_steps: int = 8,
    sequence_beam_width: int = 4,
    mode: Mode = "best",
    patience: int = 0,
    batch_size: int | None = None,
) -> list[InversionResult]:
    """Recovers the texts of embeddings.

    Args:
        vectors: [n, E], or [E] for one. Where the embedder's own vectors have length 1, these are brought to it, so
            that rounded or rescaled ones do no harm.
        num_steps: N, correction steps; 0 gives the nearest of the inverter's guesses (of one, for W = 1).
        sequence_beam_width: W, hypotheses kept between steps.
        mode: best keeps the best hypothesis ever seen; upstream selects as the original does.
        patience: stop a vector after so many steps without improvement; 0 doesn't.
        batch_size: vectors at a time on a device, by default 32, or fewer for beams wider than 5; what is more goes to
            other devices of this process at the same time. The result doesn't depend on it.

    Raises:
        InputError: see `check_vectors`; a setting is out of range; or num_steps > 0 and the model has no corrector.
    """
    e = check_vectors(vectors, inverter.config.embedding_width)
    check_num_steps(num_steps)
    if num_steps and not inverter.has_corrector:
        raise InputError(f"The model {inverter.name} has no corrector; use num_steps=0, or train one.")
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    warn_of_foreign_vectors(inverter, e)
    if inverter.embedder.normalized:
        e = (e / np.linalg.norm(e.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
    found = run_correction(inverter, e, num_steps, sequence_beam_width, mode, patience, batch_size)
    # What is reported is embedded anew from its text, by the victim's own tokenizer: a sequence of pieces that the
    # tokenizer would never make of the text can't flatter.
    n, steps = found.trace_ids.shape[:2]
    texts = inverter.vocabulary.decode(found.trace_ids.reshape(n * steps, -1))
    embedded = embed_anew(inverter, texts)
    values = cosines(embedded, np.repeat(e, steps, axis=0)).reshape(n, steps)
    return [_recovered(texts[i * steps : (i + 1) * steps], values[i], mode) for i in range(n)]


def embed_anew(inverter: InversionPipeline, texts: Sequence[str]) -> np.ndarray:
    """The embeddings [n, E] of texts, blank ones too; of a model on a mesh, each process makes its share."""
    embed = functools.partial(embed_texts, inverter.embedder)
    return embed(texts) if inverter.mesh is None else processes.shared(texts, embed)


def run_correction(
    inverter: InversionPipeline,
    e: np.ndarray,
    num_steps: int,
    sequence_beam_width: int,
    mode: Mode,
    patience: int = 0,
    batch_size: int | None = None,
) -> Correction:
    """The correction loop over vectors [n, E], in batches cut over the model's mesh, or else this process's devices."""
    loop = inverter.correction_loop(sequence_beam_width, mode, patience=patience)
    # A step makes W candidates of each of W hypotheses: with wide beams fewer vectors fit at a time.
    most = batch_size or max(1, min(BATCH_SIZE, MOST_ROWS // sequence_beam_width**2))
    rows = None if inverter.mesh is None else decoding_rows(inverter.mesh, inverter.decode)
    parts = 1 if rows is None else math.prod(rows.mesh.shape[axis] for axis in rows.spec[0])
    each = -(-len(e) // parts)
    whole = -(-each // BATCH_SIZE) * BATCH_SIZE
    size = parts * min(most, next((size for size in BATCH_SIZES if each <= size), whole))
    weights, place = inverter.loop_params(), jnp.asarray
    # Where hypotheses reach the embedder over the host, one device does all.
    devices = [] if inverter.host_bound or rows else jax.local_devices()[: len(e) // size]
    if rows is not None:
        place = functools.partial(processes.put, shardings=rows)
    elif len(devices) > 1:
        mesh = make_mesh(MeshConfig(), devices)
        weights = jax.device_put(weights, replicated(mesh))
        place, size = functools.partial(jax.device_put, device=batch_sharding(mesh)), size * len(devices)
    filled = np.concatenate([e, np.repeat(e[-1:], max(size - len(e), 0), axis=0)])
    with (
        progress.bar(len(e), f"recovering ({num_steps} steps, beam {sequence_beam_width})", unit="texts") as update,
        ExitStack() as first,
        nullcontext() if inverter.mesh is None else decoding_on(inverter.mesh, inverter.decode),
    ):
        first.enter_context(progress.stage(f"compiling for {size} texts at a time, or fetching what was compiled"))
        reports = 0

        def on_progress(done: int, cosine: float) -> None:
            nonlocal reports
            reports += 1
            if reports == 2 or num_steps == 0:  # both programs, the first guess and the steps, have run once
                first.close()
            update(min(done, len(e)), cosine=round(cosine, 4))

        with host_errors():
            found = correct_in_batches(loop, weights, filled, num_steps, size, on_progress, place)
    *arrays, steps_run = found
    return Correction._make([*(array[: len(e)] for array in arrays), steps_run])


def _recovered(texts: Sequence[str], values: np.ndarray, mode: str) -> InversionResult:
    best, trace = 0, []
    for step in range(len(texts)):
        # Rounding in the last place of a cosine is no improvement.
        if mode == "upstream" or values[step] > values[best] + 1e-6:
            best = step
        trace.append(TraceStep(step, texts[best], float(values[best])))
    return InversionResult(texts[best], float(values[best]), best, tuple(trace))


def invert_on_all_hosts(
    invert: Callable[..., list[InversionResult]], inverter: InversionPipeline, items: Any, **options: Any
) -> list[InversionResult]:
    """`invert(inverter, items, **options)` on every process, each doing a share on its own devices.

    With a metered embedder process 0 does everything: a run then pays for a text once, within one limit.

    Args:
        items: texts or vectors, the same on every process.

    Raises:
        InputError: the one raised on any process; or the items differ between processes.
    """
    count = jax.process_count()
    if count == 1:
        return invert(inverter, items, **options)
    once = is_metered(inverter.embedder)
    found: list[InversionResult] = []
    fault = ""
    given = items.tobytes() if isinstance(items, np.ndarray) else "\n".join(items).encode()
    try:
        share = items[jax.process_index() :: 1 if once else count] if not once or processes.is_main() else []
        found = invert(inverter, share, **options) if len(share) else []
    except InputError as error:
        fault = str(error)
    record = {"given": hashlib.sha256(given).hexdigest(), "fault": fault, "found": [one.to_dict() for one in found]}
    parts = processes.gather(record)
    for part in parts:
        if part["fault"]:
            raise InputError(part["fault"])
        if part["given"] != parts[0]["given"]:
            raise InputError("The processes have read different texts or vectors: give all hosts the same files.")
    records = parts[0]["found"] if once else [parts[i % count]["found"][i // count] for i in range(len(items))]
    return [InversionResult(**one | {"trace": tuple(TraceStep(**step) for step in one["trace"])}) for one in records]


def invert_strings(inverter: InversionPipeline, texts: Sequence[str], **options: Any) -> list[InversionResult]:
    """Embeds texts and recovers them from their embeddings; options as `invert_embeddings`.

    Texts are cut to what the model recovers at most, and compared in the tokenizer's normal form (word-pieces lose case
    and spacing, and what the tokenizer doesn't know is left out): `reference` is that form.

    Raises:
        InputError: no texts, or one is blank or holds nothing that the tokenizer knows; or see `invert_embeddings`.
    """
    check_texts(texts)
    if len(texts) == 0:
        raise InputError("There are no texts to recover; give at least one.")
    longest = inverter.config.max_length
    references = inverter.vocabulary.normalize(texts, longest)
    for i, (text, reference) in enumerate(zip(texts, references, strict=True)):
        if not reference.strip():
            raise InputError(
                f"Text {i + 1} of {len(texts)} holds nothing that the embedder's tokenizer knows; give it a word."
            )
        if inverter.vocabulary.normalize([text], len(text.encode()) + 2)[0] != reference:
            progress.note(f"Text {i + 1} is cut to the {longest - 1} word-pieces that the model takes: {reference!r}")
    found = invert_embeddings(inverter, embed_anew(inverter, references), **options)
    return [
        InversionResult(f.text, f.cosine, f.step, f.trace, reference, f.text == reference)
        for f, reference in zip(found, references, strict=True)
    ]


def embed(texts: Sequence[str], embedder: str | Path | TextEmbedder = "all-MiniLM-L6-v2") -> np.ndarray:
    """Embeddings [len(texts), E] float32 by an embedder's name or folder, or by the embedder itself."""
    from v2t_jax.embedders.load import load_embedder

    given = named_or_embedder(embedder)
    return (load_embedder(given) if isinstance(given, str) else given).embed(texts)
