"""Kills a program again and again, at moments that a seed decides, until it has been killed often enough."""

import contextlib
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

KINDS = (signal.SIGKILL, signal.SIGTERM)


class Kill(NamedTuple):
    """What became of one start of the program."""

    signal: int
    status: int  # as subprocess gives it: -9 after SIGKILL
    output: str  # stdout and stderr
    seconds: float  # it had run


def soak(
    command: Sequence[str],
    kills: int,
    seed: int,
    working: Callable[[], object],
    within: float = 2.0,
    timeout: float = 300.0,
    cwd: Path | None = None,
) -> list[Kill]:
    """Starts `command` and kills it, `kills` times; then lets it end.

    Half the kills come at any moment from its start on, half once it is at work; SIGKILL and SIGTERM take turns by
    chance. The program must end with 0 on SIGTERM, and be long enough to be killed so often.

    Args:
        working: changes its value once the program has begun to change something on disk.
        within: seconds after that, or after the start, in which a kill falls.

    Raises:
        AssertionError: the program ended by itself too early or in another way.
    """
    rng, done = random.Random(seed), []
    for _ in range(kills):
        before, began = working(), time.monotonic()
        kind, at_work, delay = rng.choice(KINDS), rng.random() < 0.5, rng.uniform(0, within)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)
        while at_work and working() == before and process.poll() is None and time.monotonic() - began < timeout:
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        assert process.poll() is None, f"it ended by itself: {process.communicate()[0]}"
        process.send_signal(kind)
        output, _ = process.communicate(timeout=timeout)
        done.append(Kill(kind, process.returncode, output, time.monotonic() - began))
        expected = (-signal.SIGKILL,) if kind == signal.SIGKILL else (0, -signal.SIGTERM)  # -15: before it listens
        assert process.returncode in expected, f"after {kind.name} it ended with {process.returncode}: {output}"
    last = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, timeout=timeout
    )
    assert last.returncode == 0, last.stdout
    return done
