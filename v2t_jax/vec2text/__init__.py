"""The original's Python API, for programs written against it: `import v2t_jax.vec2text as vec2text`.

The same names and arguments; embeddings may be arrays of numpy, JAX or torch. What differs, on purpose:

- The nearest text ever seen is returned, not the last step's (`mode="upstream"` gives the original's selection).
- `num_steps=0` runs no step; the original ran one.
- `invert_embeddings_and_return_hypotheses` returns every text of a batch; the original returned one.
- Bad input ends in an `InputError` that says what to do, not in an assertion.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, named_or_embedder
from v2t_jax.errors import InputError, check_texts
from v2t_jax.inversion.api import InversionResult
from v2t_jax.inversion.api import invert_embeddings as invert
from v2t_jax.inversion.api import invert_strings as invert_texts
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.vec2text.convert import build

UPSTREAM_TOKENS = 128  # that the original embeds of a text to be inverted


class Published(NamedTuple):
    """Checkpoints of the original on the Hugging Face hub."""

    inverter: str
    corrector: str
    embedder: str | None  # None: behind an API, to be given


PUBLISHED = {
    "gtr-base": Published("jxm/gtr__nq__32", "jxm/gtr__nq__32__correct", "gtr-base"),
    "text-embedding-ada-002": Published(
        "jxm/vec2text__openai_ada002__msmarco__msl128__hypothesizer",
        "jxm/vec2text__openai_ada002__msmarco__msl128__corrector",
        None,
    ),
}


def load_pretrained_corrector(embedder: str, victim: TextEmbedder | None = None) -> InversionPipeline:
    """A published pair by the name of its embedder, fetched from the hub and converted.

    Args:
        embedder: gtr-base or text-embedding-ada-002.
        victim: the embedder itself; needed where it is behind an API, such as an `HttpEmbedder`.

    Raises:
        InputError: another name; no victim where one is needed; or the hub can't be reached.
    """
    if embedder not in PUBLISHED:
        raise InputError(f"There is no published corrector for {embedder!r}; choose {' or '.join(PUBLISHED)}.")
    published = PUBLISHED[embedder]
    given = victim or published.embedder
    if given is None:
        raise InputError(
            f"{embedder} is behind an API: give the embedder too, as "
            f"load_pretrained_corrector({embedder!r}, victim=HttpEmbedder(...))."
        )
    return load_corrector(published.inverter, published.corrector, embedder=given)


def load_corrector(
    inversion_model: str | Path,
    corrector_model: str | Path,
    *,
    embedder: str | Path | TextEmbedder | None = None,
    t5: str | Path | None = None,
) -> InversionPipeline:
    """A pair of the original's checkpoints, converted in memory.

    Args:
        inversion_model, corrector_model: folders, or names on the hub.
        embedder: name or folder of the embedder that they invert, or the embedder itself; by default what their
            config.json names.
        t5: folder or hub name of the T5 that they were trained from; by default what their config.json names.

    Raises:
        InputError: see `v2t_jax.vec2text.convert.build`.
    """
    embedder = embedder if embedder is None else named_or_embedder(embedder)
    model, _ = build(str(inversion_model), str(corrector_model), t5 if t5 is None else str(t5), embedder)
    return model


def invert_embeddings(
    embeddings: Any,
    corrector: InversionPipeline,
    num_steps: int | None = None,
    sequence_beam_width: int = 0,
    mode: Literal["best", "upstream"] = "best",
) -> list[str]:
    """Recovers texts from embeddings [n, E], or from one [E].

    Args:
        corrector: what `load_corrector` or `v2t_jax.load` returned.
        num_steps: correction steps; None: the inverter's first guess.
        sequence_beam_width: hypotheses kept between steps; 0 and 1 mean one.

    Raises:
        InputError: see `v2t_jax.invert_embeddings`; or a beam without steps.
    """
    if isinstance(embeddings, InversionPipeline):  # as `v2t_jax.invert_embeddings` takes them
        raise InputError("Here the embeddings come first, then the model: invert_embeddings(embeddings, corrector).")
    options = _options(num_steps, sequence_beam_width, mode)
    return [found.text for found in invert(corrector, embeddings, **options)]


def invert_strings(
    strings: Sequence[str],
    corrector: InversionPipeline,
    num_steps: int | None = None,
    sequence_beam_width: int = 0,
    mode: Literal["best", "upstream"] = "best",
) -> list[str]:
    """Embeds texts and recovers them from their embeddings; arguments and errors as `invert_embeddings`.

    In mode "best" texts are first cut to what the model recovers at most, and brought to its tokenizer's normal form;
    in mode "upstream" they are embedded as they are, up to 128 tokens of the embedder's, as the original does.

    Raises:
        InputError: no texts, or a blank one.
    """
    options = _options(num_steps, sequence_beam_width, mode)
    if mode == "upstream":
        return [found.text for found in invert(corrector, _embed(strings, corrector.embedder), **options)]
    return [found.text for found in invert_texts(corrector, strings, **options)]


def _embed(strings: Sequence[str], embedder: TextEmbedder) -> np.ndarray:
    check_texts(strings)
    if len(strings) == 0:
        raise InputError("There are no texts to recover; give at least one.")
    if isinstance(embedder, JaxEmbedder):  # cut, for hypotheses, to the length of the training texts
        positions = getattr(embedder.config.encoder, "max_positions", UPSTREAM_TOKENS)
        embedder = embedder.shortened(min(UPSTREAM_TOKENS, positions))
    return embedder.embed(strings)


def invert_embeddings_and_return_hypotheses(
    embeddings: Any,
    corrector: InversionPipeline,
    num_steps: int | None = None,
    sequence_beam_width: int = 0,
    mode: Literal["best", "upstream"] = "best",
) -> tuple[list[list[str]], list[InversionResult]]:
    """As `invert_embeddings`, with the way there.

    Returns:
        the texts after each step, the first guesses first: [steps + 1][n]; and what was found, with its cosines.
    """
    found = invert(corrector, embeddings, **_options(num_steps, sequence_beam_width, mode))
    return [[one.trace[step].text for one in found] for step in range(len(found[0].trace))], found


def _options(num_steps: int | None, sequence_beam_width: int, mode: str) -> dict[str, Any]:
    if num_steps is None and sequence_beam_width:
        raise InputError("sequence_beam_width needs num_steps: without steps there is only the first guess.")
    # The inverter's first guess is its greedy one: in mode "best" a beam of 1 makes no other either.
    return {"num_steps": num_steps or 0, "sequence_beam_width": sequence_beam_width or 1, "mode": mode}
