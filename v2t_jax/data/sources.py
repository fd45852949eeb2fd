"""Reading texts from the packaged corpus, files and TFDS, with a split that never leaks.

Whether a text is held out depends on nothing but its *normalised* form (lower case, no punctuation), so
adding, removing or reordering lines moves no other line across the split. Training texts that share a long
word n-gram with a held-out text, contain one or are contained in one, are dropped.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from v2t_jax.errors import InputError

Split = Literal["train", "held_out"]

WORDNET = Path(__file__).parent.parent / "assets" / "wordnet.txt.gz"
HELD_OUT_SHARE = 0.02
OVERLAP_WORDS = 8
SHORTEST_CONTAINED = 3

_NOT_WORD = re.compile(r"[\W_]+")


def normalise_for_split(text: str) -> str:
    """Lower-cased words, single spaces, no punctuation: the form that decides equality and the split."""
    return _NOT_WORD.sub(" ", text.lower()).strip()


def is_held_out(normalised: str, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a normalised text falls in the held-out `share` (0..1) by its own hash."""
    digest = hashlib.blake2b(normalised.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def unique(texts: Iterable[str]) -> dict[str, str]:
    """Normalised form -> first text with that form; texts without a single letter or digit are left out."""
    found: dict[str, str] = {}
    for text in texts:
        normalised = normalise_for_split(text)
        if normalised:
            found.setdefault(normalised, text)
    return found


class _Words:
    """Texts as one flat array of word numbers, so that n-grams of all texts are hashed at once."""

    def __init__(self, normalised: Sequence[str], numbers: dict[str, int]):
        split = [text.split() for text in normalised]
        self.lengths = np.array([len(words) for words in split], np.int64)
        self.ends = np.cumsum(self.lengths)
        flat = [numbers.setdefault(word, len(numbers)) for words in split for word in words]
        # Spread the small numbers over 64 bits: the polynomial below then hardly ever collides.
        self.flat = (np.array(flat, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)

    def grams(self, n: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the n-grams of the chosen texts, and the text that each lies in."""
        owner = np.repeat(np.arange(len(self.lengths)), self.lengths)
        position = np.arange(len(self.flat))
        start = position[(position + n <= self.ends[owner]) & chosen[owner]]
        value = np.zeros(len(start), np.uint64)
        for i in range(n):
            value = value * np.uint64(0xD6E8FEB86659FD93) + self.flat[start + i]
            value ^= value >> np.uint64(29)
        return value, owner[start]


def overlaps(normalised: Sequence[str], held_out: Sequence[str]) -> np.ndarray:
    """Which texts give a held-out text away.

    A text does if it equals a held-out one, shares `OVERLAP_WORDS` words in a row with one, or contains one
    or is contained in one as whole words (of at least `SHORTEST_CONTAINED` words: "of the" betrays nothing).

    Args:
        normalised: texts [M], each through `normalise_for_split`.
        held_out: texts to protect, normalised likewise.

    Returns:
        bool [M].
    """
    forbidden = set(held_out)
    found = np.array([text in forbidden for text in normalised], bool)
    if not forbidden or not len(normalised):
        return found
    numbers: dict[str, int] = {}
    theirs, ours = _Words(held_out, numbers), _Words(normalised, numbers)
    all_theirs, all_ours = np.ones(len(theirs.lengths), bool), np.ones(len(ours.lengths), bool)
    for n in range(SHORTEST_CONTAINED, OVERLAP_WORDS + 1):
        # Texts of n words are looked for in the other side's n-grams; at n = OVERLAP_WORDS all n-grams count.
        last = n == OVERLAP_WORDS
        short_theirs, short_ours = all_theirs & (last | (theirs.lengths == n)), all_ours & (ours.lengths == n)
        mine, owner = ours.grams(n, all_ours)
        found[owner[np.isin(mine, theirs.grams(n, short_theirs)[0])]] = True
        mine, owner = ours.grams(n, short_ours)
        found[owner[np.isin(mine, theirs.grams(n, all_theirs)[0])]] = True
    return found


def read_texts(
    source: str,
    split: Split,
    *,
    held_out_share: float = HELD_OUT_SHARE,
    avoid: Sequence[str] = (),
    limit: int | None = None,
) -> list[str]:
    """Texts of one split of a source, deduplicated on their normalised form, in the source's order.

    Args:
        source: "wordnet" (packaged; its split is fixed), a path to .txt or .txt.gz (a text a line), .jsonl
            (field "text"), .parquet (column "text"), or "tfds:NAME:FIELD" (the data set's "train" part).
        split: "train" or "held_out".
        held_out_share: for sources without a fixed split, the share of texts held out; 0 holds out none.
        avoid: held-out texts of other sources; training texts that overlap one of these are dropped.
        limit: at most so many texts.

    Raises:
        InputError: the source is missing, unreadable or holds no text.
    """
    if split not in ("train", "held_out"):
        raise InputError(f"Unknown split {split!r}: use 'train' or 'held_out'.")
    if not 0 <= held_out_share < 1:
        raise InputError(f"held_out_share must lie in [0, 1), not {held_out_share}.")
    packaged = source == "wordnet"
    share = HELD_OUT_SHARE if packaged else held_out_share
    found = unique(_read(str(WORDNET) if packaged else source))
    if not found:
        raise InputError(f"{source} holds no text: give a source with at least one text of letters or digits.")
    held = {normalised: text for normalised, text in found.items() if is_held_out(normalised, share)}
    if split == "held_out":
        chosen = list(held.values())
    else:
        rest = [normalised for normalised in found if normalised not in held]
        # The packaged file was cleaned against its own held-out texts when it was built (a test checks it).
        protected = ([] if packaged else list(held)) + [normalise_for_split(text) for text in avoid]
        chosen = [found[text] for text, bad in zip(rest, overlaps(rest, protected), strict=True) if not bad]
    if not chosen:
        raise InputError(
            f"The {split} split of {source} is empty (of {len(found)} texts): use more text or another share."
        )
    return chosen[:limit]


def _read(source: str) -> Iterator[str]:
    if source.startswith("tfds:"):
        return _read_tfds(source)
    path = Path(os.path.expanduser(source))
    readers = {".txt": _read_lines, ".txt.gz": _read_lines, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = next((reader for suffix, reader in readers.items() if path.name.endswith(suffix)), None)
    if reader is None:
        known = ", ".join(readers)
        raise InputError(f"Cannot read {source!r}: use 'wordnet', 'tfds:NAME:FIELD' or a file ending in {known}.")
    if not os.path.isfile(path):
        raise InputError(f"There is no file {path}: check the path.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: give a file with text in it.")
    return reader(path)


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                if "\0" in line:
                    raise InputError(f"{path} is not a text file (it holds zero bytes): give UTF-8 text, one a line.")
                if line := line.strip():
                    yield line
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): convert it to UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}): make or download it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"Record {number} of {path} is not JSON ({error.msg}): give one object a line.") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(
                f"Record {number} of {path} has no string field 'text': give lines like {{\"text\": ...}}."
            )
        yield _as_text(record["text"], f"Record {number} of {path}")


def _read_parquet(path: Path) -> Iterator[str]:
    parquet = _import("pyarrow.parquet", "pyarrow", "Parquet files")
    arrow = _import("pyarrow", "pyarrow", "Parquet files")
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise InputError(f"{path} has no column 'text' but {file.schema_arrow.names}: rename the one you mean.")
        for batch in file.iter_batches(columns=["text"]):
            yield from (_as_text(value, str(path)) for value in batch.column(0).to_pylist() if value is not None)
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}): write it again.") from error


def _read_tfds(source: str) -> Iterator[str]:
    name, _, field = source.removeprefix("tfds:").rpartition(":")
    if not name or not field:
        raise InputError(
            f"{source!r} names no data set and field: write tfds:NAME:FIELD, e.g. tfds:ag_news_subset:title."
        )
    with contextlib.redirect_stdout(sys.stderr):  # it talks, and stdout may be somebody's JSON
        tfds = _import("tensorflow_datasets", "tensorflow-datasets", "TFDS sources")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            records = tfds.data_source(name, split="train")
    except ImportError as error:
        raise InputError(f"TFDS cannot open {name!r} ({error}): install what it lacks.") from error
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"TFDS cannot open {name!r} ({reason}): prepare it with file_format='array_record'."
        ) from error
    for i in range(len(records)):
        record = records[i]
        if field not in record:
            raise InputError(f"TFDS data set {name!r} has no field {field!r} but {sorted(record)}: name one of these.")
        yield _as_text(record[field], source)


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # JSON can hold halves of characters
    raise InputError(f"{where} holds {type(value).__name__} where text was expected: choose a field of strings.")


def _import(module: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{what} need the package {package} ({error}): pip install {package}.") from error
