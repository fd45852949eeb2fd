"""Checkpoints of a training state by Orbax, with checksums.

Orbax renames a step's folder when it is complete, so a kill leaves no partial checkpoint. It doesn't notice files that
change later, so the folder gets `checksums.json` first; `restore` verifies it, each process a share of the files.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from v2t_jax import progress
from v2t_jax.config import CheckpointConfig
from v2t_jax.errors import InputError
from v2t_jax.interop.files import sha256_of
from v2t_jax.parallel import processes

CHECKSUMS = "checksums.json"
TIMES = "_CHECKPOINT_METADATA"  # Orbax's timestamps, rewritten after everything else


class Checkpoints:
    """The checkpoints in a folder; saving continues in the background."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self._folder = folder.absolute()
        asynchronous = ocp.AsyncOptions(post_finalization_callback=self._write_checksums)
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True, async_options=asynchronous)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The newest step that every process sees; all must call it."""
        return max(self._steps(), default=None)

    def _steps(self) -> set[int]:
        return set.intersection(*map(set, processes.gather(list(self._manager.all_steps()))))

    def save(self, step: int, state: Any) -> None:
        """Saves a step, unless it is saved already; also fails if the previous one, written meanwhile, can't be."""
        if step != self._manager.latest_step():
            with self._writing():
                self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> Any:
        """The newest sound state, with the shapes and shardings of `like`, which may be of another mesh or hosts."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        reasons: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            fault = ""
            try:
                self._verify(step)
                state = self._read(step, abstract)
            except (ValueError, OSError, KeyError, TypeError) as error:  # missing, truncated or altered on disk
                fault = processes.gist(error)
            fault = next((one for one in processes.gather(fault) if one), "")  # one process's fault is everybody's
            if not fault:
                if reasons:  # set aside: Orbax saves no step before the newest one it knows
                    with processes.main_first("set unreadable checkpoints aside") as here:
                        for bad in reasons if here else ():
                            (self._folder / str(bad)).rename(self._folder / f"unreadable-{bad}-{time.time_ns()}")
                    self._manager.reload()
                return state
            reasons[step] = fault
            progress.note(f"checkpoint {step} in {self._folder} can't be read ({fault}); trying the one before")
        raise InputError(
            f"No checkpoint in {self._folder} can be read ({next(iter(reasons.values()))}); start in a new --workdir."
        )

    def _read(self, step: int, abstract: Any) -> Any:
        """Restores a step without Orbax's own barrier, at which the others would wait for a process that failed."""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}")
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            return reader.restore(self._folder / str(step) / "default", args=ocp.args.StandardRestore(abstract))

    def _write_checksums(self) -> None:
        """Runs in Orbax's thread when a checkpoint's files are complete, before its folder is renamed."""
        if processes.is_main():
            for folder in self._folder.glob("*.orbax-checkpoint-tmp*"):
                sums = {name: sha256_of([folder / name]) for name in _names(folder)}
                (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")

    def _verify(self, step: int) -> None:
        folder = self._folder / str(step)
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        if any("/" in name and name not in sums for name in _names(folder)):  # the rest Orbax adds at the end
            raise ValueError(f"{CHECKSUMS} doesn't name all files")
        for name in sorted(sums)[jax.process_index() :: jax.process_count()]:
            if sha256_of([folder / name]) != sums[name]:
                raise ValueError(f"{name} is truncated or altered: its sha256 is not the recorded one")

    def close(self) -> None:
        with self._writing():
            self._manager.wait_until_finished()
        with contextlib.suppress(RuntimeError):
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:  # tensorstore's errors are ValueErrors
            reason = processes.gist(error).rpartition(": ")[2]
            raise InputError(
                f"A checkpoint can't be written to {self._folder} ({reason}); earlier ones are intact: free space "
                "there, then run the same command to resume from the newest."
            ) from error


def _names(folder: Path) -> list[str]:
    """The files of a checkpoint that never change."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in (CHECKSUMS, TIMES)]
    return sorted(str(file.relative_to(folder)) for file in files)
