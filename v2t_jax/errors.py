"""The one exception that is meant for the person at the keyboard."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence: what is wrong, what to do."""
