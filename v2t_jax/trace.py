"""A recovered text's way from the first guess to the last, for people."""

import difflib
from typing import Any

from rich.console import Console
from rich.markup import escape


def show_trace(found: Any, title: str) -> None:
    """Prints a text's way from the first guess to the last, with what changed in each step set off."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]{escape(title)}[/bold]")
    before: list[str] = []
    for step in found.trace:
        words = step.text.split()
        if words != before or step.step == 0:
            # Without colours, a word that went would look like one that came.
            text = _changed(before, words, show_removed=console.is_terminal and console.color_system is not None)
            console.print(f"  step {step.step:2d}  cosine {step.cosine:.4f}  {text}")
        before = words
    if found.reference is not None:
        verdict = f"{'recovered exactly' if found.exact_match else 'true text':<22}"
        style = "green" if found.exact_match else "bold"
        console.print(f"  [{style}]{verdict}[/{style}]  {escape(found.reference)}")


def _changed(before: list[str], after: list[str], show_removed: bool) -> str:
    """`after` with the words that `before` lacks in bold, those that went struck through."""
    if not before:
        return escape(" ".join(after))
    parts = []
    for kind, *bounds in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        old, new = escape(" ".join(before[slice(*bounds[:2])])), escape(" ".join(after[slice(*bounds[2:])]))
        if kind == "equal":
            parts.append(new)
            continue
        if old and show_removed:
            parts.append(f"[red strike]{old}[/red strike]")
        if new:
            parts.append(f"[bold yellow]{new}[/bold yellow]")
    return " ".join(parts)
