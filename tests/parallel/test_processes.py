"""Processes of a run find each other, agree, exchange arrays, and fail with one sentence."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from v2t_jax.config import DistributedConfig
from v2t_jax.errors import InputError
from v2t_jax.parallel import processes
from v2t_jax.parallel.processes import Place, Share, find_place, find_share

ROOT = Path(__file__).parents[2]
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n[1-4]"}


@pytest.mark.parametrize(
    ("options", "environ", "place"),
    [
        ({}, {}, None),
        ({"coordinator": "none"}, SLURM, None),
        ({}, SLURM, Place()),
        ({}, SLURM | {"SLURM_NTASKS": "1"}, None),
        ({}, {"SLURM_NTASKS": "4"}, None),  # the batch script itself, outside srun
        ({"coordinator": "n1:1234"}, SLURM, Place("n1:1234", 4, 3)),
        ({}, {"V2T_COORDINATOR": "h:1", "V2T_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"}, Place("h:1", 2, 1)),
        ({"process_id": 0}, {"V2T_COORDINATOR": "h:1", "V2T_NUM_PROCESSES": "2"}, Place("h:1", 2, 0)),
        ({"coordinator": "h:1", "num_processes": 1, "process_id": 0}, {}, None),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, Place()),
        ({}, {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({}, {"MEGASCALE_NUM_SLICES": "2"}, Place()),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, Place()),
    ],
)
def test_the_place_comes_from_the_command_line_or_the_environment(options, environ, place):
    assert find_place(DistributedConfig(**options), environ) == place


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        ({"num_processes": 2, "process_id": 0}, {}, "with coordinator auto, num_processes 2 and process_id 0; pass"),
        ({}, {"V2T_NUM_PROCESSES": "2"}, "with coordinator auto"),
        ({"coordinator": "host"}, {}, "with coordinator host, .* HOST:PORT of process 0"),
        ({"coordinator": "host:99999", "num_processes": 2, "process_id": 0}, {}, "with coordinator host:99999"),
        ({"coordinator": "h:1", "num_processes": 2}, {}, "process_id None; pass"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, {}, "process_id 2; pass"),
        ({"coordinator": "h:1"}, {"V2T_NUM_PROCESSES": "two"}, "V2T_NUM_PROCESSES is 'two'"),
    ],
)
def test_incomplete_or_contradictory_places(options, environ, message):
    with pytest.raises(InputError, match=message):
        find_place(DistributedConfig(**options), environ)


def test_settings_out_of_range():
    for settings, message in (({"num_processes": 0}, ">= 1"), ({"process_id": -1}, ">= 0")):
        with pytest.raises(InputError, match=message):
            DistributedConfig(**settings)
    with pytest.raises(InputError, match="timeout is 0; it must be"):
        DistributedConfig(timeout=0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments, **environ):
    """`processes.start` in a process of its own."""
    code = f"""
from v2t_jax.config import DistributedConfig
from v2t_jax.errors import InputError
from v2t_jax.parallel import processes
try:
    processes.start(DistributedConfig{arguments})
except InputError as error:
    print(error)
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=60)


@pytest.mark.multihost
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_stays_alone_ends_with_a_sentence(number):
    address = f"127.0.0.1:{free_port()}"
    done = start(address, 2, number, 1.0)
    expected = f"v2t: Not all processes connected at {address} within 1 s; check that all are started"
    assert done.returncode == 2 and expected in done.stderr and "Check failure stack" not in done.stderr


@pytest.mark.multihost
def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        done = start(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, 5.0)
    assert done.stdout.startswith("The processes can't connect at 127.0.0.1:") and "already in use" in done.stdout


def test_under_slurm_jax_reads_the_environment():
    slurm = {"NTASKS": "3", "PROCID": "1", "LOCALID": "0", "STEP_NODELIST": "127.0.0.1"}
    slurm = {f"SLURM_{name}": value for name, value in slurm.items()}
    assert "coordinator_address should be defined" in start(None, None, None, 1.0, **slurm).stdout  # no SLURM_JOB_ID
    done = start(None, None, None, 1.0, **slurm, SLURM_JOB_ID=str(free_port()))
    assert done.returncode == 2 and "v2t: Not all processes connected within 1 s" in done.stderr


def test_work_without_meeting_needs_only_the_numbers():
    slurm = {"SLURM_NTASKS": "3", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "127.0.0.1"}
    assert find_share(DistributedConfig(), slurm) == Share(1, 3)
    assert find_share(DistributedConfig(), {"SLURM_NTASKS": "3", "SLURM_PROCID": "0"}) == Share()
    assert find_share(DistributedConfig(num_processes=8, process_id=7), slurm) == Share(7, 8)
    assert find_share(DistributedConfig(coordinator="none"), slurm) == Share(0, 1)
    assert find_share(DistributedConfig(), slurm | {"V2T_NUM_PROCESSES": "2"}) == Share(1, 2)
    with pytest.raises(InputError, match="There is no host 2 of 2"):
        find_share(DistributedConfig(process_id=2, num_processes=2), {})
    with pytest.raises(InputError, match="Pass both --distributed.num-processes and .process-id"):
        find_share(DistributedConfig(num_processes=2), {})


def sharding(*spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, PartitionSpec(*spec))


def test_a_process_alone_has_all_rows_and_waits_for_nobody():
    cut = sharding("data")
    rows = processes.local_rows(cut, 12)
    assert rows == slice(0, 12)
    values = np.arange(36).reshape(12, 3)
    batch = processes.global_batch(cut, values, rows, 12)
    assert batch.sharding == cut
    np.testing.assert_array_equal(processes.fetch({"a": batch})["a"], values)
    processes.barrier("done nothing")
    assert processes.gather({"a": [1]}) == [{"a": [1]}]
    assert processes.broadcast(3) == 3
    np.testing.assert_array_equal(processes.shared([1, 2, 3], np.asarray), [1, 2, 3])
    assert processes.Vote(cut.mesh)(15) == 15


TOGETHER = """
import socket, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from v2t_jax.parallel import processes
from v2t_jax.config import DistributedConfig
processes.start(DistributedConfig(timeout=60))
me = jax.process_index()
assert processes.is_several() and processes.is_main() == (me == 0)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
cut = NamedSharding(mesh, P("data"))
rows = processes.local_rows(cut, 8)
assert rows == slice(4 * me, 4 * me + 4), rows
values = np.arange(24.0).reshape(8, 3)
batch = processes.global_batch(cut, values[rows], rows, 8)
assert not batch.is_fully_addressable
np.testing.assert_array_equal(processes.fetch(batch), values)
again = processes.put(processes.put(values, NamedSharding(mesh, P("model"))), cut)
np.testing.assert_array_equal(processes.fetch(again), values)
assert processes.gather(["é" * (me + 1)]) == [["é"], ["éé"]]
np.testing.assert_array_equal(processes.broadcast({"a": np.full(2, 5 + me)})["a"], [5, 5])
asked = []
def work(items):
    asked.extend(items)
    return np.stack([np.full(2, item) for item in items])
np.testing.assert_array_equal(processes.shared([3, 1, 4, 1, 5], work)[:, 0], [3, 1, 4, 1, 5])
assert asked == ([1, 1, 3] if me else [3, 4, 5]), asked
vote = processes.Vote(mesh)
assert [vote(word) for word in ([0, 15, 0] if me else [0, 2, 0])] == [0, 0, 15]
with processes.main_first("written") as here:
    assert here == (me == 0)
processes.barrier("done")
try:
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options={"no_such_option": 1})
except jax.errors.JaxRuntimeError as error:
    assert processes.explained(error) is None, error
if me == 1:
    processes.leave(0)
try:
    processes.gather("alone")
except Exception as error:
    print(processes.explained(error), flush=True)
processes.leave(0)
"""


def launched(code, devices=2):
    launcher = [sys.executable, ROOT / "launch" / "local.py", "--processes", "2", "--devices", str(devices), "--"]
    command = [*launcher, sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.multihost
def test_two_processes_agree_and_notice_when_one_is_gone():
    done = launched(TOGETHER)
    assert "A collective operation failed (UNKNOWN: Gloo" in done.stdout, done.stdout + done.stderr
    assert "another process probably exited: check its log" in done.stdout and done.returncode == 0


FAILS = """
import jax, sys
from v2t_jax.cli import invert, main
def fail(_):
    if jax.process_index() == 1:
        jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options={"no_such_option": 1})
    import time; time.sleep(30)
invert.Invert.run = fail
sys.argv = ["v2t", "invert", "--text", "a"]
main.main()
"""


@pytest.mark.multihost
def test_a_compile_error_in_one_process_shows_its_own_message():
    done = launched(FAILS, devices=1)
    assert done.returncode == 1 and "process 1 ended with status 1" in done.stderr
    shown = [line for line in done.stdout.splitlines() if "INVALID_ARGUMENT: No such compile option" in line]
    assert shown and "collective operation" not in done.stdout and "None" not in done.stdout, done.stdout


@pytest.mark.multihost
def test_the_launcher_stops_all_when_one_fails_and_passes_signals_on():
    code = "import os, sys, time; i = os.environ['V2T_PROCESS_ID']; print('here', i); "
    launcher = [sys.executable, ROOT / "launch" / "local.py", "--processes", "2", "--devices", "1", "--"]
    fails = code + "sys.exit(3) if i == '1' else time.sleep(60)"
    done = subprocess.run([*launcher, sys.executable, "-c", fails], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "process 1 ended with status 3" in done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] here 0", "[1] here 1"]
    waits = code + "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up'); time.sleep(60)"
    process = subprocess.Popen([*launcher, sys.executable, "-c", waits], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert sum("up" in process.stdout.readline() for _ in range(4)) == 2
    process.terminate()
    assert process.wait(30) == 0
    process.stdout.close()
    deaf = code + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)"
    process = subprocess.Popen([*launcher, sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert sum("up" in process.stdout.readline() for _ in range(4)) == 2
    while process.poll() is None:  # the third ends it
        process.terminate()
        time.sleep(0.2)
    assert process.returncode == 128 + signal.SIGKILL
    process.stdout.close()
    dry = subprocess.run([*launcher[:-1], "--dry-run", "--", "true"], capture_output=True, text=True, check=True)
    assert "V2T_PROCESS_ID='1'" in dry.stdout.splitlines()[1]
