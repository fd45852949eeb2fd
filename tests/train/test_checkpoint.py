"""Checkpoints give back what was saved, whatever has happened to the state or to the newest one since."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from v2t_jax import progress
from v2t_jax.config import CheckpointConfig
from v2t_jax.errors import InputError
from v2t_jax.train.checkpoint import Checkpoints

CONFIG = CheckpointConfig(every_steps=1, keep=2)


def state(value):
    return {"step": jnp.int32(value), "weights": jnp.full((256, 256), float(value))}


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of the steps 1, 2 and 3, of which the newest two are kept."""
    checkpoints = Checkpoints(tmp_path, CONFIG)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.close()
    return tmp_path


def restored(folder):
    checkpoints = Checkpoints(folder, CONFIG)
    found = checkpoints.restore(state(0))
    return checkpoints, int(found["step"]), np.asarray(found["weights"])


def damage(folder, step):
    """Truncates every file of a checkpoint's arrays."""
    files = [file for file in (folder / str(step)).rglob("*") if file.is_file() and file.stat().st_size]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert files


def test_saved_values_outlive_the_state_they_came_from(tmp_path):
    """The step gives its state's memory up while it is still being written."""
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints, current = Checkpoints(tmp_path, CheckpointConfig(every_steps=1, keep=20)), state(0)
    for step in range(10):
        checkpoints.save(step, current)
        for _ in range(20):
            current = update(current)
    for step in range(10):
        saved = checkpoints._manager.restore(step)
        assert int(saved["step"]) == 20 * step
        np.testing.assert_array_equal(saved["weights"], np.full((256, 256), 20.0 * step))
    checkpoints.close()


def test_the_newest_is_restored_and_old_ones_go(folder):
    checkpoints, step, weights = restored(folder)
    assert (checkpoints.latest(), step) == (3, 3) and (weights == 3).all()
    assert not (folder / "1").exists()
    checkpoints.close()


def test_a_truncated_checkpoint_is_set_aside(folder):
    damage(folder, 3)
    checkpoints, step, weights = restored(folder)
    assert step == 2 and (weights == 2).all()
    # Training goes on from 2, and its new step 3 is kept in place of the damaged one.
    assert checkpoints.latest() == 2
    checkpoints.save(3, state(30))
    checkpoints.close()
    checkpoints, step, _ = restored(folder)
    assert (checkpoints.latest(), step) == (3, 30)
    assert len(list(folder.glob("unreadable-3-*"))) == 1
    checkpoints.close()


def test_flipped_bytes_are_noticed_and_said(folder, capsys):
    """A file that is altered is never read as other numbers."""
    array = max((folder / "3").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 0x10
    array.write_bytes(content)
    progress.enable()
    try:
        checkpoints, step, weights = restored(folder)
    finally:
        progress.disable()
    assert step == 2 and (weights == 2).all()
    name = re.escape(str(array.relative_to(folder / "3")))
    said = rf"checkpoint 3 in .* can't be read \({name} is truncated or altered.*\); trying the one before"
    assert re.search(said, capsys.readouterr().err)
    checkpoints.close()


@pytest.mark.parametrize("content", [None, "", "[]", '{"nothing": "0"}'])
def test_checksums_that_are_missing_or_damaged(folder, content):
    file = folder / "3" / "checksums.json"
    file.unlink() if content is None else file.write_text(content)
    checkpoints, step, _ = restored(folder)
    assert step == 2
    checkpoints.close()


def test_another_mesh_goes_on(tmp_path):
    """Cut over four devices when saved, over eight when restored."""

    def cut(devices):
        mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        return NamedSharding(mesh, PartitionSpec("fsdp"))

    values = np.arange(64 * 3, dtype=np.float32).reshape(64, 3)
    checkpoints = Checkpoints(tmp_path, CONFIG)
    checkpoints.save(1, {"weights": jax.device_put(values, cut(4))})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, CONFIG)
    found = checkpoints.restore({"weights": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=cut(8))})
    assert found["weights"].sharding == cut(8)
    np.testing.assert_array_equal(found["weights"], values)
    checkpoints.close()


def test_no_readable_checkpoint(folder):
    for step in (2, 3):
        damage(folder, step)
    checkpoints = Checkpoints(folder, CONFIG)
    with pytest.raises(InputError, match="No checkpoint .* can be read .* new --workdir"):
        checkpoints.restore(state(0))
    checkpoints.close()


def test_a_step_that_is_there_is_left_alone(folder):
    checkpoints = Checkpoints(folder, CONFIG)
    checkpoints.save(3, state(99))
    checkpoints.close()
    checkpoints, _, weights = restored(folder)
    assert (weights == 3).all()
    checkpoints.close()


ONE_FAILS = """
import sys
from pathlib import Path
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from v2t_jax.config import CheckpointConfig, DistributedConfig
from v2t_jax.parallel import processes
from v2t_jax.train.checkpoint import Checkpoints
processes.start(DistributedConfig(timeout=60))
cut = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), PartitionSpec("fsdp"))
checkpoints = Checkpoints(Path(sys.argv[1]), CheckpointConfig(every_steps=1, keep=3))
for step in (1, 2):
    checkpoints.save(step, {"weights": processes.put(np.full((4, 3), step, np.float32), cut)})
checkpoints._manager.wait_until_finished()
restore = ocp.StandardCheckpointHandler.restore
def fails(self, directory, *args, **kwargs):
    if jax.process_index() == 1 and "/2/" in str(directory):
        raise OSError(5, "Input/output error")
    return restore(self, directory, *args, **kwargs)
ocp.StandardCheckpointHandler.restore = fails
like = {"weights": jax.ShapeDtypeStruct((4, 3), np.float32, sharding=cut)}
print("latest", checkpoints.latest(), "restored", processes.fetch(checkpoints.restore(like))["weights"].max())
print("latest", checkpoints.latest())
checkpoints.close()
"""


@pytest.mark.multihost
def test_what_one_process_cannot_read_none_restores(tmp_path):
    root = Path(__file__).parents[2]
    launcher = [sys.executable, root / "launch" / "local.py", "--processes", "2", "--devices", "2", "--"]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", ONE_FAILS, tmp_path], cwd=root, capture_output=True, text=True, timeout=120
    )
    for process in range(2):
        assert f"[{process}] latest 2 restored 1.0" in done.stdout, done.stdout + done.stderr
        assert f"[{process}] latest 1" in done.stdout
    assert done.returncode == 0
