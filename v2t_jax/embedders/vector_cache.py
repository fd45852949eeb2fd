"""Vectors on disk by the sha256 of their texts: what was paid for survives the process."""

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from v2t_jax.errors import InputError

BUSY_SECONDS = 60.0  # another process may be writing


class VectorCache:
    """A SQLite file of one embedder's vectors, shared by threads and processes; what `write` wrote is safe."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        with self._errors():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = sqlite3.connect(file, timeout=BUSY_SECONDS, check_same_thread=False)
            columns = "sha256 BLOB PRIMARY KEY, float32 BLOB NOT NULL"
            self._connection.execute(f"CREATE TABLE IF NOT EXISTS vectors ({columns})")

    def read(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The vectors [E] of those texts that are known."""
        query = "SELECT float32 FROM vectors WHERE sha256 = ?"
        with self._lock, self._errors():
            rows = {text: self._connection.execute(query, [_key(text)]).fetchone() for text in texts}
            return {text: np.frombuffer(row[0], "<f4").astype(np.float32) for text, row in rows.items() if row}

    def write(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Stores vectors [len(texts), E], all or none."""
        rows = [(_key(text), vector.astype("<f4").tobytes()) for text, vector in zip(texts, vectors, strict=True)]
        with self._lock, self._errors(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:  # the last two: a blob that isn't a vector
            ways = "free space, set api.cache, or, if it is damaged, delete it"
            raise InputError(f"The cache {self._file} can't be used ({error}); {ways}.") from error


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
