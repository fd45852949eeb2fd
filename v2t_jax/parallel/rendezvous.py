"""How the processes of a run find each other, and what each one's part is.

Where they come from: --distributed.* (or V2T_COORDINATOR, V2T_NUM_PROCESSES, V2T_PROCESS_ID), else Slurm, Open MPI, or
a TPU's own environment and metadata, which JAX reads.
"""

import contextlib
import glob
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, NoReturn

import jax

from v2t_jax import progress
from v2t_jax.config import DistributedConfig
from v2t_jax.errors import InputError
from v2t_jax.parallel.processes import introduce, leave


class Place(NamedTuple):
    """A process's place in a run; empty: JAX knows, which asks Slurm, Open MPI or the TPU."""

    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: Sequence[int] | None = None  # those of its host that are its own; None: all


@dataclass(frozen=True)
class Share:
    """Which of many files are this host's to make; nothing of it shows in the result."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"There is no host {self.index} of {self.count}: count hosts from 0.")

    def host_of(self, number: int) -> int:
        """Whose file `number` is."""
        return number % self.count

    def has(self, number: int) -> bool:
        return self.host_of(number) == self.index


def find_place(
    options: DistributedConfig, environ: Mapping[str, str] = os.environ, meeting: bool = True
) -> Place | None:
    """What the command line, or else the environment, says; None for a run of one process.

    Args:
        meeting: whether the processes are to meet, and so must know where.
    Raises:
        InputError: it is incomplete or contradicts itself.
    """
    coordinator = options.coordinator or environ.get("V2T_COORDINATOR", "") or "auto"
    num_processes = _first(options.num_processes, environ, "V2T_NUM_PROCESSES", "SLURM_NTASKS")
    process_id = _first(options.process_id, environ, "V2T_PROCESS_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX")
    if coordinator == "none":
        return None
    if coordinator == "auto":
        named = options.num_processes, options.process_id, environ.get("V2T_NUM_PROCESSES")
        if all(value is None for value in named):
            return Place() if _in_cluster(environ) else None
        if meeting:
            raise InputError(
                "The number of processes is given, but not where they meet: give --distributed.coordinator HOST:PORT, "
                "the host of process 0, or V2T_COORDINATOR."
            )
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError(f"distributed.coordinator is {coordinator!r}; give HOST:PORT of process 0, auto or none.")
    if num_processes is None or process_id is None:
        needed = "all of --distributed.coordinator, " if meeting else "both of --distributed"
        raise InputError(
            f"A run of several processes needs {needed}.num-processes and .process-id (or "
            f"{'V2T_COORDINATOR, ' if meeting else ''}V2T_NUM_PROCESSES, V2T_PROCESS_ID)."
        )
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"distributed.process_id is {process_id}; with {num_processes} processes it must be from 0 to "
            f"{num_processes - 1}."
        )
    return Place(coordinator, num_processes, process_id) if num_processes > 1 else None


def find_share(options: DistributedConfig) -> Share:
    """Of this process, for work that needs no meeting: the others may come when they like.

    Raises:
        InputError: see `find_place`.
    """
    place = find_place(options, meeting=False)
    if place == Place():
        place = _ask_jax(options.timeout)
    return Share() if place is None else Share(int(place.process_id or 0), int(place.num_processes or 1))


def _ask_jax(seconds: float) -> Place | None:
    """What JAX finds in Slurm's and Open MPI's environment and in a TPU's; None for a run of one process.

    Raises:
        InputError: a scheduler has started several, but doesn't tell where they meet.
    """
    # JAX asks them inside `jax.distributed.initialize` only, which names nobody who doesn't come.
    from jax._src.clusters import ClusterEnv

    try:
        found = Place(*ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, int(seconds)))
    except (RuntimeError, ValueError, OSError, KeyError, ImportError) as error:
        found, reason = Place(), (str(error).splitlines() or [type(error).__name__])[0]
    else:
        reason = "their environment doesn't tell where"
    if None not in found[:3]:
        return found if int(found.num_processes or 1) > 1 else None
    if os.environ.get("SLURM_NTASKS") or os.environ.get("OMPI_COMM_WORLD_SIZE"):
        raise InputError(
            f"The processes of the run don't meet ({reason}): give --distributed.coordinator HOST:PORT, .num-processes "
            "and .process-id."
        )
    return None  # a TPU VM without metadata: it stands alone


def _first(given: int | None, environ: Mapping[str, str], *names: str) -> int | None:
    for name in names if given is None else ():
        if value := environ.get(name, ""):
            if not value.isdigit():
                raise InputError(f"The environment variable {name} is {value!r}; it must be a whole number.")
            return int(value)
    return given


def _in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that Slurm, Open MPI, GKE or a TPU VM has started."""
    for count, also in (("SLURM_NTASKS", "SLURM_STEP_NODELIST"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        if also in environ and environ.get(count, "1") not in ("", "1"):
            return True
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or environ.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1"):
        return True
    # A TPU VM's metadata says how many there are. Notebooks with a TPU have none, and say so.
    on_tpu = bool(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")) and find_spec("libtpu") is not None
    allowed = "tpu" in environ.get("JAX_PLATFORMS", "tpu")
    return on_tpu and allowed and "TPU_SKIP_MDS_QUERY" not in environ


def start(options: DistributedConfig) -> None:
    """Joins this process to its run, before JAX touches a device.

    Raises:
        InputError: the settings are wrong, or others don't come in time: it names them.
    """
    place = find_place(options)
    if place == Place():
        place = _ask_jax(options.timeout)
    if place is None:
        return
    with progress.stage(f"waiting for {place.num_processes} processes at {place.coordinator}"):
        _roll_call(place, options.timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Where JAX gives up it ends the process with a trace: this comes before it, with a sentence.
    late = threading.Timer(options.timeout, _give_up, [options.timeout])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            *place,
            # Otherwise Slurm's local rank would pick the devices even of explicit processes.
            cluster_detection_method="deactivate",
            initialization_timeout=int(options.timeout) + 60,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The processes of the run don't meet ({reason}); see that all are started and can reach process 0 at "
            f"{place.coordinator}."
        ) from error
    finally:
        late.cancel()
    introduce()


def _give_up(seconds: float) -> NoReturn:
    print(
        f"v2t: All processes of the run came, but {seconds:g} s later not all had joined; see whether one of them "
        "ended with a message, then start all of them again.",
        file=sys.stderr,
    )
    leave(2)


def _roll_call(place: Place, seconds: float) -> None:
    """Waits until every process is there, so that those that aren't can be named; process 0 counts.

    Raises:
        InputError: some aren't in time, or the place is taken.
    """
    assert place.coordinator is not None and place.num_processes is not None
    host, _, port = place.coordinator.rpartition(":")
    ends = time.monotonic() + seconds
    if place.process_id == 0:
        came: dict[int, str] = {0: socket.gethostname()}
        with contextlib.ExitStack() as stack:
            try:
                family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
                server = stack.enter_context(
                    socket.create_server(("", int(port)), family=family, dualstack_ipv6=family == socket.AF_INET6)
                )
            except OSError as error:
                raise InputError(
                    f"Process 0 can't listen on port {port} ({error.strerror}): another run may still hold it; give "
                    "another in --distributed.coordinator."
                ) from error
            waiting = []
            while len(came) < place.num_processes:
                server.settimeout(max(ends - time.monotonic(), 0.01))
                try:
                    connection = stack.enter_context(server.accept()[0])
                    connection.settimeout(5)
                    number, _, name = connection.makefile().readline().strip().partition(" ")
                except TimeoutError:
                    if time.monotonic() < ends:
                        continue
                    there = ", ".join(f"{number} ({name})" for number, name in sorted(came.items()))
                    missing = [number for number in range(place.num_processes) if number not in came]
                    raise InputError(
                        f"Of {place.num_processes} processes, {_numbers(missing)} did not come within {seconds:g} s; "
                        f"there are {there}: see what became of the others, then start all of them again."
                    ) from None
                except OSError:
                    continue
                if number.isdigit():
                    came[int(number)] = name
                    waiting.append(connection)
            for connection in waiting:
                with contextlib.suppress(OSError):
                    connection.sendall(b"go\n")
        return
    while True:
        left = ends - time.monotonic()
        if left <= 0:
            raise InputError(
                f"Process {place.process_id} can't meet process 0 at {place.coordinator} within {seconds:g} s; see "
                "that all processes are started and that its port is open."
            )
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5)) as connection:
                connection.sendall(f"{place.process_id} {socket.gethostname()}\n".encode())
                connection.settimeout(left)
                if connection.makefile().readline() == "go\n":
                    return
        except OSError:
            pass
        time.sleep(0.1)


def _numbers(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:16])) + (", ..." if len(processes) > 16 else "")
    return f"process{'es' if len(processes) > 1 else ''} {shown}"
