"""The original's Python API, for programs written for it: `import v2t_jax.vec2text as vec2text`.

Names and arguments are the same; embeddings may be arrays of numpy, JAX or torch. Deliberate differences:

- The nearest text of all steps is returned, not the last step's (`mode="upstream"` selects as the original does).
- `num_steps=0` runs no step; the original ran one.
- `invert_embeddings_and_return_hypotheses` returns every text of a batch; the original returned one.
- Invalid input raises an `InputError` that says what to do, not an assertion.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, named_or_embedder
from v2t_jax.errors import InputError
from v2t_jax.inversion.api import InversionResult
from v2t_jax.inversion.api import invert_embeddings as invert
from v2t_jax.inversion.api import invert_strings as invert_texts
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.vec2text.convert import build

UPSTREAM_TOKENS = 128  # the original cuts a text to this length before it embeds it
# Embedder -> inverter and corrector on the Hugging Face hub, and the embedder to load, None if it is behind an API.
_ADA = "jxm/vec2text__openai_ada002__msmarco__msl128__"
PUBLISHED = {
    "gtr-base": ("jxm/gtr__nq__32", "jxm/gtr__nq__32__correct", "gtr-base"),
    "text-embedding-ada-002": (f"{_ADA}hypothesizer", f"{_ADA}corrector", None),
}


def load_pretrained_corrector(embedder: str, victim: TextEmbedder | None = None) -> InversionPipeline:
    """Fetches a published pair from the hub by the name of its embedder: gtr-base or text-embedding-ada-002.

    `victim` is the embedder itself; required if it is behind an API, for example an `HttpEmbedder`.
    """
    if embedder not in PUBLISHED:
        raise InputError(f"There is no published corrector for {embedder!r}; choose {' or '.join(PUBLISHED)}.")
    inverter, corrector, known = PUBLISHED[embedder]
    if not (victim or known):
        call = f"load_pretrained_corrector({embedder!r}, victim=HttpEmbedder(...))"
        raise InputError(f"{embedder} is behind an API: give the embedder too, as {call}.")
    return load_corrector(inverter, corrector, embedder=victim or known)


def load_corrector(
    inversion_model: str | Path,
    corrector_model: str | Path,
    *,
    embedder: str | Path | TextEmbedder | None = None,
    t5: str | Path | None = None,
) -> InversionPipeline:
    """Converts a pair of the original's checkpoints in memory.

    Args:
        inversion_model, corrector_model: folders, or names on the hub.
        embedder: name or folder of the embedder that they invert, or the embedder; by default from their config.json.
        t5: folder or hub name of the T5 that they were trained from; by default from their config.json.
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
        num_steps: correction steps; None: the inverter's initial hypothesis.
        sequence_beam_width: hypotheses kept between steps; 0 and 1 both mean one.
    """
    if isinstance(embeddings, InversionPipeline):  # the order of `v2t_jax.invert_embeddings`
        raise InputError("Here the embeddings come first, then the model: invert_embeddings(embeddings, corrector).")
    return [one.text for one in invert(corrector, embeddings, **_options(num_steps, sequence_beam_width, mode))]


def invert_strings(
    strings: Sequence[str],
    corrector: InversionPipeline,
    num_steps: int | None = None,
    sequence_beam_width: int = 0,
    mode: Literal["best", "upstream"] = "best",
) -> list[str]:
    """Embeds texts and recovers them from their embeddings; arguments as `invert_embeddings`.

    In mode "best", texts are first cut to the model's length and brought to its tokenizer's normal form; in mode
    "upstream", they are embedded as they are, up to 128 tokens, as the original does.
    """
    options = _options(num_steps, sequence_beam_width, mode)
    if mode != "upstream":
        return [found.text for found in invert_texts(corrector, strings, **options)]
    if len(strings) == 0:
        raise InputError("There are no texts to recover; give at least one.")
    embedder = corrector.embedder
    if isinstance(embedder, JaxEmbedder):  # here shortened to the length of the training texts, for hypotheses
        positions = getattr(embedder.config.encoder, "max_positions", 0) or UPSTREAM_TOKENS
        embedder = embedder.shortened(min(UPSTREAM_TOKENS, positions))
    return [found.text for found in invert(corrector, embedder.embed(strings), **options)]


def invert_embeddings_and_return_hypotheses(
    embeddings: Any,
    corrector: InversionPipeline,
    num_steps: int | None = None,
    sequence_beam_width: int = 0,
    mode: Literal["best", "upstream"] = "best",
) -> tuple[list[list[str]], list[InversionResult]]:
    """As `invert_embeddings`; returns the texts after each step [steps + 1][n] and the results with their cosines."""
    found = invert(corrector, embeddings, **_options(num_steps, sequence_beam_width, mode))
    return [[one.trace[step].text for one in found] for step in range(len(found[0].trace))], found


def _options(num_steps: int | None, sequence_beam_width: int, mode: str) -> dict[str, Any]:
    if num_steps is None and sequence_beam_width:
        raise InputError("sequence_beam_width needs num_steps: without steps there is only one hypothesis.")
    width = sequence_beam_width or 1
    return {"num_steps": num_steps or 0, "sequence_beam_width": width, "mode": mode, "search": "corrector"}
