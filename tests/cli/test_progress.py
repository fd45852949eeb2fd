"""Progress on stderr: silent unless asked for, one live display on a terminal, few plain lines elsewhere."""

import io
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from v2t_jax import progress


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Progress enabled into a plain log, with its seconds cut to hundredths."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    stream = io.StringIO()
    progress.enable(stream)
    yield stream
    progress.disable()


def test_silent_until_enabled(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.stage("loading"), progress.bar(2, "embedding", unit="texts") as update:
        update(2, cosine=0.9)
    progress.note("hello")
    assert capfd.readouterr() == ("", "")


def test_short_work_leaves_no_trace(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 60.0)
    with progress.stage("loading"), progress.bar(2, "embedding") as update:
        update(2)
    assert log.getvalue() == ""


def test_a_long_stage_says_so_while_it_lasts_and_how_long_it_took(log: io.StringIO) -> None:
    with progress.stage("loading the embedder"):
        deadline = time.monotonic() + 10
        while not log.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert log.getvalue() == "loading the embedder ...\n"
    assert log.getvalue().splitlines()[1].startswith("loading the embedder: 0.")


def test_a_bar_shows_count_rate_and_fields_in_few_lines(log: io.StringIO) -> None:
    with progress.bar(100, "embedding", unit="texts") as update:
        for done in range(1, 101):
            time.sleep(0.002)
            update(done, cosine=done / 128, best_so_far=1234, phase="warm")
    *middle, last = log.getvalue().splitlines()
    assert 1 <= len(middle) < 40  # 100 updates
    assert all(line.startswith("embedding") and "left" in line for line in middle if not line.endswith("..."))
    assert last.startswith("embedding: 100/100 texts · ")
    assert last.endswith("cosine 0.7812 · best so far 1,234 · phase warm")
    assert "texts/s" in last and "left" not in last


def test_what_was_done_before_a_resume_does_not_count_for_the_rate(log: io.StringIO) -> None:
    with progress.bar(1000, "training", unit="steps", start=900) as update:
        for done in range(901, 1001):
            time.sleep(0.002)
            update(done)
    *middle, last = log.getvalue().splitlines()
    rates = [float(line.split(" · ")[1].removesuffix(" steps/s").replace(",", "")) for line in (*middle[1:], last)]
    assert last.startswith("training: 1,000/1,000 steps · ") and max(rates) <= 500  # a step takes 2 ms or more


def test_an_unknown_total(log: io.StringIO) -> None:
    with progress.bar(None, "reading", unit="lines") as update:
        time.sleep(0.03)
        update(7)
    assert log.getvalue().splitlines()[-1].startswith("reading: 7 lines · ")


def test_an_error_passes_through_and_claims_no_success(log: io.StringIO) -> None:
    with pytest.raises(ValueError, match="boom"), progress.stage("loading"):
        time.sleep(0.05)
        raise ValueError("boom")
    assert "loading:" not in log.getvalue()


def test_stdout_is_never_touched(log: io.StringIO, capfd: pytest.CaptureFixture[str]) -> None:
    with progress.stage("loading"):
        time.sleep(0.05)
        progress.note("a note [with brackets]")
        print("{}")
    assert capfd.readouterr().out == "{}\n"
    assert "a note [with brackets]\n" in log.getvalue()


TERMINAL_SCRIPT = """
import time
from v2t_jax import progress
progress.QUIET_SECONDS = 0.05
progress.enable()
with progress.stage("loading [x]"), progress.bar(3, "embedding", unit="texts") as update:
    for done in (1, 2, 3):
        time.sleep(0.15)
        update(done, cosine=0.5)
    progress.note("a note")
    print('{"out": 1}')
with progress.stage("again"):
    time.sleep(0.1)
"""


def test_a_terminal_gets_one_live_display_and_a_line_for_each_finished_job() -> None:
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-c", TERMINAL_SCRIPT], stdout=subprocess.PIPE, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:
        pass  # Linux says EIO when the other side has closed
    assert process.stdout is not None
    out = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0, shown.decode()
    os.close(master)
    text = shown.decode()
    assert out == b'{"out": 1}\n'
    for line in ("a note\r\n", "embedding: 3/3 texts · ", "loading [x]: 0.", "again: 0.1"):
        assert line in text, text
    assert "━" in text, text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2, text  # hides the cursor, and gives it back
