"""What readers share: getting a library, choosing a collection, staying in the folder, naming damage, finding texts."""

import importlib
import os
import re
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from v2t_jax.data.vector_file import TEXTS, VECTORS, Rows, VectorFile, of_rows, plain
from v2t_jax.errors import InputError
from v2t_jax.stores.base import Store

ROWS = 1024  # that are read at a time


def library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'Reading this store needs {name}; run pip install "v2t_jax[{extra}]".') from error


def chosen(path: str, found: Mapping[str, Sequence[str]], given: str) -> tuple[str, str]:
    """The collection and its field of vectors, by NAME, NAME:FIELD or as the only ones; `found` has the fields."""
    found = {name: fields for name, fields in found.items() if fields}
    listed = ", ".join(sorted(found))
    if not found:
        raise InputError(f"{path} holds no collection of vectors; give a store that has one.")
    if not given and len(found) > 1:
        raise InputError(f"{path} holds {len(found)} collections ({listed}); name one with --collection.")
    name, field = (given or listed, "") if given in found or not given else given.rpartition(":")[::2]
    if name not in found:
        raise InputError(f"{path} has no collection {given!r}; name one of {listed} with --collection.")
    fields = found[name]
    known = [one for one in VECTORS if one in fields]
    if field not in fields and (field or (len(fields) > 1 and not known)):
        listed = ", ".join(fields)
        raise InputError(f"{path} has several vectors in {name} ({listed}); pass --collection {name}:{fields[0]}.")
    return name, field or (fields[0] if len(fields) == 1 else known[0])


def inside(folder: Path, *names: str) -> Path:
    """A path in a store's folder, which no name or symbolic link may leave."""
    path = folder.joinpath(*names)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder} refers to a file outside of it ({path}); copy the store with all its files.")
    return path


def check_links(folder: Path) -> None:
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(os.path.join(at, name)):
                inside(folder, os.path.relpath(os.path.join(at, name), folder))


# What reading damaged content raises, in Python and in SQLite.
_DAMAGE: tuple[type[Exception], ...] = (
    *(sqlite3.Error, struct.error, OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError),
    *(NotImplementedError, RecursionError, MemoryError),
)


@contextmanager
def faults_named(path: str, *kinds: type[Exception]) -> Iterator[None]:
    """Damage, and what else a store's library raises, as one sentence."""
    try:
        yield
    except InputError:
        raise
    except kinds + _DAMAGE as error:
        why = " ".join(str(error).split())[:200]
        if re.search(r"\block(ed)?\b", why, re.IGNORECASE):
            raise InputError(f"{path} is locked by another program ({why}); close that, or give a copy.") from error
        advice = "check its address, and who may read it" if "://" in path else "check it, or copy it again"
        raise InputError(f"{path} can't be read ({why}); {advice}.") from error


def opened(
    kind: str,
    path: str,
    collection: tuple[str, str],
    count: int | None,
    read: Callable[[int], Iterator[Rows]],
    faults: Sequence[type[Exception]] = (),
    **about: Any,
) -> Store:
    """A store, of which the first rows were read."""

    def guarded(start: int) -> Iterator[Rows]:
        with faults_named(path, *faults):
            yield from read(start)

    rows = VectorFile(path, count, guarded, ":".join(filter(None, collection)) or None)
    first = next(rows.batches(1), None)
    if first is None:
        raise InputError(f"{path} holds no vectors{f' in {collection[0]}' * bool(collection[0])}; give one that does.")
    return Store(kind, rows, first.vectors.shape[1], collection=collection[0], **about)


def vectors_of(path: str, rows: list[Any], first: int, width: int = 0) -> np.ndarray:
    """Vectors [n, E] of lists of numbers, NaN where one is missing."""
    return of_rows(path, [[np.nan] * width if row is None and width else row for row in rows], first)


def beside(records: Iterable[Mapping[str, Any]]) -> tuple[list[str | None], list[dict[str, Any]]]:
    """The texts of records, and what else can be read in them."""
    texts: list[str | None] = []
    metadata = [*map(plain, records)]
    for values in metadata:
        name = next((name for name in TEXTS if isinstance(values.get(name), str)), None)
        texts.append(None if name is None else values.pop(name))
    return texts, metadata
