"""Progress on stderr, silent until `enable()`: rich's live display on a terminal, elsewhere a line now and then."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

QUIET_SECONDS = 1.0  # shorter work leaves no trace
LINE_SECONDS = 5.0  # least time between two plain lines of a job
FORMATS = {float: ".4g", int: ","}

_display: Progress | None = None


def enable(stream: TextIO | None = None) -> None:
    """Shows progress from now on, on `stream` or else on stderr."""
    global _display
    console = Console(stderr=True) if stream is None else Console(file=stream)
    name, status = (TextColumn(f"{{task.{text}}}", markup=False) for text in ("description", "fields[status]"))
    plain = not console.is_interactive
    columns = name, BarColumn(24), TimeElapsedColumn(), status
    _display = Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=plain)


def disable() -> None:
    global _display
    _display = None


def on_terminal() -> bool:
    """Whether progress is enabled and shown live."""
    return _display is not None and not _display.disable


def note(text: str) -> None:
    """Prints one line above the live display."""
    if _display is not None:
        _display.console.print(Text(text), soft_wrap=True)


def stage(text: str) -> AbstractContextManager[Callable[..., None]]:
    """Shows that `text` ("loading the embedder") is going on while the block runs, and how long it took."""
    return bar(None, text, unit="")


@contextmanager
def bar(total: int | None, text: str, unit: str = "items", start: int = 0) -> Iterator[Callable[..., None]]:
    """Yields `update(done, cosine=0.9)`, to show count, rate, time left and the like; a resumed job has a `start`."""
    if (display := _display) is None:
        yield lambda done, **fields: None
        return
    number = display.add_task(text, total=total, completed=start, unit=unit, start_at=start, shown={}, status="")
    task = next(task for task in display.tasks if task.id == number)
    display.start()
    printed = task.get_time()

    def line() -> None:
        nonlocal printed
        printed = task.get_time()
        if display.disable:
            note(f"{text}: {task.fields['status']}" if task.completed > start else f"{text} ...")

    def update(done: int, **fields: float | int | str) -> None:
        display.update(number, completed=done, shown=task.fields["shown"] | fields)
        display.update(number, status=_status(task))
        if task.get_time() - printed > LINE_SECONDS and done != total:
            line()

    first = threading.Timer(QUIET_SECONDS, line)
    first.daemon = True
    first.start()
    try:
        yield update
    finally:
        first.cancel()
        first.join()  # or its line could come after the last one
        display.remove_task(number)
        if not display.tasks and not display.disable:
            display.stop()
    if task.get_time() - (task.start_time or 0) >= QUIET_SECONDS:
        note(f"{text}: {_status(task, finished=True)}")


def _status(task: Task, finished: bool = False) -> str:
    """Such as `120/500 texts · 29.3 texts/s · 0:00:13 left · cosine 0.9`."""
    unit, start, shown = (task.fields[name] for name in ("unit", "start_at", "shown"))
    elapsed = task.get_time() - (task.start_time or 0)
    took = f"{elapsed:.1f} s" if elapsed < 60 else str(timedelta(seconds=round(elapsed)))
    if not unit:
        return took
    parts = [f"{task.completed:,.0f}{'' if task.total is None else f'/{task.total:,.0f}'} {unit}"]
    if rate := (task.completed - start) / elapsed if finished else task.speed:
        parts.append(f"{rate:,.1f} {unit}/s")
    if finished or task.time_remaining is not None:
        parts.append(took if finished else f"{timedelta(seconds=task.time_remaining or 0)} left")
    parts += [f"{k.replace('_', ' ')} {v:{FORMATS.get(type(v), '')}}" for k, v in shown.items()]
    return " · ".join(parts)
