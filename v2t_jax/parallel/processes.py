"""Multi-process helpers: start-up, barrier, broadcast, gather, global arrays.

Every process of a run executes the same program with the same arguments, and sees all devices as one mesh.
"""

import contextlib
import glob
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from v2t_jax import progress
from v2t_jax.config import DistributedConfig
from v2t_jax.errors import InputError

LAST_WORDS_SECONDS = 2
# How a collective operation fails when a process is gone: by status code, or by the library's own words.
_LOST = re.compile(
    r"^(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b|\bGloo\b|\bNCCL\b|[Cc]onnection (reset|closed|refused)"
    r"|[Cc]oordination service|heartbeat"
)

broadcast = multihost_utils.broadcast_one_to_all
barrier = multihost_utils.sync_global_devices


class Place(NamedTuple):
    """A process's place in a run; empty where JAX reads it from Slurm, Open MPI, Kubernetes or the TPU."""

    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None
    process_id: int | None = None


@dataclass(frozen=True)
class Share:
    """The part of a list of files that host `index` of `count` writes."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(f"There is no host {self.index} of {self.count}; hosts are counted from 0.")

    def has(self, number: int) -> bool:
        return number % self.count == self.index


def find_place(options: DistributedConfig, environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place given by the command line or the environment; None for a run of one process."""
    coordinator = options.coordinator or environ.get("V2T_COORDINATOR", "") or "auto"
    if coordinator == "none":
        return None
    if coordinator == "auto" and not (options.num_processes or environ.get("V2T_NUM_PROCESSES")):
        return Place() if _in_cluster(environ) else None
    count, number = _numbers(options, environ)
    port = re.fullmatch(r".+:(\d{1,5})", coordinator)
    if port is None or int(port[1]) > 65535 or count is None or number is None or number >= count:
        raise InputError(
            f"The processes can't meet with coordinator {coordinator}, num_processes {count} and process_id {number}; "
            "pass --distributed.coordinator HOST:PORT of process 0, .num-processes, and .process-id below that (or set "
            "V2T_COORDINATOR, V2T_NUM_PROCESSES and V2T_PROCESS_ID)."
        )
    return Place(coordinator, count, number) if count > 1 else None


def find_share(options: DistributedConfig, environ: Mapping[str, str] = os.environ) -> Share:
    """This process's share of work for which the processes need not meet."""
    explicit = options.num_processes or environ.get("V2T_NUM_PROCESSES")
    if options.coordinator == "none" or not (explicit or _in_cluster(environ)):
        return Share()
    count, number = _numbers(options, environ)
    if (count is None) != (number is None):
        raise InputError("Pass both --distributed.num-processes and .process-id, or set both V2T_ variables.")
    return Share() if count is None else Share(number or 0, count)


def _numbers(options: DistributedConfig, environ: Mapping[str, str]) -> tuple[int | None, int | None]:
    """The number of processes and this one's own, as far as they are known."""

    def known(given: int | None, *names: str) -> int | None:
        name = next((name for name in names if given is None and environ.get(name)), None)
        if name is None:
            return given
        if not environ[name].isdigit():
            raise InputError(f"The environment variable {name} is {environ[name]!r}; it must be a whole number.")
        return int(environ[name])

    return (
        known(options.num_processes, "V2T_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"),
        known(options.process_id, "V2T_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"),
    )


def _in_cluster(environ: Mapping[str, str]) -> bool:
    """Whether this is one of several processes started together. JAX finds out which, but fails outside a cluster."""

    def several(count: str) -> bool:
        return environ.get(count, "1") not in ("", "1")

    return (
        (several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environ)
        or (several("OMPI_COMM_WORLD_SIZE") and "OMPI_COMM_WORLD_RANK" in environ)
        or several("MEGASCALE_NUM_SLICES")
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or _on_tpu_vm(environ)
        or ("JOB_COMPLETION_INDEX" in environ and find_spec("kubernetes") is not None)
    )


def _on_tpu_vm(environ: Mapping[str, str]) -> bool:
    """Whether a TPU's metadata can be asked. Notebooks with a TPU have none, and say so in a variable."""
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    allowed = "tpu" in environ.get("JAX_PLATFORMS", "tpu") and "TPU_SKIP_MDS_QUERY" not in environ
    return bool(devices) and allowed and find_spec("libtpu") is not None


def start(options: DistributedConfig) -> None:
    """Joins this process to its run; call it before JAX touches a device."""
    place = find_place(options)
    if place is None:
        return
    where = f" at {place.coordinator}" if place.coordinator else ""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM outside the training loop
    # At its own timeout JAX aborts the process with a stack trace; this comes first, with a sentence.
    late = threading.Timer(options.timeout, _give_up, [options.timeout, where])
    late.daemon = True
    late.start()
    try:
        if place.coordinator and place.process_id == 0:  # jaxlib 0.10 may crash where the port is taken
            socket.create_server(("", int(place.coordinator.rpartition(":")[2]))).close()
        with progress.stage(f"waiting for the other processes{where}"):
            jax.distributed.initialize(
                *place,
                # Under Slurm, JAX would otherwise give an explicitly placed process one GPU of its node.
                cluster_detection_method="deactivate" if place.coordinator else None,
                initialization_timeout=int(options.timeout) + 60,
            )
    except (RuntimeError, ValueError, OSError, KeyError, ImportError) as error:
        if place == Place() and "SLURM_NTASKS" not in os.environ and _on_tpu_vm(os.environ):
            return  # a TPU VM without metadata works alone
        raise InputError(
            f"The processes can't connect{where} ({gist(error)}); check that all are started, can reach process 0 and "
            "that its port is free, or pass --distributed.coordinator HOST:PORT, .num-processes and .process-id."
        ) from error
    finally:
        late.cancel()
    progress.note(
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices"
    )


def _give_up(seconds: float, where: str) -> NoReturn:
    advice = "check that all are started and can reach process 0, then start all of them again."
    print(f"v2t: Not all processes connected{where} within {seconds:g} s; {advice}", file=sys.stderr, flush=True)
    os._exit(2)  # not `leave`, which asks the devices


def is_main() -> bool:
    """Whether this process logs and writes what all processes share."""
    return jax.process_index() == 0


def is_several() -> bool:
    """Whether the run has other processes. Touches no device."""
    return bool(jax.distributed.is_initialized()) and jax.process_count() > 1


@contextlib.contextmanager
def main_first(what: str) -> Iterator[bool]:
    """Runs the block with True on process 0, then with False on the others; `what` names the barrier."""
    if not is_main():
        barrier(what)
    yield is_main()
    if is_main():
        barrier(what)


def put(tree: Any, shardings: Any) -> Any:
    """Lays out arrays (whole on every process, or global) as `shardings`: a tree like it, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        return jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__)

    placed = jax.tree.map(place, tree, shardings)
    if jax.tree.map(lambda leaf: leaf.sharding, placed) == shardings:
        return placed
    # In one program: on CPU devices, several that exchange data at the same time deadlock.
    return jax.jit(lambda tree: tree, out_shardings=shardings)(placed)


def fetch(tree: Any, main_only: bool = False) -> Any:
    """The same tree of whole numpy arrays on every process, or of None on all but process 0; all must call it."""

    def whole(leaf: Any) -> np.ndarray | None:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf) if is_main() or not main_only else None

    return jax.tree.map(whole, tree)


def shared(items: Sequence[Any], work: Callable[[list[Any]], np.ndarray]) -> np.ndarray:
    """`work(items)` [n, ...] on every process, each computing a share; all must call it with the same items."""
    count = jax.process_count()
    if count == 1:
        return work(list(items))
    # Padded, so that all have the same number.
    mine = [items[i % len(items)] for i in range(jax.process_index(), -(-len(items) // count) * count, count)]
    parts = multihost_utils.process_allgather(work(mine))  # [processes, items of each, ...]
    return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])[: len(items)]


def local_rows(sharding: NamedSharding, rows: int) -> slice:
    """The smallest range of a batch's rows that covers those of this process's devices."""
    held = [index[0].indices(rows)[:2] for index in sharding.addressable_devices_indices_map((rows,)).values() if index]
    return slice(min(start for start, _ in held), max(stop for _, stop in held))


def global_batch(sharding: NamedSharding, local: np.ndarray, rows: slice, batch_size: int) -> jax.Array:
    """One array [batch_size, ...] over all devices from each process's own `local_rows`."""

    # Not by `make_array_from_process_local_data`: on a TPU slice, a host's devices need not hold neighboring rows.
    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index
        start, stop, _ = index[0].indices(batch_size)
        return local[(slice(start - rows.start, stop - rows.start), *index[1:])]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)


def local_batch(array: jax.Array, rows: slice) -> np.ndarray:
    """The inverse of `global_batch`: this process's rows of an array that is split by rows."""
    local = np.zeros((rows.stop - rows.start, *array.shape[1:]), array.dtype)
    for shard in array.addressable_shards:
        start = (shard.index[0].start or 0) - rows.start
        local[start : start + len(shard.data)] = shard.data
    return local


def gather(value: Any) -> list[Any]:
    """Every process's `value` (JSON types), in process order; all must call it."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = multihost_utils.process_allgather(np.pad(data, (0, int(lengths.max()) - len(data))))
    return [json.loads(row[:n].tobytes()) for row, n in zip(padded, lengths, strict=True)]


class Vote:
    """The largest number that any process cast one step earlier: read a step later, it keeps no device waiting.

    JAX's `reached_preemption_sync_point` knows no Ctrl-C, and takes SIGTERM away from Python for good.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._votes = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._cast: jax.Array | None = None

    def __call__(self, value: int) -> int:
        """Casts `value`; returns the previous call's result, or `value` where there is one process."""
        if jax.process_count() == 1:
            return value
        before = 0 if self._cast is None else int(self._cast)
        mine = np.full(self._votes.num_devices, value, np.int32)
        self._cast = self._largest(jax.make_array_from_callback(mine.shape, self._votes, mine.__getitem__))
        return before


def explained(error: Exception) -> InputError | None:
    """What a user can do about an error of JAX's runtime, if that is known."""
    first = gist(error)
    if "RESOURCE_EXHAUSTED" in first:
        return InputError(
            f"A device's memory is too small ({first}); use smaller batches (in training, or more --STAGE.optimizer."
            "accumulate-steps), or split the weights over more devices (--mesh.fsdp)."
        )
    if is_several() and _LOST.search(first):
        return InputError(
            f"A collective operation failed ({first}); another process probably exited: check its log, then start all "
            "processes again to go on from the newest checkpoint."
        )
    return None


def gist(error: Exception) -> str:
    """An error's first line, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def leave(status: int) -> NoReturn:
    """Ends one of several processes at once: an ordinary exit would wait for the others."""
    if is_several() and is_main():
        time.sleep(LAST_WORDS_SECONDS)  # for the others' own messages: JAX aborts them once process 0 is gone
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
