"""A recovered text's way from the first guess to the last, for people."""

import difflib
import io
import re
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# How words that went and words that came are marked: in colours, or as wdiff does.
COLOURS = ("[red strike]{}[/red strike]", "[bold yellow]{}[/bold yellow]")
BRACKETS = (escape("[-{}-]"), "{{+{}+}}")


def show_trace(found: Any, title: str, console: Console | None = None) -> None:
    """Prints a trace with what changed in each step set off."""
    console = console or Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]{escape(title)}[/bold]")
    marks = COLOURS if console.is_terminal and console.color_system else BRACKETS

    def row(head: str, text: str) -> None:
        if not console.is_terminal:
            return console.print(f"{head}  {text}")  # a line, however long
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(head, text)
        console.print(grid, soft_wrap=False)

    before: list[str] = []
    for step in found.trace:
        words = step.text.split()
        if words != before or step.step == 0:
            text = _changed(before, words, marks)
            row(f"  step {step.step:2d}  cosine {step.cosine:.4f}", text)
        before = words
    if found.confidence is not None:
        console.print(f"  probability that this is exact: {found.confidence:.1%}")
    if found.reference is not None:
        verdict, style = ("recovered exactly", "green") if found.exact_match else ("true text", "bold")
        row(f"  [{style}]{verdict:<22}[/{style}]", escape(found.reference))


def draw_trace(found: Any, title: str) -> str:
    """The same as a picture of a terminal, SVG."""
    looks: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor", "highlight": False, "width": 88}
    console = Console(record=True, file=io.StringIO(), **looks)
    show_trace(found, title, console)
    # rich names fonts on a server; a picture should need none.
    return re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="v2t"), flags=re.DOTALL)


def _changed(before: list[str], after: list[str], marks: tuple[str, str]) -> str:
    """`after`, with the words that went from `before` and those that came marked."""
    if not before:
        return escape(" ".join(after))
    parts = []
    for kind, *bounds in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old, new = escape(" ".join(before[slice(*bounds[:2])])), escape(" ".join(after[slice(*bounds[2:])]))
        changed = [mark.format(words) for mark, words in zip(marks, (old, new), strict=True) if words]
        parts += [new] if kind == "equal" else changed
    return " ".join(parts)
