"""The one exception that is meant for the person at the keyboard, and the check that all ways in share."""

from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence: what is wrong, what to do."""


def check_texts(texts: Sequence[str], what: str = "Text") -> None:
    """Refuses texts that can't be embedded.

    Raises:
        InputError: a text is blank, or holds bytes that are no text.
    """
    for i, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"{what} {i + 1} of {len(texts)} is empty; leave it out or give it words.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # bytes of another encoding come from a command line as lone surrogates
            raise InputError(f"{what} {i + 1} of {len(texts)} is not valid Unicode; give it as UTF-8.") from None
