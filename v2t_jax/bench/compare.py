"""Two documents of `v2t bench ... --json` side by side: `v2t bench compare`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import mannwhitneyu

from v2t_jax.errors import InputError

SIGNIFICANT = 0.05  # a difference that chance makes less often than this is one


class Change(NamedTuple):
    """A measurement that both documents have."""

    name: str
    before: float  # seconds, median
    after: float
    speedup: float  # before / after
    distinct: bool  # the turns differ by more than their spread: two-sided Mann-Whitney test


def read_document(file: Path) -> dict[str, Any]:
    """What `v2t bench ... --json` printed."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = {row["name"]: (row["seconds"], [turn["wall"] for turn in row["turns"]]) for row in found["rows"]}
    except OSError as error:
        raise InputError(f"{file} can't be read ({error.strerror}); give a file with what --json printed.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no document of v2t bench; give a file with what --json printed.") from error
    return found | {"rows": rows}


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The measurements that two documents of `read_document` share, in the order of the first."""
    found = []
    for name, (seconds, turns) in before["rows"].items():
        if name in after["rows"]:
            now, others = after["rows"][name]
            distinct = mannwhitneyu(turns, others).pvalue < SIGNIFICANT  # never, of fewer than four turns each
            found.append(Change(name, seconds, now, seconds / now, bool(distinct)))
    if not found:
        raise InputError("The documents have no measurement in common; measure the same things, at the same sizes.")
    return found
