"""How fast this machine is (`v2t bench data|decode|train`), and what TPUs would do (`v2t bench aot`).

The comparison with PyTorch is not here: `python -m tests.oracle.compare`.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from v2t_jax.errors import check_whole


class Turn(NamedTuple):
    """Seconds of one call: elapsed, and processor time of all threads, which other programs disturb less."""

    wall: float
    cpu: float


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def turn(run: Callable[[], object]) -> Turn:
    """Times one call, which must return only when its work is done."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)


def report(name: str, rows: int, run: Callable[[], object], repeats: int, as_json: bool) -> None:
    """Calls `run` once to compile, then times `repeats` calls and prints medians and rows per second."""
    import jax

    def run_to_end() -> None:
        jax.block_until_ready(run())

    check_whole("repeats", repeats, 1)
    run_to_end()
    show(name, rows, [turn(run_to_end) for _ in range(repeats)], as_json)


def show(name: str, rows: int, turns: Sequence[Turn], as_json: bool) -> None:
    """Prints medians and rows per second: three lines of text, or one of JSON."""
    import jax

    wall, cpu = (statistics.median(times) for times in zip(*turns, strict=True))
    device, cores = jax.devices()[0].device_kind, num_cores()
    found: dict[str, Any] = {"name": name, "seconds": wall, "cpu_seconds": cpu, "rows_per_second": rows / wall}
    found |= {"device": device, "cores": cores, "jax": jax.__version__, "turns": turns}
    text = f"{wall:.3f} s (median of {len(turns)}), {rows / wall:.1f} rows/s, processor time {cpu:.2f} s"
    where = f"{device}, {cores} cores, jax {jax.__version__}"
    print(json.dumps(found) if as_json else f"{name}:\n  {text}\n  {where}")
