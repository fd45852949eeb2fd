"""Opens SQLite files without a byte written: one that was left amid a write is read on a copy."""

import shutil
import sqlite3
import tempfile
import weakref
from pathlib import Path
from urllib.parse import quote


class _Connection(sqlite3.Connection):
    def __del__(self) -> None:
        self.close()


def connect(path: Path) -> sqlite3.Connection:
    """A connection that can only read; what the file's own views and triggers name is not trusted."""
    logs = [path.with_name(path.name + ending) for ending in ("-wal", "-journal")]
    with path.open("rb") as file:
        logged = file.read(20)[18:] == b"\2\2"
    # Of a file with a write-ahead log SQLite writes an index of the log beside it, unless it is immutable.
    target, mode, folder = path, "ro&immutable=1" if logged else "ro", None
    if left := [log for log in logs if log.exists() and log.stat().st_size]:
        folder = tempfile.TemporaryDirectory(prefix="v2t-store-")
        target, mode = Path(folder.name) / path.name, "rw"
        for source in (path, *left):
            shutil.copyfile(source, target.with_name(source.name))
    uri = f"file:{quote(str(target.resolve()))}?mode={mode}"
    db = sqlite3.connect(uri, uri=True, timeout=1, check_same_thread=False, factory=_Connection)
    if folder is not None:
        weakref.finalize(db, folder.cleanup)
    db.execute("PRAGMA trusted_schema=OFF")
    db.execute("SELECT count(*) FROM sqlite_master")  # or a lock, or damage, would show later
    return db
