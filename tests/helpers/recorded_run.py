"""A training run that records each step's loss and batch: `python -m tests.helpers.recorded_run OPTIONS`, alone or
as one of several processes."""

import argparse
import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from v2t_jax.config import Config, DistributedConfig, MeshConfig, from_dict, to_dict
from v2t_jax.parallel import processes
from v2t_jax.parallel.compile_cache import enable_compilation_cache, user_cache_dir
from v2t_jax.train import loop


def recorded(config: Config, workdir: Path, stop_at: int = 0, stop_process: int = 0):
    """Trains, alone among its processes `stop_process` getting a SIGTERM before step `stop_at`.

    Returns:
        Losses [steps] float32, and the steps' batches [steps, B, L]; each step's number in the run before them.
    """
    shard, steps, losses, batches = loop.shard_step, [], [], []

    def recording(*args):
        step_fn, shardings = shard(*args)

        def step(state, frozen, batch):
            if stop_at and int(state.step) + 1 == stop_at and jax.process_index() == stop_process:
                os.kill(os.getpid(), signal.SIGTERM)
            steps.append(int(state.step) + 1)
            batches.append(processes.fetch(batch.ids))
            state, metrics = step_fn(state, frozen, batch)
            losses.append(np.asarray(metrics.loss))
            return state, metrics

        return step, shardings

    loop.shard_step = recording
    try:
        loop.train(config, workdir)
    except loop.TrainingStopped as stopped:
        print(f"v2t: {stopped}")
    finally:
        loop.shard_step = shard
    return np.array(steps), np.array(losses), np.array(batches)


def write_recipe(config: Config, file: Path) -> Path:
    """The config as a recipe file."""
    values = json.dumps(to_dict(config))
    file.write_text(
        "import json\nfrom v2t_jax.config import Config, from_dict\n\n\n"
        f"def get_config():\n    return from_dict(Config, json.loads({values!r}))\n"
    )
    return file


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--stop-at", type=int, default=0)
    options = parser.parse_args()
    config = from_dict(Config, json.loads(options.config.read_text()))
    config = dataclasses.replace(config, mesh=MeshConfig(fsdp=options.fsdp))
    enable_compilation_cache(user_cache_dir() / "xla-tests")
    processes.start(DistributedConfig(timeout=120))
    steps, losses, batches = recorded(config, options.workdir, options.stop_at, jax.process_count() - 1)
    np.savez(f"{options.output}.{jax.process_index()}.npz", steps=steps, losses=losses, batches=batches)


if __name__ == "__main__":
    sys.exit(main())
