"""Several processes as one run: how they wait for each other, agree and hand each other numbers.

Every process of a run executes the same program on the same arguments. A process sees the devices of its own host as
local ones and all devices as one mesh; arrays that are cut over hosts are "global". With one process everything here
is immediate. How they meet: rendezvous.py.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from v2t_jax import progress
from v2t_jax.errors import InputError

BARRIER_SECONDS = 600.0  # between hosts that do the same work: far above a slow disk, far below a night
LAST_WORDS_SECONDS = 2
_HOSTS = "v2t/hosts"
_barriers = 0


def _client() -> Any:
    """JAX's connection to process 0. It has no public name; Orbax, too, takes it from here."""
    from jax._src import distributed

    return distributed.global_state.client


def introduce() -> None:
    """Says this process's host to the others, once it has met them."""
    if _client() is not None:
        _client().key_value_set(f"{_HOSTS}/{jax.process_index()}", socket.gethostname())
        progress.note(
            f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
            f"{jax.local_device_count()} of {jax.device_count()} devices"
        )


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


def explained(error: jax.errors.JaxRuntimeError) -> InputError | None:
    """What a person can do about an error of JAX's own; None where nothing is known of it."""
    gist = (str(error).splitlines() or [""])[0]
    if "RESOURCE_EXHAUSTED" in gist:
        return InputError(
            f"A device's memory is too small ({gist}): take smaller batches (in training, or more --STAGE.optimizer."
            "accumulate-steps), or cut the weights over more devices (--mesh.fsdp)."
        )
    if is_several():
        return InputError(
            f"The processes of the run have lost each other ({gist}): see why one of them ended, then start all of "
            "them again; training goes on from the newest checkpoint."
        )
    return None


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
