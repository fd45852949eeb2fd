"""One device, eight devices and two processes of four are one run: the same texts in the same order, the same losses,
and each goes on from the checkpoints of the others."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers.recorded_run import recorded
from tests.helpers.tiny_run import make_recipe
from v2t_jax import load
from v2t_jax.config import MeshConfig, to_dict
from v2t_jax.eval.evaluate import evaluate
from v2t_jax.train import loop
from v2t_jax.train.setup import prepare

ROOT = Path(__file__).parents[2]
STEPS, STOP = 60, 52  # losses are compared over STOP steps or more
TOLERANCE = 1e-5

pytestmark = [pytest.mark.multihost, pytest.mark.slow]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    recipe = make_recipe(tmp_path_factory.mktemp("recipe"))
    return dataclasses.replace(
        recipe, stages=("inverter",), inverter=dataclasses.replace(recipe.inverter, num_steps=STEPS)
    )


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """(steps, losses, batches) of a run on one device."""
    with pytest.MonkeyPatch.context() as patched:
        make_mesh = loop.make_mesh
        patched.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        return recorded(recipe, tmp_path_factory.mktemp("alone"))


def processes(recipe, workdir, fsdp=1, stop_at=0):
    """The same of two processes with four devices each; what they printed."""
    config = workdir.with_name(f"{workdir.name}.json")
    config.write_text(json.dumps(to_dict(recipe)))
    output = workdir.with_name(f"{workdir.name}-{stop_at}")
    command = [sys.executable, "-m", "tests.helpers.recorded_run", "--config", config, "--workdir", workdir]
    command += ["--output", output, "--fsdp", str(fsdp), "--stop-at", str(stop_at)]
    launcher = [sys.executable, ROOT / "launch" / "local.py", "--processes", "2", "--devices", "4", "--"]
    done = subprocess.run([*launcher, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [np.load(f"{output}.{i}.npz") for i in range(2)]
    for name in parts[0]:
        np.testing.assert_array_equal(parts[0][name], parts[1][name])
    return (parts[0]["steps"], parts[0]["losses"], parts[0]["batches"]), done.stdout


def assert_same_run(found, expected, first, last):
    steps, losses, batches = found
    np.testing.assert_array_equal(steps, np.arange(first, last + 1))
    np.testing.assert_array_equal(batches, expected[2][first - 1 : last])
    np.testing.assert_allclose(losses, expected[1][first - 1 : last], atol=TOLERANCE, rtol=0)


def log_steps(workdir):
    lines = [json.loads(line) for line in (workdir / "inverter" / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_two_processes_are_one_run_and_eight_devices_go_on_from_their_checkpoint(recipe, alone, tmp_path):
    workdir = tmp_path / "run"
    found, printed = processes(recipe, workdir, stop_at=STOP)
    last = int(found[0][-1])  # all agree on it one step later, two at most
    assert STOP <= last <= STOP + 2
    assert_same_run(found, alone, 1, last)
    assert printed.count(f"stopped at step {last} of the inverter; everything is saved: run the same command") == 2
    resumed = recorded(dataclasses.replace(recipe, mesh=MeshConfig(fsdp=2)), workdir)
    assert_same_run(resumed, alone, last + 1, STEPS)
    assert log_steps(workdir) == list(range(5, STEPS + 1, 5))


def test_eight_devices_are_one_run_and_two_processes_go_on_from_their_checkpoint(recipe, alone, tmp_path):
    workdir = tmp_path / "run"
    found = recorded(dataclasses.replace(recipe, mesh=MeshConfig(fsdp=2)), workdir, stop_at=STOP)
    assert_same_run(found, alone, 1, STOP)
    resumed, _ = processes(recipe, workdir, fsdp=4)
    assert_same_run(resumed, alone, STOP + 1, STEPS)
    assert log_steps(workdir) == list(range(5, STEPS + 1, 5))
    report = json.loads((workdir / "evaluation.json").read_text())
    assert report["n"] == recipe.evaluation.num_examples
    # What both processes have scored together is what one that loads the model scores.
    model, settings = load(str(workdir / "model")), recipe.evaluation
    texts = prepare(recipe).held_out[: settings.num_examples]
    again = evaluate(model, texts, (0,), settings.sequence_beam_width)
    for row, other in zip(report["rows"], again["rows"], strict=True):
        shared = row.keys() - {"texts_per_second"}
        assert {name: row[name] for name in shared} == pytest.approx({name: other[name] for name in shared}, abs=1e-4)
