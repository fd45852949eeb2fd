"""Vectors on disk by the sha256 of their texts: what was paid for stays, whatever happens to the process."""

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from v2t_jax.errors import InputError

MOST_ASKED = 500  # keys in one statement; SQLite takes 999 at least
BUSY_SECONDS = 60.0  # another process may be writing


class VectorCache:
    """A SQLite file of one embedder's vectors. Its threads may share it, and processes the file.

    SQLite's own defaults are kept: a write is on the disk, whole, when `write` returns, even on network drives, and one
    that was cut off is undone when the file is next opened.

    Raises (all methods):
        InputError: the file can't be read or written, or is damaged.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        with self._explained():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = sqlite3.connect(file, timeout=BUSY_SECONDS, check_same_thread=False)
        try:
            with self._explained(), self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS vectors (sha256 BLOB PRIMARY KEY, float32 BLOB NOT NULL)"
                )
        except InputError:
            self._connection.close()
            raise

    def read(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """The vector [E] of each text, None where there is none."""
        keys = [_key(text) for text in texts]
        found: dict[bytes, np.ndarray] = {}
        with self._lock, self._explained():
            for start in range(0, len(keys), MOST_ASKED):
                some = keys[start : start + MOST_ASKED]
                marks = ",".join("?" * len(some))
                for key, blob in self._connection.execute(
                    f"SELECT sha256, float32 FROM vectors WHERE sha256 IN ({marks})", some
                ):
                    found[key] = np.frombuffer(blob, "<f4").astype(np.float32)
        return [found.get(key) for key in keys]

    def write(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Keeps vectors [len(texts), E], all or none."""
        rows = [(_key(text), vector.astype("<f4").tobytes()) for text, vector in zip(texts, vectors, strict=True)]
        with self._lock, self._explained(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # no space, no permission, locked
            raise InputError(
                f"The cache {self._file} can't be used ({error}); free space or name another folder."
            ) from error
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:  # the latter two from what isn't a vector
            raise InputError(f"The cache {self._file} is damaged ({error}); delete it, or restore it.") from error
        except OSError as error:
            raise InputError(
                f"The cache {self._file} can't be made ({error.strerror}); name another folder."
            ) from error


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
