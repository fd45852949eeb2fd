"""The split into training and held-out texts, and the filter that keeps the first from leaking the second.

Whether a text is held out depends on nothing but its *normalized* form (lower case, no punctuation), so adding,
removing or reordering lines moves no other line across the split.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from v2t_jax.data.readers import open_source
from v2t_jax.errors import InputError

HELD_OUT_SHARE = 0.02
OVERLAP_WORDS = 8
SHORTEST_CONTAINED = 3

_NOT_WORD = re.compile(r"[\W_]+")


def normalize_for_split(text: str) -> str:
    """Lower-cased words, single spaces, no punctuation: the form that decides equality and the split."""
    return _NOT_WORD.sub(" ", text.lower()).strip()


def split_hash(normalized: str) -> int:
    """A normalized text's hash in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(normalized.encode(), digest_size=8).digest(), "big")


def is_held_out(normalized: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a normalized text belongs to the held-out `share` (0..1)."""
    return split_hash(normalized) < share * 2**64


def unique(texts: Iterable[str]) -> dict[str, str]:
    """Normalized form -> first text with that form; texts without a single letter or digit are left out."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(normalize_for_split(text), text)
    found.pop("", None)
    return found


def _grams_of(texts: Sequence[str], numbers: Mapping[str, int]) -> Callable[[int, bool], tuple[np.ndarray, np.ndarray]]:
    """`grams(n, whole)`: hashes of all n-grams, or of those that are whole texts, and the text that each lies in."""
    split = [text.split() for text in texts]
    lengths = np.array([len(words) for words in split], np.int32)
    flat = np.array([numbers.get(word, 0) for words in split for word in words], np.uint64)
    # Spread the small numbers over 64 bits: the polynomial below then hardly ever collides.
    flat = (flat + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    text = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)  # that each word lies in
    length = np.repeat(lengths, lengths)  # of that text
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # words from here to its end

    def grams(n: int, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        start = np.flatnonzero((left >= n) & ((length == n) if whole else True))
        value = np.zeros(len(start), np.uint64)
        for i in range(n):
            value = value * np.uint64(0xD6E8FEB86659FD93) + flat[start + i]
            value ^= value >> np.uint64(29)
        return value, text[start]

    return grams


class HeldOutFilter:
    """Detects training texts that leak a held-out text, all normalized by `normalize_for_split`.

    A text does if it equals a held-out one, shares `OVERLAP_WORDS` words in a row with one, or contains one
    or is contained in one as whole words (of at least `SHORTEST_CONTAINED` words: "of the" leaks nothing).
    """

    def __init__(self, held_out: Sequence[str]):
        self._texts = set(held_out)
        words = dict.fromkeys(word for text in held_out for word in text.split())
        self._numbers = {word: i for i, word in enumerate(words, 1)}  # 0 is a word that no held-out text has
        theirs = _grams_of(held_out, self._numbers)
        shorter = range(SHORTEST_CONTAINED, OVERLAP_WORDS)
        # n, whether their n-grams and ours must be whole texts
        cases = [(n, whole, not whole) for whole in (True, False) for n in shorter] + [(OVERLAP_WORDS, False, False)]
        # and theirs in order, with a last one that none equals
        self._cases = [
            (n, ours_whole, np.append(np.unique(theirs(n, whole)[0]), np.uint64(0))) for n, whole, ours_whole in cases
        ]

    def leaking(self, normalized: Sequence[str]) -> np.ndarray:
        """Which of M texts leak a held-out text: bool [M]."""
        found = np.array([text in self._texts for text in normalized], bool)
        ours = _grams_of(normalized, self._numbers)
        for n, whole, theirs in self._cases if self._texts else ():
            grams, text = ours(n, whole)
            found[text[theirs[np.searchsorted(theirs[:-1], grams)] == grams]] = True
        return found


def read_texts(
    source: str,
    split: Literal["train", "held_out"],
    *,
    held_out_share: float = HELD_OUT_SHARE,
    avoid: Sequence[str] = (),
    limit: int | None = None,
) -> list[str]:
    """Reads the texts of one split of a source, without duplicates of their normalized form, in the source's order.

    Args:
        held_out_share: of all sources but "wordnet", which has a fixed split; 0 holds out none.
        avoid: held-out texts of other sources; training texts that leak one of these are dropped.
    """
    packaged = source == "wordnet"
    share = HELD_OUT_SHARE if packaged else held_out_share
    found = unique(open_source(source))
    if not found:
        raise InputError(f"{source} holds no text: give a source with at least one text of letters or digits.")
    held = {normalized: text for normalized, text in found.items() if is_held_out(normalized, share)}
    if split == "held_out":
        chosen = list(held.values())
    else:
        rest = [normalized for normalized in found if normalized not in held]
        # The packaged file was cleaned against its own held-out texts when it was built (a test checks it).
        protected = ([] if packaged else list(held)) + [normalize_for_split(text) for text in avoid]
        leaks = HeldOutFilter(protected).leaking(rest)
        chosen = [found[text] for text, bad in zip(rest, leaks, strict=True) if not bad]
    if not chosen:
        raise InputError(
            f"The {split} split of {source} is empty (of {len(found)} texts): use more text or another share."
        )
    return chosen[:limit]
