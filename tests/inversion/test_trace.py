"""How a trace is shown."""

import io

import pytest
from rich.console import Console

from v2t_jax.inversion import trace
from v2t_jax.inversion.api import InversionResult, TraceStep


def test_changed_words_are_set_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    steps = (TraceStep(0, "a [red] cat", 0.5), TraceStep(1, "a [red] cat", 0.5), TraceStep(2, "a blue cat", 1.0))
    console = Console(force_terminal=True, highlight=False, soft_wrap=True)
    monkeypatch.setattr(trace, "Console", lambda **_: console)
    trace.show_trace(InversionResult("a blue cat", 1.0, 2, steps, "a blue cat", True), "1 of 1")
    out = capsys.readouterr().out
    assert "\x1b[9;31m[red]\x1b[0m \x1b[1;33mblue\x1b[0m cat" in out and "recovered exactly" in out
    assert "step  0  cosine 0.5000  a [red] cat\n" in out and "step  1" not in out  # nothing changed
    monkeypatch.setattr(trace, "Console", lambda **_: Console(force_terminal=False, soft_wrap=True))
    trace.show_trace(InversionResult("a blue cat", 1.0, 2, steps, "a blue cat", True), "1 of 1")
    assert "step  2  cosine 1.0000  a [-[red]-] {+blue+} cat\n" in capsys.readouterr().out


def test_long_texts_are_folded_beside_their_steps_on_a_terminal_only() -> None:
    words = [f"word{i}" for i in range(40)]
    found = InversionResult(" ".join(words), 1.0, 0, (TraceStep(0, " ".join(words), 1.0),), " ".join(words), True)
    for terminal in (True, False):
        out = io.StringIO()
        looks = {"force_terminal": terminal, "no_color": True, "soft_wrap": True, "width": 80, "highlight": False}
        trace.show_trace(found, "1 of 1", Console(file=out, **looks))
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        assert lines[2].startswith("  step  0  cosine 1.0000  word0 word1 ")
        if terminal:
            assert max(map(len, lines)) <= 80 and lines[3].startswith(" " * 26 + "word")
        else:
            assert lines[2].endswith(words[-1]) and len(lines) == 4


def test_a_trace_as_a_picture_needs_no_server() -> None:
    steps = (TraceStep(0, "a red cat", 0.5), TraceStep(1, "a <blue> cat", 1.0))
    svg = trace.draw_trace(InversionResult("a <blue> cat", 1.0, 1, steps, "a <blue> cat", True), "one text")
    assert svg.startswith("<svg") and "&lt;blue&gt;" in svg and "line-through" in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")
