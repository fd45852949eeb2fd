"""A run's work directory: the config and inputs it belongs to, and its logs."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from v2t_jax.config import Config, from_dict, to_dict
from v2t_jax.embedders.base import EmbedderIdentity, check_identity
from v2t_jax.errors import InputError
from v2t_jax.interop.files import write_file
from v2t_jax.parallel import processes


def check_workdir(config: Config, workdir: Path) -> None:
    """Creates the work directory, or checks that the run in it can be resumed with this config."""
    if workdir == Path():
        raise InputError("The work directory is empty; give a folder of its own, such as --workdir runs/tiny.")
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return
        before = dict(_settings(to_dict(from_dict(Config, json.loads(file.read_text(encoding="utf-8"))))))
    except OSError as error:
        raise InputError(f"The work directory {workdir} can't be used ({error.strerror}); give another.") from error
    except (ValueError, InputError) as error:  # not JSON, not UTF-8, not a config
        raise InputError(f"{file} is damaged ({str(error).rstrip('.')}); give a new --workdir.") from error
    # What decides neither batches nor parameters may change. A stage may be lengthened, but not an inverter whose
    # corrector already trains on its hypotheses.
    free = ["mesh.", "evaluation.", "checkpoint.", "log_every_steps"]
    free += [f"api.{name}" for name in to_dict(config.api) if name not in ("model", "dimensions")]
    for i, stage in enumerate(config.stages):
        if not any((workdir / later / "checkpoints").exists() for later in config.stages[i + 1 :]):
            free.append(f"{stage}.num_steps")
    now = {name: value for name, value in _settings(to_dict(config)) if not name.startswith(tuple(free))}
    changed = [f"{name}={before[name]!r}, not {value!r}" for name, value in now.items() if before[name] != value]
    if changed:
        raise InputError(
            f"{workdir} holds a run of another config, with {'; '.join(changed)}: give a new --workdir, or the old "
            "values."
        )


def _settings(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its full name, such as inverter.optimizer.b1."""
    for name, value in values.items():
        yield from _settings(value, f"{above}{name}.") if isinstance(value, dict) else [(above + name, value)]


def claim_workdir(config: Config, workdir: Path, inputs: dict[str, Any]) -> None:
    """Writes the config and the hashes of its inputs to a new work directory, or compares them with those there."""
    file = workdir / "inputs.json"
    with processes.main_first("claimed the work directory") as here:
        if here:
            if file.exists():
                before = json.loads(file.read_text(encoding="utf-8"))
                # Work directories of earlier versions have no identity.
                if changed := [name for name in inputs if name != "identity" and before.get(name) != inputs[name]]:
                    raise InputError(
                        f"What the config names has changed since the run in {workdir} began (its "
                        f"{' and '.join(changed)}): bring the text and the embedder back, or give a new --workdir."
                    )
                identity = EmbedderIdentity(**inputs["identity"])
                check_identity(before.get("identity", {}), identity, f"The run in {workdir}")
            if not file.exists() or "identity" not in before:
                write_file(file, [(json.dumps(inputs, indent=2) + "\n").encode()])
            (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
            return
    try:
        first = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"This process doesn't see {file}, which process 0 wrote: put the --workdir on a file system that all "
            "hosts share."
        ) from error
    if other := [name for name in inputs if first.get(name) != inputs[name]]:
        raise InputError(
            f"This process reads another {' and '.join(other)} than process 0: give all hosts the same files."
        )


Log = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def open_log(file: Path, until: int) -> Iterator[Log]:
    """Gives a function that appends a JSON line, on process 0; elsewhere it writes nothing.

    Lines of steps after `until`, written after the checkpoint that the run resumes from, are dropped.
    """
    if not processes.is_main():
        file = Path(os.devnull)
    elif file.is_file():
        kept = []
        for line in file.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill may leave half a line
                if json.loads(line)["step"] <= until:
                    kept.append(line)
        write_file(file, kept)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", buffering=1) as opened:
        yield lambda record: print(json.dumps(record, ensure_ascii=False), file=opened)
