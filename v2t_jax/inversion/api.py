"""Vectors or texts in, texts out: the public functions around a loaded `InversionPipeline`."""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from v2t_jax import progress
from v2t_jax.config import MeshConfig
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, embed_texts, named_or_embedder
from v2t_jax.errors import InputError, check_texts, check_whole
from v2t_jax.inversion.confidence import probability
from v2t_jax.inversion.correction import MOST_STEPS, Correction, Mode, Search
from v2t_jax.inversion.embed_hypotheses import embedded_as_text
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.vectors import check_vectors, cosines, warn_of_foreign_vectors, warn_of_long_texts
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import batch_sharding, decoding_on, decoding_rows, make_mesh

BATCH_SIZE = 32
BUDGET = 2000  # calls of the embedder for a text
MOST_CALLS = 10_000_000
MOST_ROWS = 1024  # sequences decoded side by side, unless a batch size is asked for


@dataclass(frozen=True)
class TraceStep:
    """The best text after a correction step (step 0: the inverter's guess), and its cosine to the target."""

    step: int
    text: str
    cosine: float
    embedder_calls: int = 0
    """texts that the embedder was given in the search so far; a gradient counts as 3"""


@dataclass(frozen=True)
class InversionResult:
    """A recovered text. `cosine` is of the text itself, embedded by the embedder's own tokenizer."""

    text: str
    cosine: float
    step: int
    """the step at which the text was found"""
    trace: tuple[TraceStep, ...]
    reference: str | None = None
    exact_match: bool | None = None
    runner_up: float | None = None
    """the cosine of the second nearest hypothesis"""
    confidence: float | None = None
    """the probability that the text is exact; None for a model without calibration"""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; without the reference's fields where the text isn't known."""
        values = dataclasses.asdict(self) | {"trace": [dataclasses.asdict(step) for step in self.trace]}
        return {name: value for name, value in values.items() if value is not None}


def invert_embeddings(
    inverter: InversionPipeline,
    vectors: Any,
    *,
    num_steps: int | None = None,
    sequence_beam_width: int = 4,
    mode: Mode = "best",
    patience: int = 0,
    search: Search | None = None,
    budget: int = BUDGET,
    batch_size: int | None = None,
) -> list[InversionResult]:
    """Recovers the texts of embeddings.

    Args:
        vectors: [n, E], or [E] for one. Where the embedder's own vectors have length 1, these are brought to it, so
            that rounded or rescaled ones do no harm.
        num_steps: N, correction steps, by default 8, or 2 before edits, or 0 for a model without corrector; 0 gives the
            nearest of the W^2 first guesses.
        sequence_beam_width: W, hypotheses kept between steps.
        mode: best keeps the best hypothesis ever seen; upstream selects as the original does.
        patience: stop a vector after this many steps without improvement; 0 = never.
        search: corrector, or edits of the inverter's guesses without correction steps, or both: first the steps, then
            rounds of edits. The trace shows rounds as further steps. By default both for models that have a ranker, if
            their embedder runs here.
        budget: rounds of edits end at this many calls of the embedder for a text.
        batch_size: vectors at a time on a device, by default 32, or fewer for wide beams and edits; further ones go to
            other devices of this process at the same time. The result doesn't depend on it.

    Raises:
        InputError: vectors that can't be embeddings, a setting out of range, or steps for a model without corrector.
    """
    e = check_vectors(vectors, inverter.config.embedding_width)
    warn_of_foreign_vectors(inverter, e)
    settings = num_steps, sequence_beam_width, mode, patience, search, budget, batch_size
    found = _invert(inverter, e, *settings)
    warn_of_long_texts(inverter, found)
    return found


def _invert(inverter: InversionPipeline, e: np.ndarray, *settings: Any, **options: Any) -> list[InversionResult]:
    def batches(size: int) -> Iterator[np.ndarray]:
        return (e[i : i + size] for i in range(0, len(e), size))

    return [one for part in invert_batches(inverter, batches, len(e), *settings, **options) for one in part]


def invert_batches(
    inverter: InversionPipeline,
    batches: Callable[[int], Iterable[np.ndarray]],
    count: int | None,
    num_steps: int | None = None,
    sequence_beam_width: int = 4,
    mode: Mode = "best",
    patience: int = 0,
    search: Search | None = None,
    budget: int = BUDGET,
    batch_size: int | None = None,
    start: int = 0,
) -> Iterator[list[InversionResult]]:
    """`invert_embeddings` batch by batch, for more vectors than there is room for; they must have been checked.

    Args:
        batches: size -> vectors, up to so many [n, E] at a time.
        count: of all vectors, if it is known; `start` of them are done already.
    """
    search = search or inverter.default_search(mode)
    if search not in get_args(Search):
        raise InputError(f"search is {search!r}; choose {', '.join(get_args(Search))}.")
    if num_steps is None or search == "edits":
        num_steps = inverter.default_steps(search)
    check_whole("num_steps", num_steps, 0, MOST_STEPS)
    check_whole("budget", budget, 1, MOST_CALLS)
    if num_steps and not inverter.has_corrector:
        raise InputError(f"The model {inverter.name} has no corrector; use num_steps=0, or train one.")
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    loop = inverter.correction_loop(sequence_beam_width, mode, patience, search)
    rounds = loop.rounds_within(budget, num_steps)
    work = f"{num_steps} steps, beam {sequence_beam_width}" + (f", {rounds} rounds of edits" if rounds else "")
    # With wide beams, and with edits that aren't made in parts, fewer vectors fit at a time.
    rows_each = max(sequence_beam_width**2, loop.edit_calls if loop.edit_rows is None else 1)
    most = batch_size or min(BATCH_SIZE, MOST_ROWS // rows_each)
    size, weights, place = _placement(inverter, None if count is None else count - start, most)
    # A batch is one program, unless somebody watches its steps. What several processes run must be the same on all.
    watched = progress.on_terminal() and (inverter.mesh is None or jax.process_count() == 1)
    with (
        progress.bar(count, f"recovering ({work})", unit="texts", start=start) as update,
        ExitStack() as compiling,
    ):
        if watched:
            stage = progress.stage(f"compiling for {size} texts at a time, or loading the compiled program")
            compiling.enter_context(stage)
        for rows in batches(size):
            if inverter.embedder.normalized:
                rows = (rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)).astype(np.float32)
            filled = np.pad(rows, ((0, size - len(rows)), (0, 0)), mode="edge")  # one shape, one compile

            def on_step(step: int, cosine: float, first: int = start, count: int = len(rows)) -> None:
                if step or not num_steps + rounds:  # the first guesses and a step have run
                    compiling.close()
                update(first + count * step // max(num_steps + rounds, 1), cosine=round(cosine, 4))

            with nullcontext() if inverter.mesh is None else decoding_on(inverter.mesh, inverter.decode):
                found = loop(weights, place(filled), num_steps, on_step if watched else None, rounds, len(rows))
            start += len(rows)
            update(start, cosine=round(float(found.similarity[: len(rows)].mean()), 4))
            yield _results(inverter, rows, found, mode)


def _results(inverter: InversionPipeline, e: np.ndarray, found: Correction, mode: Mode) -> list[InversionResult]:
    """Results for the first n targets e [n, E]; cosines are of the texts, which the embedder's own tokenizer reads."""
    n, steps = len(e), found.trace_ids.shape[1]
    texts = inverter.vocabulary.decode(found.trace_ids[:n].reshape(n * steps, -1))
    values, again = found.trace_similarity[:n].flatten(), np.arange(len(texts))
    if not inverter.shares_vocabulary:  # most were embedded as texts
        again = np.flatnonzero(~embedded_as_text(inverter.embedder, inverter.config.max_length, texts))
    if len(again):
        values[again] = cosines(embed_decoded(inverter, [texts[i] for i in again]), e[again // steps])
    results = []
    for row, first in enumerate(range(0, n * steps, steps)):
        best, trace = first, []
        for i in range(first, first + steps):
            if mode == "upstream" or values[i] > values[best] + 1e-6:  # which is more than rounding
                best = i
            trace.append(TraceStep(i - first, texts[best], float(values[best]), int(found.trace_calls[row, i - first])))
        cosine, second = float(values[best]), float(found.runner_up[row])
        sure = inverter.calibration and float(probability(inverter.calibration, cosine, second))
        text, step = texts[best], best - first
        results.append(InversionResult(text, cosine, step, tuple(trace), runner_up=second, confidence=sure))
    return results


def embed_decoded(inverter: InversionPipeline, texts: Sequence[str]) -> np.ndarray:
    """Embeddings [n, E] of texts, blank ones too; with a mesh over several processes, each embeds a share."""
    embed = functools.partial(embed_texts, inverter.embedder)
    return embed(texts) if inverter.mesh is None else processes.shared(texts, embed)


def _placement(
    inverter: InversionPipeline, count: int | None, most: int
) -> tuple[int, Any, Callable[[np.ndarray], jax.Array]]:
    """Vectors in a batch, at most `most` on a device; the loop's weights; and what puts a batch beside them."""
    rows = None if inverter.mesh is None else decoding_rows(inverter.mesh, inverter.decode)
    parts = 1 if rows is None else math.prod(rows.mesh.shape[axis] for axis in rows.spec[0])
    count = most * jax.local_device_count() if count is None else count
    each = -(-count // parts)
    size = parts * min(max(most, 1), 1 << max(each - 1, 0).bit_length())  # powers of two: few shapes are compiled
    if rows is not None:
        return size, inverter.loop_params(), functools.partial(processes.put, shardings=rows)
    # Where hypotheses reach the embedder through the host, one device does everything.
    devices = jax.local_devices()[: count // size] if inverter.shares_vocabulary else []
    if len(devices) < 2:
        return size, inverter.loop_params(), jnp.asarray
    mesh = make_mesh(MeshConfig(), devices)
    place = functools.partial(jax.device_put, device=batch_sharding(mesh))
    return size * len(devices), inverter.loop_params(mesh), place


def invert_on_all_hosts(
    invert: Callable[..., list[InversionResult]], inverter: InversionPipeline, items: Any, **options: Any
) -> list[InversionResult]:
    """`invert(inverter, items, **options)` on every process, each doing a share of the texts or vectors `items`.

    With a metered embedder process 0 does everything: a run then pays for a text once, within one limit.
    """
    count = jax.process_count()
    if count == 1 or inverter.mesh is not None:
        return invert(inverter, items, **options)
    once = getattr(inverter.embedder, "metered", False)
    given = items.tobytes() if isinstance(items, np.ndarray) else "\n".join(items).encode()
    share = items if once else items[jax.process_index() :: count]
    found: list[dict[str, Any]] = []
    fault = ""
    try:
        if len(share) and (processes.is_main() or not once):
            found = [one.to_dict() for one in invert(inverter, share, **options)]
    except InputError as error:
        fault = str(error)
    parts = processes.gather([hashlib.sha256(given).hexdigest(), found, fault])
    digests, founds, faults = zip(*parts, strict=True)
    if fault := next(filter(None, faults), ""):
        raise InputError(fault)
    if len(set(digests)) > 1:
        raise InputError("The processes have read different texts or vectors: give all hosts the same files.")
    records = founds[0] if once else [founds[i % count][i // count] for i in range(len(items))]
    return msgspec.convert(records, list[InversionResult])


def invert_strings(inverter: InversionPipeline, texts: Sequence[str], **options: Any) -> list[InversionResult]:
    """Embeds texts and recovers them from their embeddings; options as `invert_embeddings`.

    Texts are cut to what the model recovers at most, and compared in the tokenizer's normal form (word-pieces lose case
    and spacing, and what the tokenizer doesn't know is left out): `reference` is that form.
    """
    references = comparable(inverter, texts)
    found = _invert(inverter, embed_decoded(inverter, references), **options)
    pairs = zip(found, references, strict=True)
    return [dataclasses.replace(one, reference=text, exact_match=one.text == text) for one, text in pairs]


def comparable(inverter: InversionPipeline, texts: Sequence[str]) -> list[str]:
    """Texts in the form and length in which a model can recover them; tells what is lost."""
    check_texts(texts)
    if len(texts) == 0:
        raise InputError("There are no texts to recover; pass at least one.")
    longest = inverter.config.max_length
    references = inverter.vocabulary.normalize(texts, longest)
    for i, (text, reference) in enumerate(zip(texts, references, strict=True)):
        if not reference.strip():
            which = f"Text {i + 1} of {len(texts)}"
            raise InputError(f"{which} holds nothing that the embedder's tokenizer knows; use other words.")
        if unknown := inverter.vocabulary.left_out(text, longest):
            progress.note(f"Text {i + 1} is taken without what the tokenizer doesn't know: {unknown!r}")
        if inverter.vocabulary.normalize([text], len(text.encode()) + 2)[0] != reference:
            progress.note(f"Text {i + 1} is cut to the {longest - 1} tokens that the model takes: {reference!r}")
    return references


def embed(texts: Sequence[str], embedder: str | Path | TextEmbedder = "all-MiniLM-L6-v2") -> np.ndarray:
    """Embeddings [len(texts), E] float32 by an embedder's name or folder, or by the embedder itself."""
    given = named_or_embedder(embedder)
    return (_loaded(given) if isinstance(given, str) else given).embed(texts)


@functools.lru_cache(maxsize=1)
def _loaded(name: str) -> JaxEmbedder:
    """The embedder of that name: the last one stays loaded."""
    from v2t_jax.embedders.load import load_embedder

    return load_embedder(name)
