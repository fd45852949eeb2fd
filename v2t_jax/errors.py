"""The one exception that is meant for the person at the keyboard, and the checks that all ways in share."""

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class InputError(Exception):
    """Something the user gave is wrong. The message is one sentence: what is wrong, what to do."""


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Refuses a setting that isn't a whole number in its range."""
    whole = isinstance(value, Integral) and type(value) is not bool
    if not whole:
        raise InputError(f"{name} is {value!r}; give a whole number.")
    if value < least or (most is not None and value > most):
        span = f"at least {least}" if most is None else f"a number from {least} to {most}"
        raise InputError(f"{name} is {value}; give {span}.")


def check_texts(texts: Sequence[str], what: str = "Text") -> None:
    """Refuses what can't be embedded: blank texts, bytes that are no text, a single string instead of a list."""
    if isinstance(texts, str):  # whose letters would pass for texts
        raise InputError("A single string was given where a list of texts is meant; put it in brackets: [text].")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{what} {i + 1} of {len(texts)} is of type {type(text).__name__}; give a str.")
        if not text.strip():
            raise InputError(f"{what} {i + 1} of {len(texts)} is empty; leave it out or give it words.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # bytes of another encoding come from a command line as lone surrogates
            raise InputError(f"{what} {i + 1} of {len(texts)} is not valid Unicode; give it as UTF-8.") from None


def as_numpy(values: Any) -> "np.ndarray":
    """Numbers of numpy, JAX or torch, or (nested) lists of them, as a numpy array; torch isn't imported for it.

    Raises:
        ValueError, TypeError, RuntimeError: what the libraries raise where that can't be done.
    """
    import numpy as np  # here, because `v2t --help` does without it

    if isinstance(values, list | tuple) and any(hasattr(row, "detach") for row in values):
        values = [_detached(row) for row in values]
    return np.asarray(_detached(values))


def _detached(values: Any) -> Any:
    """A torch tensor made ready for numpy, which knows neither gradients nor GPUs nor torch's bfloat16."""
    return values.detach().cpu().float() if hasattr(values, "detach") else values
