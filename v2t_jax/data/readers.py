"""Reads texts from files one after the other, so that no file is ever whole in memory.

A line ends with LF or CRLF, and with nothing else: a lone CR, a form feed or U+2028 is part of it. Sources, as below,
skip blank lines; `read_lines`, where line i is text i, refuses them.

    wordnet        the packaged corpus
    NAME.txt       a text a line
    NAME.jsonl     an object a line with a field "text" (BEIR's corpus.jsonl is one; its title is left out)
    NAME.tsv       id<TAB>text without a header (MSMARCO's collection.tsv), or a header line that names a column "text"
                   (DPR's psgs_w100.tsv: id, text, title, quoted as CSV is)
    NAME.parquet   a column "text"
    FOLDER, GLOB   the files in it, in the order of their names
    tfds:NAME:FIELD  a TFDS data set's "train" part; NAME may be the folder of one that is prepared

Text, JSON lines and TSV may be compressed by gzip (.txt.gz ...). Ids are read where a format has them: the id of TSV,
fields and columns called as in `IDS`.
"""

import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from v2t_jax.errors import InputError

WORDNET = Path(__file__).parent.parent / "assets" / "wordnet.txt.gz"
WATCHED_TEXTS = 256  # texts between two looks at a file's position
TFDS_TEXT_BYTES = 256  # a TFDS record's text has no known length
IDS = ("id", "_id", "ids", "uuid", "pk", "key", "custom_id")  # BEIR has _id

Record = tuple[Any, str]  # the text's id, or None, and the text


@dataclass
class Source:
    """Texts to iterate over, more than once if need be."""

    files: tuple[Path, ...]  # what it is made of
    size: int  # bytes of its texts, approximately
    read: Callable[["Source"], Iterator[Record]]
    position: int = 0  # bytes read so far

    def records(self) -> Iterator[Record]:
        return self.read(self)

    def __iter__(self) -> Iterator[str]:
        return (text for _, text in self.read(self))


def open_source(source: str) -> Source:
    """A source by its name, see the module's docstring."""
    if source.startswith("tfds:"):
        return _open_tfds(source)
    files = tuple(_files(str(WORDNET) if source == "wordnet" else source))
    sizes = [file.stat().st_size for file in files]
    if 0 in sizes:
        raise InputError(f"{files[sizes.index(0)]} is empty: give a file with text in it.")

    def read(source: Source) -> Iterator[Record]:
        for i, file in enumerate(files):
            with _errors_of(file), file.open("rb") as raw:
                for number, record in enumerate(_reader(file)(raw, file)):
                    if number % WATCHED_TEXTS == 0:
                        source.position = sum(sizes[:i]) + raw.tell()
                    yield record
        source.position = source.size

    return Source(files, sum(sizes), read)


def read_lines(name: str) -> Iterator[str]:
    """The texts of a file (.gz too), of a pipe, or of stdin for "-": text i is line i, as it is but for its end.

    Blank lines at the end are nothing. One before a text is refused, and so is a file without texts.
    """
    path, blank, number = Path("stdin" if name == "-" else name), 0, 0
    with _errors_of(path), sys.stdin.buffer if name == "-" else path.open("rb") as raw:
        for number, line in enumerate(_lines(raw, path), 1):
            if not line.strip():
                blank = blank or number
            elif blank:
                raise InputError(f"Line {blank} of {path} is blank, but line i is text i: remove it or give it words.")
            else:
                yield line
    if blank == 1 or number == 0:
        raise InputError(f"{path} is empty: give a file with a text a line.")


@contextlib.contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Turns the errors of reading a file into one sentence."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason}): convert it to UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{file} is not a complete gzip file ({error}): make or download it again.") from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error


def _files(source: str) -> list[Path]:
    if source == "-":
        raise InputError("A data set's texts are read twice, so not from stdin: save them as a .txt file, and give it.")
    path = Path(os.path.expanduser(source))
    if source and path.is_dir():
        if (path / "made_of.json").is_file():
            raise InputError(f"{path} is a built data set: give the files that it was built from.")
        found = sorted(file for file in path.iterdir() if file.is_file() and _reader(file))
        kinds = sorted({file.name.removesuffix(".gz").rpartition(".")[2] for file in found})
        if not found:
            raise InputError(f"{path} holds no file ending in {', '.join(_READERS)}: check the path.")
        if len(kinds) > 1:
            raise InputError(f"{path} holds files of several kinds ({', '.join(kinds)}): name one, {path}/*.KIND.")
        return found
    if not _reader(path):
        raise InputError(
            f"Cannot read {source!r}: use 'wordnet', 'tfds:NAME:FIELD', a folder, or files ending in "
            f"{', '.join(_READERS)}."
        )
    found = [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(str(path))) if os.path.isfile(file)]
    if not found:
        raise InputError(f"There is no file {path}: check the path.")
    return found


def _lines(raw: BinaryIO, path: Path) -> Iterator[str]:
    """Lines without their ends."""
    packed: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
    with io.TextIOWrapper(packed, encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            if "\0" in line:
                raise InputError(f"{path} is not a text file (it holds zero bytes): give UTF-8 text, one a line.")
            yield line.removesuffix("\n").removesuffix("\r")


def _full_lines(raw: BinaryIO, path: Path) -> Iterator[str]:
    """Lines that aren't blank."""
    return filter(str.strip, _lines(raw, path))


def _read_jsonl(raw: BinaryIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(_full_lines(raw, path), 1):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deep")
            raise InputError(f"Record {number} of {path} is not JSON ({reason}): give one object a line.") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(
                f"Record {number} of {path} has no string field 'text': give lines like {{\"text\": ...}}."
            )
        yield next((record[name] for name in IDS if name in record), None), as_text(record["text"], str(path))


def _read_tsv(raw: BinaryIO, path: Path) -> Iterator[Record]:
    lines = _full_lines(raw, path)
    first = next(lines, "")
    header = first.split("\t")
    if "text" not in header:
        if len(header) != 2:
            raise InputError(
                f"{path} begins with a line of {len(header)} columns and no header: give id<TAB>text, or a header line "
                "with a column named text, such as DPR's id<TAB>text<TAB>title."
            )
        header, lines = ["id", "text"], itertools.chain([first], lines)
    if len(set(header)) < len(header):
        raise InputError(f"The header of {path} names a column twice ({', '.join(header)}): rename one.")
    rows: Iterator[list[str]] = (line.split("\t") for line in lines)
    if "title" in header:  # DPR's: written by a CSV library, where MSMARCO's quotation marks are just that
        rows = csv.reader((line.replace("\r", " ") + "\n" for line in lines), delimiter="\t")  # refuses a lone CR
    number, text = 0, header.index("text")
    try:
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise InputError(
                    f"Record {number} of {path} has {len(row)} columns, not {len(header)}: fix it or download it again."
                )
            yield next((row[header.index(name)] for name in IDS if name in header), None), row[text].strip()
    except csv.Error as error:
        raise InputError(f"Record {number + 1} of {path} is incomplete ({error}): close its quotation mark.") from error


def _read_parquet(raw: BinaryIO, path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(raw)
        if "text" not in file.schema_arrow.names:
            raise InputError(f"{path} has no column 'text' but {file.schema_arrow.names}: rename the one you mean.")
        ids = [name for name in IDS if name in file.schema_arrow.names][:1]
        for batch in file.iter_batches(columns=["text", *ids]):
            texts = batch.column("text").to_pylist()
            names = batch.column(ids[0]).to_pylist() if ids else [None] * len(texts)
            yield from ((name, as_text(x, str(path))) for name, x in zip(names, texts, strict=True) if x is not None)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({error}): write it again.") from error


_READERS: dict[str, Callable[[BinaryIO, Path], Iterator[Record]]] = {
    **dict.fromkeys((".txt", ".txt.gz"), lambda raw, path: ((None, line.strip()) for line in _full_lines(raw, path))),
    **dict.fromkeys((".jsonl", ".jsonl.gz"), _read_jsonl),
    **dict.fromkeys((".tsv", ".tsv.gz"), _read_tsv),
    ".parquet": _read_parquet,
}


def _reader(path: Path) -> Any:
    return next((reader for suffix, reader in _READERS.items() if path.name.endswith(suffix)), None)


def _open_tfds(source: str) -> Source:
    name, _, field = source.removeprefix("tfds:").rpartition(":")
    if not name or not field:
        raise InputError(
            f"{source!r} names no data set and field: write tfds:NAME:FIELD, as tfds:ag_news_subset:title."
        )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout may be read as JSON
            import tensorflow_datasets as tfds

            if os.path.isdir(name):
                records = tfds.builder_from_directory(name).as_data_source(split="train")
            else:
                records = tfds.data_source(name, split="train")
    except (ImportError, ValueError, OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"TFDS cannot open {name!r} ({reason}): install what it lacks or prepare it as file_format='array_record'."
        ) from error

    def read(opened: Source) -> Iterator[Record]:
        for i in range(len(records)):
            record = records[i]
            if field not in record:
                raise InputError(
                    f"TFDS data set {name!r} has no field {field!r} but {sorted(record)}: name one of these."
                )
            opened.position = (i + 1) * TFDS_TEXT_BYTES
            yield None, as_text(record[field], source)

    info = getattr(records, "dataset_info", None)
    files = sorted(Path(info.data_dir).iterdir()) if info else []
    return Source(tuple(files), len(records) * TFDS_TEXT_BYTES, read)


def as_text(value: Any, where: str) -> str:
    """A value as valid Unicode, as texts of all sources are."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # JSON can hold halves of characters
    raise InputError(f"{where} holds {type(value).__name__} where text was expected: choose a field of strings.")
