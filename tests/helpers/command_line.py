"""`v2t ARGUMENTS` in this process."""

import sys

import pytest

from v2t_jax.cli import main as cli


def status_of(*arguments: str) -> int:
    """Runs the command; returns the status with which it ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["v2t", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0
