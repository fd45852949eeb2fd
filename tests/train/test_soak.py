"""Killed ten times at moments that chance decides, a run ends with the very parameters of an undisturbed one."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.recorded_run import write_recipe
from tests.helpers.soak import soak
from tests.helpers.tiny_run import make_recipe

STEPS = 600


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path)
    recipe = dataclasses.replace(
        recipe,
        stages=("inverter",),
        inverter=dataclasses.replace(recipe.inverter, num_steps=STEPS),
        checkpoint=dataclasses.replace(recipe.checkpoint, every_steps=20, keep=2),
        evaluation=dataclasses.replace(recipe.evaluation, num_steps=(0,), sequence_beam_width=(1,)),
    )
    file = write_recipe(recipe, tmp_path / "recipe.py")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")  # one device
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")

    def command(workdir: Path) -> list[str]:
        return [sys.executable, "-c", "from v2t_jax.cli.main import main; main()", *command_line(workdir)]

    def command_line(workdir: Path) -> list[str]:
        return ["train", str(file), "--workdir", str(workdir)]

    soak(command(tmp_path / "undisturbed"), kills=0, seed=0, working=lambda: None)
    log = tmp_path / "killed" / "inverter" / "log.jsonl"
    kills = soak(command(log.parents[1]), 10, 0, working=lambda: log.stat().st_size if log.exists() else 0)
    assert {kill.signal for kill in kills} == {signal.SIGKILL, signal.SIGTERM}
    saved = [kill.output for kill in kills if kill.signal == signal.SIGTERM and kill.status == 0]
    assert saved and all("run the same command to resume" in output for output in saved)
    for name in ("model/inverter.safetensors", "evaluation.json"):
        ours, theirs = ((tmp_path / run / name).read_bytes() for run in ("killed", "undisturbed"))
        if name.endswith("json"):  # but for how fast it was
            ours, theirs = (
                [row | {"texts_per_second": 0} for row in json.loads(text)["rows"]] for text in (ours, theirs)
            )
        assert ours == theirs
    logs = [
        [json.loads(line) for line in (tmp_path / run / "inverter" / "log.jsonl").read_text().splitlines()]
        for run in ("killed", "undisturbed")
    ]
    ours, theirs = ({line["step"]: line["loss"] for line in lines if "loss" in line} for lines in logs)
    assert ours == theirs and len([line for line in logs[0] if "loss" in line]) == len(ours)
    assert os.listdir(tmp_path / "killed" / "model") == os.listdir(tmp_path / "undisturbed" / "model")
