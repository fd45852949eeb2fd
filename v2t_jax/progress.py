"""Nobody waits in the dark: what a long job is doing and how far it is, on stderr.

Silent until `enable()` is called, which the command line does and a library user may. On a terminal there is
one live display, shared by everything that is nested or running side by side; elsewhere (a log, CI) there are
plain lines, seconds apart. What takes less than a second leaves no trace. Stdout is never touched.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

QUIET_SECONDS = 1.0  # shorter work is not worth a line
LINE_SECONDS = 5.0  # plain lines of one job are at least this far apart
RATE_SECONDS = 20.0  # the rate is that of the last so many seconds: the first batch waits for the compiler

Field = float | int | str
_clock: Callable[[], float] = time.monotonic


class Update(Protocol):
    """What `bar` yields: `update(done, cosine=0.9)` says how much is done in all, and what else to show."""

    def __call__(self, done: int, **fields: Field) -> None: ...


def enable(stream: TextIO | None = None) -> None:
    """Show progress from now on.

    Args:
        stream: where to; by default stderr. A terminal gets a live display, anything else plain lines.
    """
    global _display
    _display = _Display(stream or sys.stderr)


def disable() -> None:
    """Be silent again, as before `enable()`."""
    global _display
    _display = None


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Say that `text` ("loading the embedder") is going on while the block runs, and how long it took."""
    with _show(_Job(text)):
        yield


@contextmanager
def bar(total: int | None, text: str, unit: str = "items", start: int = 0) -> Iterator[Update]:
    """Show how far a countable job is: done, rate, time left and the latest extra fields.

    Args:
        total: how many there are in all; None where nobody knows.
        text: what is going on ("embedding").
        unit: what is counted ("texts").
        start: how many were done before, for a job that is resumed: they don't count for the rate.

    Yields:
        `update(done, **fields)`: `done` is the count so far, not the increment.
    """
    job = _Job(text, total=total, unit=unit, done=start, counted=True)
    with _show(job) as changed:

        def update(done: int, **fields: Field) -> None:
            job.advance(done, fields)
            changed()

        yield update


def note(text: str) -> None:
    """One line on stderr, whole and at once, above whatever is live; nothing unless enabled."""
    if _display is not None:
        _display.line(text)


@dataclass
class _Job:
    """One thing that is going on. Stages count nothing; bars count `done` out of `total`."""

    text: str
    total: int | None = None
    unit: str = ""
    done: int = 0
    counted: bool = False
    fields: dict[str, Field] = field(default_factory=dict)
    began: float = field(default_factory=lambda: _clock())
    first: int = field(init=False)
    recent: deque[tuple[float, int]] = field(init=False)  # (time, done), oldest first

    def __post_init__(self) -> None:
        self.first = self.done
        self.recent = deque([(self.began, self.done)])

    def advance(self, done: int, fields: dict[str, Field]) -> None:
        now = _clock()
        self.done = done
        self.fields.update(fields)
        self.recent.append((now, done))
        # Two points always stay, however far apart: slow jobs have a rate too.
        while len(self.recent) > 2 and now - self.recent[0][0] > RATE_SECONDS:
            self.recent.popleft()

    @property
    def elapsed(self) -> float:
        return _clock() - self.began

    def rate(self, overall: bool = False) -> float | None:
        """Units a second, lately or over the whole job; None where nothing has been counted yet."""
        (then, before), (now, done) = self.recent[0], self.recent[-1]
        if overall:
            then, before, now = self.began, self.first, _clock()
        return (done - before) / (now - then) if done > before and now > then else None

    def status(self, finished: bool = False) -> str:
        """Everything worth saying beside the name, such as `120/500 texts · 29.3 texts/s · 0:13 left`."""
        if not self.counted:
            return _duration(self.elapsed)
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        parts = [f"{count} {self.unit}"]
        rate = self.rate(overall=finished)
        if rate is not None:
            parts.append(f"{rate:,.1f} {self.unit}/s" if rate < 1000 else f"{rate:,.0f} {self.unit}/s")
            if self.total is not None and not finished:
                parts.append(f"{_duration(max(self.total - self.done, 0) / rate)} left")
        if finished:
            parts.append(_duration(self.elapsed))
        parts += [f"{name.replace('_', ' ')} {_value(value)}" for name, value in self.fields.items()]
        return " · ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _value(value: Field) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


class _Bar(ProgressColumn):
    """A bar for what has a total, nothing for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = BarColumn(bar_width=24)

    def render(self, task: Task) -> RenderableType:
        return self._bar.render(task) if task.total else Text()


class _Status(ProgressColumn):
    """A job's status as a column."""

    def render(self, task: Task) -> RenderableType:
        job: _Job = task.fields["job"]
        return Text(job.status())


class _Display:
    """Where progress goes: one live display on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.RLock()
        self._live: Progress | None = None
        if stream.isatty() and os.environ.get("TERM") != "dumb":
            console = Console(stderr=True) if stream is sys.stderr else Console(file=stream)
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                _Bar(),
                _Status(),
                console=console,
                transient=True,
                redirect_stdout=False,  # stdout may be a pipe that expects JSON
                refresh_per_second=8,
            )

    def line(self, text: str) -> None:
        with self._lock:
            if self._live is not None:
                self._live.console.print(Text(text))
            else:
                self._stream.write(text + "\n")
                self._stream.flush()

    @contextmanager
    def show(self, job: _Job) -> Iterator[Callable[[], None]]:
        with self._show_live(job) if self._live is not None else self._show_plain(job) as changed:
            yield changed
        if job.elapsed >= QUIET_SECONDS:
            self.line(f"{job.text}: {job.status(finished=True)}")

    @contextmanager
    def _show_live(self, job: _Job) -> Iterator[Callable[[], None]]:
        assert self._live is not None
        live = self._live
        with self._lock:
            task = live.add_task(job.text, total=job.total, completed=job.done, job=job)
            live.start()
        try:
            yield lambda: live.update(task, completed=job.done)
        finally:
            with self._lock:
                live.remove_task(task)
                if not live.tasks:
                    live.stop()

    @contextmanager
    def _show_plain(self, job: _Job) -> Iterator[Callable[[], None]]:
        said = job.began

        def say() -> None:
            nonlocal said
            said = _clock()
            self.line(f"{job.text}: {job.status()}" if job.done != job.first else f"{job.text} ...")

        def changed() -> None:
            if _clock() - said >= LINE_SECONDS and job.done != job.total:  # the end has a line of its own
                say()

        # Whoever waits is told after a second what for, even where nothing is counted, or not yet.
        timer = threading.Timer(QUIET_SECONDS, say)
        timer.daemon = True
        timer.start()
        try:
            yield changed
        finally:
            timer.cancel()
            timer.join()  # or its line could come after the last one


_display: _Display | None = None


@contextmanager
def _show(job: _Job) -> Iterator[Callable[[], None]]:
    if _display is None:
        yield lambda: None
        return
    with _display.show(job) as changed:
        yield changed
