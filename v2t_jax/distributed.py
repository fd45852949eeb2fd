"""Several processes as one run: who they are, how they meet, agree and hand each other numbers.

Every process of a run executes the same program on the same arguments. A process sees the devices of its own host as
local ones and all devices as one mesh; arrays that are cut over hosts are "global". With one process everything here
is immediate.

Where the processes come from: --distributed.* (or V2T_COORDINATOR, V2T_NUM_PROCESSES, V2T_PROCESS_ID), else Slurm,
Open MPI, or a TPU's own environment and metadata, which JAX reads.
"""

import contextlib
import glob
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from v2t_jax import progress
from v2t_jax.config import DistributedConfig
from v2t_jax.errors import InputError

BARRIER_SECONDS = 600.0  # between hosts that do the same work: far above a slow disk, far below a night
LAST_WORDS_SECONDS = 2
_HOSTS = "v2t/hosts"
_barriers = 0


class Place(NamedTuple):
    """A process's place in a run; empty: JAX knows, which asks Slurm, Open MPI or the TPU."""

    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None
    process_id: int | None = None
    local_devices: Sequence[int] | None = None  # those of its host that are its own; None: all


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


def find_share(options: DistributedConfig) -> tuple[int, int]:
    """This process's number and how many there are, for work that needs no meeting: they may come one by one.

    Raises:
        InputError: see `find_place`.
    """
    place = find_place(options, meeting=False)
    if place == Place():
        place = _ask_jax(options.timeout)
    return (0, 1) if place is None else (int(place.process_id or 0), int(place.num_processes or 1))


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
    if _client() is not None:
        _client().key_value_set(f"{_HOSTS}/{jax.process_index()}", socket.gethostname())
        progress.note(
            f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
            f"{jax.local_device_count()} of {jax.device_count()} devices"
        )


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


def _client() -> Any:
    """JAX's connection to process 0. It has no public name; Orbax, too, takes it from here."""
    from jax._src import distributed

    return distributed.global_state.client


def is_main() -> bool:
    """Whether this process is the one that logs and writes what all have in common."""
    return jax.process_index() == 0


def is_several() -> bool:
    """Whether the run has other processes beside this one. Touches no device."""
    return bool(jax.distributed.is_initialized()) and jax.process_count() > 1


def barrier(what: str, seconds: float = BARRIER_SECONDS) -> None:
    """Waits for all processes.

    Args:
        what: what they are to have done, such as "written the model".
    Raises:
        InputError: some didn't come in time; it names their hosts.
    """
    global _barriers
    if jax.process_count() == 1:
        return
    _barriers += 1  # all processes meet at the same barriers in the same order
    client, name = _client(), f"v2t/barriers/{_barriers}"
    client.key_value_set(f"{name}/{jax.process_index()}", "here")
    try:
        client.wait_at_barrier(name, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        came = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(f"{name}/")}
        hosts = {int(key.rpartition("/")[2]): host for key, host in client.key_value_dir_get(f"{_HOSTS}/")}
        missing = [i for i in range(jax.process_count()) if i not in came]
        named = ", ".join(f"{i} ({hosts.get(i, 'unknown')})" for i in missing[:16]) or "one that failed meanwhile"
        raise InputError(
            f"Within {seconds:g} s not all processes have {what}; missing: {named}. See what became of it, then start "
            "all processes again, to go on from the newest checkpoint."
        ) from error


@contextlib.contextmanager
def main_first(what: str) -> Iterator[bool]:
    """Runs the block on process 0 with True; on the others, once that is done, with False."""
    if is_main():
        yield True
        barrier(what)
    else:
        barrier(what)
        yield False


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole, or global ones, laid out as `shardings` (a tree like it, or one for all).

    Each process copies only what its own devices need.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    placed = jax.tree.map(place, tree, shardings)
    if all(jax.tree.leaves(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, placed, shardings))):
        return placed
    # In one program: several that exchange data at a time lock each other on CPU devices.
    return jax.jit(_as_it_is, out_shardings=shardings)(placed)


def _as_it_is(tree: Any) -> Any:
    return tree


def fetch(tree: Any) -> Any:
    """The same tree of numpy arrays, whole, on every process; all must call it."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def fetch_to_main(tree: Any) -> Any:
    """`fetch` for process 0; the others get a tree of None. One array at a time is whole elsewhere."""

    def whole(leaf: Any) -> np.ndarray | None:
        fetched = fetch(leaf)
        return fetched if is_main() else None

    return jax.tree.map(whole, tree)


def broadcast(value: Any) -> Any:
    """Process 0's `value`, a tree of numpy arrays, on every process; all must call it with arrays of those shapes."""
    return multihost_utils.broadcast_one_to_all(value) if jax.process_count() > 1 else value


def shared(items: Sequence[Any], work: Callable[[list[Any]], np.ndarray]) -> np.ndarray:
    """`work(items)` [n, ...], each process doing its share; all must call it with the same items, and get all of it."""
    count = jax.process_count()
    if count == 1:
        return work(list(items))
    # Filled up, for all to have as many.
    mine = [items[i % len(items)] for i in range(jax.process_index(), -(-len(items) // count) * count, count)]
    parts = multihost_utils.process_allgather(work(mine))  # [processes, items of each, ...]
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])[: len(items)]


def local_rows(sharding: NamedSharding, rows: int) -> slice:
    """The rows of a batch of `rows` that this process's devices hold: the smallest range around them."""
    held = [index[0].indices(rows)[:2] for index in sharding.addressable_devices_indices_map((rows,)).values() if index]
    return slice(min(start for start, _ in held), max(stop for _, stop in held))


def global_batch(sharding: NamedSharding, local: np.ndarray, rows: slice, batch_size: int) -> jax.Array:
    """One array [batch_size, ...] over all devices from each process's own rows (`local_rows`)."""

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index
        start, stop, _ = index[0].indices(batch_size)
        return local[(slice(start - rows.start, stop - rows.start), *index[1:])]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)


def gather(value: Any) -> list[Any]:
    """Every process's `value`, JSON types, in their order; all must call it."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, int(lengths.max()) - len(data)))
    return [
        json.loads(row[:n].tobytes().decode())
        for row, n in zip(multihost_utils.process_allgather(padded), lengths, strict=True)
    ]


class Vote:
    """A number that every process says at each step, and the largest of them, which all learn a step later.

    Looked at in the step after, it never keeps the devices waiting: by then the step it was cast in has ended.
    """

    def __init__(self, sharding: NamedSharding, result: NamedSharding) -> None:
        self._sharding, self._devices = sharding, sharding.mesh.devices.size
        self._largest = jax.jit(jnp.max, out_shardings=result)
        self._cast: jax.Array | None = None

    def __call__(self, value: int) -> int:
        """The largest of what all processes said in the call before; this call's own, where there is one process."""
        if jax.process_count() == 1:
            return value
        before = 0 if self._cast is None else int(self._cast)
        mine = np.full(self._devices, value, np.int32)
        said = jax.make_array_from_callback(mine.shape, self._sharding, lambda index: mine[index])
        self._cast = self._largest(said)
        return before


def leave(status: int) -> NoReturn:
    """Ends one of several processes at once: an ordinary exit would wait for those that it has left behind.

    Process 0 gives the others time to say what ends them: without it, JAX ends them with a trace.
    """
    if is_several() and is_main():
        time.sleep(LAST_WORDS_SECONDS)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
