"""A run's work directory: the config and inputs it belongs to, and its logs."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from v2t_jax.config import ApiConfig, Config, from_dict, to_dict
from v2t_jax.embedders.base import EmbedderIdentity, check_identity
from v2t_jax.errors import InputError
from v2t_jax.parallel import processes


def check_workdir(config: Config, workdir: Path) -> None:
    """Creates the work directory, or checks that the run in it can be resumed with this config.

    Raises:
        InputError: it holds a run of another config, it can't be written, or its config.json is damaged.
    """
    if workdir == Path():
        raise InputError("The work directory is empty; give a folder of its own, such as --workdir runs/tiny.")
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return
        before = _flat(from_dict(Config, json.loads(file.read_text(encoding="utf-8"))))
    except OSError as error:
        raise InputError(f"The work directory {workdir} can't be used ({error.strerror}); give another.") from error
    except (ValueError, InputError) as error:  # not JSON, not UTF-8, not a config
        raise InputError(f"{file} is damaged ({str(error).rstrip('.')}); give a new --workdir.") from error
    now, free = _flat(config), _free_fields(config, workdir)
    changed = [f"{name}={before[name]!r}, not {now[name]!r}" for name in now if before[name] != now[name]]
    changed = [change for change in changed if not change.startswith(free)]
    if changed:
        raise InputError(
            f"{workdir} holds a run of another config, with {'; '.join(changed)}: give a new --workdir, or the old "
            "values."
        )


def _flat(config: Config) -> dict[str, Any]:
    """Every setting by its full name, such as inverter.optimizer.b1."""

    def walk(values: dict[str, Any], above: str) -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            yield from walk(value, f"{above}{name}.") if isinstance(value, dict) else [(above + name, value)]

    return dict(walk(to_dict(config), ""))


def _free_fields(config: Config, workdir: Path) -> tuple[str, ...]:
    """Beginnings of settings that may change when a run is resumed: they decide neither batches nor parameters."""
    api = [f"api.{field.name}=" for field in dataclasses.fields(ApiConfig) if field.name not in ("model", "dimensions")]
    # A stage may be lengthened, but not an inverter whose corrector already trains on its hypotheses.
    stages = [
        f"{stage}.num_steps="
        for i, stage in enumerate(config.stages)
        if not any((workdir / later / "checkpoints").exists() for later in config.stages[i + 1 :])
    ]
    return ("mesh.", "evaluation.", "checkpoint.", "log_every_steps=", *api, *stages)


def claim_workdir(config: Config, workdir: Path, inputs: dict[str, Any]) -> None:
    """Writes the config and the hashes of its inputs to a new work directory, or compares them with those there.

    Checkpoints are valid only with the embedder, vocabulary and texts that they were trained on.

    Args:
        inputs: a hash of each.
    Raises:
        InputError: a source or the embedder has changed since the run began.
    """
    file = workdir / "inputs.json"
    with processes.main_first("claimed the work directory") as here:
        if here:
            _claim(config, workdir, inputs)
    if not here:
        _check_shared(file, inputs)


def _claim(config: Config, workdir: Path, inputs: dict[str, Any]) -> None:
    file = workdir / "inputs.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        # Work directories of earlier versions have no identity.
        changed = [name for name in inputs if name != "identity" and before.get(name) != inputs[name]]
        if changed:
            raise InputError(
                f"What the config names has changed since the run in {workdir} began (its {' and '.join(changed)}): "
                "bring the text and the embedder back, or give a new --workdir."
            )
        check_identity(before.get("identity", {}), EmbedderIdentity(**inputs["identity"]), f"The run in {workdir}")
    else:
        file.write_text(json.dumps(inputs, indent=2) + "\n")
    (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")


def _check_shared(file: Path, inputs: dict[str, Any]) -> None:
    """Checks that this process sees process 0's file, and has read the same inputs."""
    try:
        first = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"This process doesn't see {file}, which process 0 wrote: put the --workdir on a file system that all "
            "hosts share."
        ) from error
    other = [name for name in inputs if first.get(name) != inputs[name]]
    if other:
        raise InputError(
            f"This process reads another {' and '.join(other)} than process 0: give all hosts the same files."
        )


class Log:
    """Appends JSON lines, flushed one by one, on process 0; on others it writes nothing.

    Args:
        until: drop the lines of later steps, written after the checkpoint that the run resumes from.
    """

    def __init__(self, file: Path, until: int | None = None):
        if processes.is_main():
            file.parent.mkdir(parents=True, exist_ok=True)
            if until is not None and file.is_file():
                _drop_after(file, until)
        self._file = (file if processes.is_main() else Path(os.devnull)).open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()


def _drop_after(file: Path, step: int) -> None:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill may leave half a line
            if json.loads(line)["step"] <= step:
                kept.append(line)
    if kept != lines:
        part = file.with_name(f"{file.name}.part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(file)
