"""Checkpoints of a training state, by Orbax."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from v2t_jax import progress
from v2t_jax.config import CheckpointConfig
from v2t_jax.errors import InputError


class Checkpoints:
    """The checkpoints in a folder; saving goes on in the background while training does."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Saves once a step; a step that is there already is left alone.

        Raises:
            InputError: this checkpoint, or the one before, which was still being written, can't be.
        """
        if step != self._manager.latest_step():
            with self._writing():
                self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: Any) -> Any:
        """The newest readable state, with the shapes and shardings of `like` (arrays or shapes with shardings).

        Raises:
            InputError: there are checkpoints but none can be read.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        reasons: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except (ValueError, OSError, KeyError) as error:  # truncated or altered on disk
                reasons[step] = (str(error).splitlines() or [type(error).__name__])[0]
                progress.note(f"checkpoint {step} in {self._folder} can't be read; trying the one before")
            else:
                self._set_aside(list(reasons))
                return state
        raise InputError(
            f"No checkpoint in {self._folder} can be read ({next(iter(reasons.values()))}); start in a new --workdir."
        )

    def _set_aside(self, steps: list[int]) -> None:
        """Renames unreadable checkpoints: while they count, none of an earlier step can be saved."""
        for step in steps:
            (self._folder / str(step)).rename(self._folder / f"unreadable-{step}-{time.time_ns()}")
        if steps:
            self._manager.reload()

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
            InputError: it can't be.
        """
        with self._writing():
            self._manager.wait_until_finished()
        with contextlib.suppress(RuntimeError):
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:  # tensorstore's errors are ValueErrors
            reason = (str(error).splitlines() or [type(error).__name__])[0].rpartition(": ")[2]
            raise InputError(
                f"A checkpoint can't be written to {self._folder} ({reason}); earlier ones are untouched: free space "
                "there, then run the same command to go on from the newest."
            ) from error
