"""Scores of recovered texts against the true ones, each with its standard error.

After the original (Morris et al. 2023, section 4): BLEU is the mean of sentence BLEU, token F1 is over sets of words
(split here by a regular expression, there by nltk), exact match is equality of strings. The original swaps the names of
precision and recall; F1 is the same.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from sacrebleu.metrics import BLEU

from v2t_jax.errors import InputError

_WORD = re.compile(r"\w+|[^\w\s]")


class Score(NamedTuple):
    mean: float
    sem: float | None  # standard error of the mean; None for a single text


def score(values: Sequence[float] | np.ndarray) -> Score:
    values = np.asarray(values, np.float64)
    sem = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return Score(float(values.mean()), sem)


def sentence_bleu(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """BLEU of every text, 0 to 100 (sacrebleu's defaults for sentences)."""
    bleu = BLEU(effective_order=True)
    return np.array([bleu.sentence_score(p, [r]).score for p, r in zip(predictions, references, strict=True)])


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """F1 of the sets of words of every text, 0 to 1; words are runs of letters and digits, or single marks."""
    pairs = [(set(_WORD.findall(p)), set(_WORD.findall(r))) for p, r in zip(predictions, references, strict=True)]
    return np.array([2 * len(found & true) / max(len(found) + len(true), 1) for found, true in pairs])


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    return np.array([float(p == r) for p, r in zip(predictions, references, strict=True)])


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Score]:
    """BLEU, token F1 and exact match; refuses to score no texts."""
    if not references:
        raise InputError("There are no texts to evaluate on: use a held-out split that has some.")
    measures = {"bleu": sentence_bleu, "token_f1": token_f1, "exact_match": exact_match}
    return {name: score(measure(predictions, references)) for name, measure in measures.items()}
