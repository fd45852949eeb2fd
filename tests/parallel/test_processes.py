"""Processes find each other, or say in a sentence who is missing; they agree, and hand each other their numbers."""

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
from v2t_jax.parallel import processes, rendezvous
from v2t_jax.parallel.rendezvous import Place, Share, find_place, find_share

ROOT = Path(__file__).parents[1]
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
def test_the_place_is_what_the_command_line_or_else_the_environment_says(options, environ, place):
    assert find_place(DistributedConfig(**options), environ) == place


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        ({"num_processes": 2, "process_id": 0}, {}, "not where they meet"),
        ({}, {"V2T_NUM_PROCESSES": "2"}, "not where they meet"),
        ({"coordinator": "host"}, {}, "give HOST:PORT of process 0, auto or none"),
        ({"coordinator": "host:99999"}, {}, "give HOST:PORT"),
        ({"coordinator": "h:1", "num_processes": 2}, {}, "needs all of --processes.coordinator"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, {}, "must be from 0 to 1"),
        ({"coordinator": "h:1"}, {"V2T_NUM_PROCESSES": "two"}, "V2T_NUM_PROCESSES is 'two'"),
    ],
)
def test_places_that_are_none(options, environ, message):
    with pytest.raises(InputError, match=message):
        find_place(DistributedConfig(**options), environ)


def test_settings_out_of_range():
    for settings, message in (({"num_processes": 0}, "at least 1"), ({"process_id": -1}, "negative")):
        with pytest.raises(InputError, match=message):
            DistributedConfig(**settings)
    with pytest.raises(InputError, match="above 0"):
        DistributedConfig(timeout=0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_process_0_names_who_is_missing():
    options = DistributedConfig(f"127.0.0.1:{free_port()}", 3, 0, timeout=1.0)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"Of 3 processes, processes 1, 2 did not come within 1 s; there are 0 \("):
        rendezvous.start(options)
    assert time.monotonic() - began < 5


def test_the_others_say_that_process_0_is_missing():
    with pytest.raises(InputError, match=r"Process 1 can't meet process 0 at 127.0.0.1:\d+ within 1 s"):
        rendezvous.start(DistributedConfig(f"127.0.0.1:{free_port()}", 2, 1, timeout=1.0))


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"can't listen on port {port}"):
            rendezvous.start(DistributedConfig(f"127.0.0.1:{port}", 2, 0, timeout=1.0))


@pytest.fixture
def under_slurm(monkeypatch):
    """As process 1 of 3 that Slurm has started on this machine."""
    number = free_port()
    while number < 65536 - 4096:  # from the job's number JAX makes a port of the last 4096
        number = free_port() | 0xF000
    values = {"JOB_ID": number - 61440, "NTASKS": 3, "PROCID": 1, "LOCALID": 0, "STEP_NODELIST": "127.0.0.1"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return monkeypatch


def test_under_slurm_those_that_are_missing_are_named_too(under_slurm):
    with pytest.raises(InputError, match=r"Process 1 can't meet process 0 at 127.0.0.1:\d+ within 1 s"):
        rendezvous.start(DistributedConfig(timeout=1.0))
    under_slurm.setenv("SLURM_PROCID", "0")
    with pytest.raises(InputError, match=r"Of 3 processes, processes 1, 2 did not come within 1 s; there are 0 \("):
        rendezvous.start(DistributedConfig(timeout=1.0))
    under_slurm.delenv("SLURM_JOB_ID")
    with pytest.raises(InputError, match="don't meet .*: give --processes.coordinator HOST:PORT"):
        rendezvous.start(DistributedConfig(timeout=1.0))


def test_work_without_meeting_needs_a_number_only(under_slurm):
    assert find_share(DistributedConfig()) == Share(1, 3)
    assert find_share(DistributedConfig(num_processes=8, process_id=7)) == Share(7, 8)
    assert find_share(DistributedConfig(coordinator="none")) == Share(0, 1)
    under_slurm.setenv("V2T_NUM_PROCESSES", "2")
    assert find_share(DistributedConfig()) == Share(1, 2)
    with pytest.raises(InputError, match="process_id is 2; with 2 processes it must be from 0 to 1"):
        find_share(DistributedConfig(process_id=2))
    under_slurm.delenv("SLURM_PROCID")
    with pytest.raises(InputError, match="needs both of --processes.num-processes and .process-id"):
        find_share(DistributedConfig())


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
    assert processes.Vote(cut, sharding())(15) == 15


TOGETHER = """
import socket, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from v2t_jax.parallel import processes
from v2t_jax.parallel import rendezvous
from v2t_jax.config import DistributedConfig
from v2t_jax.errors import InputError
rendezvous.start(DistributedConfig(timeout=60))
me = jax.process_index()
assert processes.is_several() and processes.is_main() == (me == 0)
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
cut, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
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
vote = processes.Vote(cut, whole)
assert [vote(word) for word in ([0, 15, 0] if me else [0, 2, 0])] == [0, 0, 15]
with processes.main_first("written") as here:
    assert here == (me == 0)
if me == 0:
    try:
        processes.barrier("come to the end", 2)
    except InputError as error:
        print(error)
    processes.leave(0)
import time
time.sleep(6)
processes.leave(0)
"""


@pytest.mark.multihost
def test_two_processes_agree_and_name_the_one_that_is_missing():
    launcher = [sys.executable, ROOT / "launch" / "local.py", "--processes", "2", "--devices", "2", "--"]
    done = subprocess.run(
        [*launcher, sys.executable, "-c", TOGETHER], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    host = socket.gethostname()
    assert f"Within 2 s not all processes have come to the end; missing: 1 ({host})." in done.stdout, (
        done.stdout + done.stderr
    )


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
