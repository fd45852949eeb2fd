"""Reads the pickles that some stores keep points and ids in, and runs nothing that they name.

A pickle calls any function that it names. Here a name is known or refused; a known class is a record without code of
its own. The unpickler is Python's own in Python: that in C can be made to ask for any amount of memory.
"""

import io
import pickle
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from v2t_jax.errors import InputError


class Record:
    """What a pickled object holds, by the names of its attributes."""

    def __setstate__(self, state: Any) -> None:
        self.values = dict(state.get("__dict__", state))  # as pydantic's models have it, or plain


_HARMLESS = {"uuid.UUID": UUID, "datetime.datetime": datetime}


class _Unpickler(pickle._Unpickler):
    def __init__(self, content: bytes, path: str, classes: Iterable[str]) -> None:
        super().__init__(io.BytesIO(content))
        self._path, self._known = path, dict.fromkeys(classes, Record) | _HARMLESS

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._known:
            raise InputError(
                f"{self._path} holds a pickle that refers to {module}.{name}, which such a store never does; "
                "nothing of it was run: find out who wrote it."
            )
        return self._known[f"{module}.{name}"]


def unpickled(content: bytes, path: str, classes: Iterable[str] = ()) -> Any:
    """The object of a pickle, those of `classes` (their full names) as `Record`s.

    Raises:
        InputError: a name that isn't known, or damage.
    """
    try:
        return _Unpickler(content, path, classes).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        gist = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise InputError(f"{path} holds a damaged pickle ({gist}); copy the store again.") from error
