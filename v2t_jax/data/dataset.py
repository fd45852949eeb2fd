"""Tokenized texts as two flat arrays, in memory or memory-mapped from a built data set.

DIR/manifest.json    what it was made of, counts, and the size and sha256 of every file; written last
DIR/tokens.npy       uint16 or uint32 [T]: the model ids of all texts, end to end, without end-of-sequence
DIR/offsets.npy      int64 [N + 1]: text i is tokens[offsets[i]:offsets[i + 1]]
DIR/vocabulary.npy   int32 [V]: the tokenizer id of each model id
DIR/tokenizer.json   the tokenizer that those are of
DIR/held_out.jsonl   texts that are not among the N
DIR/columns/NAME/    an array for each text, such as its embedding (`columns`)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from v2t_jax.data.vocabulary import Vocabulary, read_tokenizer
from v2t_jax.decode.state import EOS, PAD
from v2t_jax.errors import InputError
from v2t_jax.interop.files import sha256_of, write_file

FORMAT = 3
BLOCK_ROWS = 256  # consecutive texts of a built data set that are read together, and belong to one fold
FILES = ("tokens.npy", "offsets.npy", "vocabulary.npy", "tokenizer.json", "held_out.jsonl")
ENCODED_TEXTS = 20_000  # tokenized at a time


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """Tokenized texts; those of a built data set stay on disk until they are used."""

    tokens: np.ndarray  # [T] model ids without end-of-sequence
    offsets: np.ndarray  # int64 [N + 1], text i is tokens[offsets[i]:offsets[i + 1]]
    block_rows: int = 1  # consecutive texts that stay together when texts are shuffled
    folder: Path = Path()  # of a built data set, as are the rest
    manifest: dict[str, Any] = field(default_factory=dict)
    manifest_sha256: str = ""

    @classmethod
    def from_texts(cls, texts: Sequence[str], vocabulary: Vocabulary) -> TokenDataset:
        """Tokenizes texts; drops those that are empty or have tokens outside the vocabulary."""
        kept = [np.zeros(0, np.int32)]
        for i in range(0, len(texts), ENCODED_TEXTS):
            kept += [ids for ids in vocabulary.encode(texts[i : i + ENCODED_TEXTS]) if len(ids) and ids.min() >= 0]
        return cls(np.concatenate(kept), np.cumsum([len(ids) for ids in kept], dtype=np.int64))

    @classmethod
    def open(cls, folder: Path, whole: bool = False) -> TokenDataset:
        """Opens a built data set; compares sizes and sha256 with its manifest, of the tokens only if `whole`."""
        manifest, sha256 = read_manifest(folder / "manifest.json", "v2t data build", ("files", "made_of"))
        for name in FILES:
            check_file(folder / name, manifest["files"][name], whole or name != "tokens.npy")
        tokens, offsets = (open_array(folder / name) for name in FILES[:2])
        return cls(tokens, offsets, BLOCK_ROWS, folder, manifest, sha256)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def padded(self, rows: slice, length: int) -> np.ndarray:
        """Ids int32 [rows, length] of some texts: their first `length - 1` tokens, end-of-sequence, padding."""
        starts, ends = self.offsets[:-1][rows], self.offsets[1:][rows]
        return pad_rows(self.tokens, starts, np.minimum(ends - starts, length - 1), length)

    def vocabulary(self, tokenizer: Tokenizer | None = None) -> Vocabulary:
        """The vocabulary of a built data set's ids; refuses a `tokenizer` that it wasn't built with."""
        if tokenizer is None:
            tokenizer = read_tokenizer(self.folder / "tokenizer.json")
        if tokenizer_sha256(tokenizer) != self.manifest["made_of"]["tokenizer_sha256"]:
            raise InputError(
                f"{self.folder} was built with another tokenizer than the embedder's: run 'v2t data build' with this "
                "embedder, or train with the one it was built for."
            )
        return Vocabulary(tokenizer, np.load(self.folder / "vocabulary.npy", allow_pickle=False))

    def held_out(self, limit: int | None = None) -> list[str]:
        """The texts of a built data set that training doesn't see, in random order."""
        with (self.folder / "held_out.jsonl").open(encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in itertools.islice(file, limit)]


def pad_rows(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Rows int32 [n, width]: `lengths` [n] ids of the flat `tokens` from `starts` [n] on, end-of-sequence, padding."""
    position, lengths = np.arange(width), lengths[:, None]
    inside = position < lengths
    ids = tokens[np.where(inside, starts[:, None] + position, 0)]
    return np.where(inside, ids, np.where(position == lengths, EOS, PAD)).astype(np.int32)


def fold_of(rows: np.ndarray, folds: int) -> np.ndarray:
    """Which of K folds texts belong to, by their block (the build has shuffled them)."""
    return rows // BLOCK_ROWS % folds


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """A hash of everything that decides how texts are tokenized."""
    return hashlib.sha256(Vocabulary.full(tokenizer).tokenizer.to_str().encode()).hexdigest()


def is_built(source: str) -> bool:
    """Whether a source names the folder of a built data set, finished or not."""
    return (Path(source).expanduser() / "made_of.json").is_file()


def open_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}): download or make it again.") from error


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return header.getvalue()


def check_file(path: Path, entry: dict[str, Any], whole: bool) -> None:
    """Compares a file's size with its manifest entry, and its sha256 too if `whole`."""
    advice = "download it again, or delete the folder and make it again"
    if not path.is_file():
        raise InputError(f"{path} is missing: {advice}.")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise InputError(f"{path} has {size} bytes instead of {entry['bytes']} (is it truncated?): {advice}.")
    if whole and sha256_of([path]) != entry["sha256"]:
        raise InputError(f"{path} is damaged (its sha256 differs from the manifest's): {advice}.")


def read_manifest(path: Path, maker: str, keys: Sequence[str]) -> tuple[dict[str, Any], str]:
    """A manifest that the command `maker` writes, with at least these keys, and its sha256."""
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
        _check_format(path.parent, manifest["format"])
        if missing := [key for key in keys if key not in manifest]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return manifest, hashlib.sha256(content).hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: {path.parent} was never finished; run '{maker}' (again).") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): download it again, or run '{maker}' again.") from error


def claim(file: Path, described: dict[str, Any], folder: Path) -> None:
    """Records in `file` what a folder is being made of, or compares that with the record that is there."""
    if not file.is_file():
        return write_json(file, described)
    try:
        before = json.loads(file.read_bytes())
        _check_format(folder, before["format"])
        # A column's record gains its file when it is finished.
        changed = sorted(key for key in described if key != "file" and described[key] != before[key])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is damaged ({error}): delete {folder} and start again.") from error
    if changed:
        raise InputError(
            f"{folder} is being made of something else (it differs in {', '.join(changed)}): give another folder or "
            "name, or delete this one."
        )


def write_json(file: Path, value: Any) -> None:
    write_file(file, [(json.dumps(value, indent=1) + "\n").encode()])


@contextlib.contextmanager
def resumable(work: str, where: Path) -> Iterator[None]:
    """A full disk and the like end in one sentence; what is done stays, and the same command goes on from there."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{work} stopped at {error.filename or where} ({error.strerror or error}); fix that or free space, then "
            "run the same command to go on."
        ) from error


def _check_format(folder: Path, found: Any) -> None:
    if found != FORMAT:
        raise InputError(f"{folder} was built by another version of v2t: build it again, in a new folder.")
