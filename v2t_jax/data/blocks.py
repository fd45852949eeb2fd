"""A built data set on disk: ArrayRecord files whose records are blocks of rows, and the manifest that describes them.

    DIR/manifest.json               what it was made of, counts, a list of shards with the sha256 of their files
    DIR/tokens/00000.array_record   a record is the ids of `ROWS` texts, end to end (a shard's last record: fewer texts)
    DIR/lengths/00000.array_record  beside it, how many ids each text has
    DIR/pieces.npy, tokenizer.json  the vocabulary, and the tokenizer that its pieces are of
    DIR/held_out.jsonl              texts that are in no shard
    DIR/columns/NAME/...            more about each text, such as its embedding: shards of the same blocks, and a
                                    manifest of their own, written by whoever makes them (`ColumnWriter`)

A record is a CRC-32 and little-endian numbers. One row a record would read at some 5,000 rows a second.
"""

import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tokenizers import Tokenizer

from v2t_jax.data.vocabulary import Vocabulary, read_tokenizer
from v2t_jax.errors import InputError

FORMAT = 2
ROWS = 256  # of a block: so many texts are read at once, and stay near each other in an epoch
LENGTH_DTYPE = np.dtype("<u2")  # of a text's number of ids

_OPTIONS = "group_size:1,uncompressed"  # a block at a time; ids hardly shrink, vectors not at all


def _checksum(payload: bytes, shard: int, block: int) -> int:
    """With the place in it: a good block in the wrong place is a bad block."""
    return zlib.crc32(payload, zlib.crc32(struct.pack("<QQ", shard, block)))


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """Writes a file, whole or not at all, and on disk when this returns.

    Returns:
        Its entry for a manifest: bytes and sha256.
    """
    temporary = _temporary(path)
    temporary.write_bytes(content)
    return _publish(temporary, path)


def write_records(path: Path, shard: int, payloads: Iterable[bytes]) -> dict[str, Any]:
    """Likewise, an ArrayRecord file of blocks.

    Raises:
        OSError: the disk is full, or the like.
    """
    temporary = _temporary(path)
    count = 0
    try:
        writer = ArrayRecordWriter(str(temporary), _OPTIONS)
        for payload in payloads:
            writer.write(struct.pack("<I", _checksum(payload, shard, count)) + payload)
            count += 1
        writer.close()
    except RuntimeError as error:  # all that the library raises
        raise OSError(0, " ".join(str(error).split("; ")[:1]), str(path)) from error
    return _publish(temporary, path)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _publish(temporary: Path, path: Path) -> dict[str, Any]:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
        entry = {"bytes": temporary.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    os.replace(temporary, path)
    return entry


def check_file(path: Path, entry: dict[str, Any], whole: bool = False) -> None:
    """Compares a file with its entry in a manifest: its size, and the sha256 too if `whole`.

    Raises:
        InputError: it is another one.
    """
    advice = "fetch it again, or delete its data set and build that again"
    if not path.is_file():
        raise InputError(f"{path} is missing: {advice}.")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise InputError(
            f"{path} has {size} bytes where its manifest says {entry['bytes']} (is it cut off?): {advice}."
        )
    if whole:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise InputError(f"{path} is damaged (its sha256 is not its manifest's): {advice}.")


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Of all that decides how texts are cut into pieces."""
    return hashlib.sha256(Vocabulary.full(tokenizer).tokenizer.to_str().encode()).hexdigest()


def fold_of(blocks: np.ndarray, folds: int) -> np.ndarray:
    """Which of K folds blocks belong to. Builds shuffle, so a block's texts have nothing in common."""
    return blocks % folds


class Records:
    """Blocks of all shards, numbered through, from one family of files.

    Args:
        folder: where the files are.
        entries: what the manifest says of each.
        counts: blocks in each file.

    Raises:
        InputError: a file is missing or cut off; in `read`, a block is damaged.
    """

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]], counts: Sequence[int]):
        self._paths = [folder / f"{i:05d}.array_record" for i in range(len(entries))]
        for path, entry in zip(self._paths, entries, strict=True):
            check_file(path, entry)
        self._ends = np.cumsum(counts)
        self._readers: dict[int, ArrayRecordReader] = {}

    def read(self, blocks: Sequence[int] | np.ndarray, dtype: np.dtype) -> list[np.ndarray]:
        """The numbers of some blocks, flat; in any order, repeats allowed."""
        return [self._read(int(block), dtype) for block in blocks]

    def _read(self, block: int, dtype: np.dtype) -> np.ndarray:
        shard = int(np.searchsorted(self._ends, block, side="right"))
        place = block - (int(self._ends[shard - 1]) if shard else 0)
        path = self._paths[shard]
        reason = ""
        try:
            if shard not in self._readers:
                # Without its read-ahead, which would read megabytes for every block.
                self._readers[shard] = ArrayRecordReader(str(path), options="readahead_buffer_size:0")
            (record,) = self._readers[shard].read([place])
        except (RuntimeError, ValueError, IndexError) as error:
            record, reason = b"", f" ({str(error).split(';')[0]})"
        payload = record[4:]
        if len(record) < 4 or struct.unpack("<I", record[:4])[0] != _checksum(payload, shard, place):
            raise InputError(
                f"Block {place} of {path} is damaged{reason}: fetch the file again, or delete its data set and build "
                "that again."
            )
        return np.frombuffer(payload, dtype)


@dataclass(frozen=True)
class Column:
    """A family of blocks beside the tokens': one array of a fixed shape for each text."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]  # of one text's array
    made_by: dict[str, Any]  # all that determines it
    records: Records

    def read(self, blocks: Sequence[int] | np.ndarray) -> np.ndarray:
        """The arrays of the texts of some blocks [rows, *shape]."""
        parts = [part.reshape(-1, *self.shape) for part in self.records.read(blocks, self.dtype)]
        return np.concatenate([np.zeros((0, *self.shape), self.dtype), *parts])


class StoredTexts:
    """A built data set, opened for reading.

    Attributes:
        manifest: as written.
        block_rows: int64 [blocks], texts in each block.
        first_block: int64 [shards + 1], where each shard's blocks begin.

    Raises:
        InputError: the folder holds no whole data set.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest, self.sha256 = _read_manifest(folder / "manifest.json", "v2t data build")
        try:
            shards = self.manifest["shards"]
            rows = [shard["rows"] for shard in shards]
            self.token_dtype = np.dtype(self.manifest["token_dtype"]).newbyteorder("<")
            counts = [-(-n // ROWS) for n in rows]
            self.tokens = Records(folder / "tokens", [shard["tokens"] for shard in shards], counts)
            self.lengths = Records(folder / "lengths", [shard["lengths"] for shard in shards], counts)
            for name in ("pieces.npy", "tokenizer.json", "held_out.jsonl"):
                check_file(folder / name, self.manifest[name], whole=True)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{folder / 'manifest.json'} is damaged (it lacks or garbles {error}): build it again."
            ) from error
        self.first_block = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.block_rows = np.concatenate(
            [
                np.zeros(0, np.int64),
                *(np.minimum(ROWS, n - ROWS * np.arange(c)) for n, c in zip(rows, counts, strict=True)),
            ]
        )

    def vocabulary(self, tokenizer: Tokenizer | None = None) -> Vocabulary:
        """The vocabulary that the ids are of.

        Args:
            tokenizer: the one that they should be made with; by default the one they were.

        Raises:
            InputError: they were made with another tokenizer.
        """
        if tokenizer is None:
            tokenizer = read_tokenizer(self.folder / "tokenizer.json")
        if tokenizer_sha256(tokenizer) != self.manifest["made_of"]["tokenizer_sha256"]:
            raise InputError(
                f"{self.folder} was built with another tokenizer than the embedder's: run 'v2t data build' with this "
                "embedder, or train with the one it was built for."
            )
        return Vocabulary(tokenizer, np.load(self.folder / "pieces.npy", allow_pickle=False))

    def held_out(self, limit: int | None = None) -> list[str]:
        """The texts that training doesn't see, in an order that is no source's."""
        texts: list[str] = []
        with (self.folder / "held_out.jsonl").open(encoding="utf-8") as file:
            for line in file:
                if len(texts) == limit:
                    break
                texts.append(json.loads(line)["text"])
        return texts

    def texts(self, shard: int) -> Iterator[list[np.ndarray]]:
        """The ids of a shard's texts without end-of-sequence, a block at a time: what a column is computed from."""
        for block in range(self.first_block[shard], self.first_block[shard + 1]):
            (ids,), (lengths,) = self.tokens.read([block], self.token_dtype), self.lengths.read([block], LENGTH_DTYPE)
            yield np.split(ids.astype(np.int32), np.cumsum(lengths, dtype=np.int64)[:-1])

    def column(self, name: str) -> Column:
        """A finished column.

        Raises:
            InputError: there is none of this name, or it belongs to another build.
        """
        folder = self.folder / "columns" / name
        manifest, _ = _read_manifest(folder / "manifest.json", "what makes it")
        if manifest.get("of") != self.sha256:
            raise InputError(f"{folder} belongs to another build of {self.folder}: delete it and make it again.")
        try:
            dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
            records = Records(folder, manifest["shards"], np.diff(self.first_block).tolist())
            return Column(name, dtype, tuple(manifest["shape"]), manifest["made_by"], records)
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / 'manifest.json'} is damaged (it lacks {error}): make it again.") from error


class ColumnWriter:
    """Writes a column of a data set, a shard at a time, in any order and by any number of processes.

    A shard that is written stays, whatever happens; what is being written when the process dies leaves nothing that
    counts. `made_by` must hold all that determines the numbers: it keys the column, and another is refused.

    Raises (all methods):
        InputError: the folder holds a column that something else made.
        OSError: the disk is full, or the like.
    """

    def __init__(
        self, stored: StoredTexts, name: str, dtype: str, shape: tuple[int, ...], made_by: dict[str, Any]
    ) -> None:
        self._stored, self._folder = stored, stored.folder / "columns" / name
        self._dtype, self._shape = np.dtype(dtype).newbyteorder("<"), shape
        self._described = {"format": FORMAT, "of": stored.sha256, "dtype": dtype, "shape": shape, "made_by": made_by}
        self._described = json.loads(json.dumps(self._described))
        claim(self._folder / "made_by.json", self._described, self._folder)

    def missing(self) -> list[int]:
        """The shards that have yet to be written."""
        shards = range(len(self._stored.manifest["shards"]))
        return [shard for shard in shards if not self._entry(shard).is_file()]

    def write(self, shard: int, blocks: Iterable[np.ndarray]) -> None:
        """Writes a shard: an array [rows, *shape] for each of `stored.texts(shard)`."""
        stored = self._stored
        expected = stored.block_rows[stored.first_block[shard] : stored.first_block[shard + 1]]

        def payloads() -> Iterator[bytes]:
            for rows, block in zip(expected, blocks, strict=True):
                assert block.shape == (rows, *self._shape), f"{block.shape} is not {(rows, *self._shape)}"
                yield block.astype(self._dtype).tobytes()

        entry = write_records(self._folder / f"{shard:05d}.array_record", shard, payloads())
        write_file(self._entry(shard), as_json(entry))

    def finish(self) -> None:
        """Writes the manifest, once no shard is missing: from then on the column can be read."""
        assert not self.missing(), f"shards {self.missing()} of {self._folder} are missing"
        entries = [json.loads(self._entry(i).read_text()) for i in range(len(self._stored.manifest["shards"]))]
        write_file(self._folder / "manifest.json", as_json(self._described | {"shards": entries}))

    def _entry(self, shard: int) -> Path:
        return self._folder / f"{shard:05d}.json"


def claim(file: Path, described: dict[str, Any], folder: Path) -> None:
    """Writes what a folder is being made of, or compares it with what was written there.

    Raises:
        InputError: it is being made of something else.
    """
    if not file.is_file():
        write_file(file, as_json(described))
        return
    try:
        before = json.loads(file.read_bytes())
        changed = sorted(key for key in described | before if described.get(key) != before.get(key))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}): delete {folder} and start again.") from error
    if changed:
        raise InputError(
            f"{folder} is being made of something else (it differs in {', '.join(changed)}): give another folder, or "
            "delete this one."
        )


def as_json(value: Any) -> bytes:
    """As the manifests are written."""
    return (json.dumps(value, indent=1) + "\n").encode()


def _read_manifest(path: Path, maker: str) -> tuple[dict[str, Any], str]:
    """A manifest and its sha256."""
    try:
        content = path.read_bytes()
        manifest = json.loads(content)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} is missing: {path.parent} was never finished; run {maker} (again).") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): fetch it again, or build it again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise InputError(f"{path} is of format {found!r}, not {FORMAT}: build it again with this version.")
    return manifest, hashlib.sha256(content).hexdigest()


def is_stored(source: str) -> bool:
    """Whether a source's name is that of a built data set's folder, be it finished or not."""
    return (Path(source).expanduser() / "made_of.json").is_file()
