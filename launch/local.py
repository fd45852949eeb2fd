#!/usr/bin/env python3
"""Runs a command as several processes on this machine, each with its own CPU devices, like the hosts of a pod.

    python launch/local.py --processes 2 --devices 4 -- v2t train configs/tiny.py --workdir runs/tiny

Each output line starts with its process's number. Ctrl-C and SIGTERM go to all processes, so the run stops as a whole;
when one process fails, the others are stopped and its exit status is returned. A third signal kills.

Cost: none. Time: the processes share this machine's cores, so this tests a run but doesn't speed it up.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import BinaryIO

PATIENCE = 20.0  # seconds that the other processes have once one has failed


def environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """The environment of a process: its place in the run and its CPU devices."""
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}"]
    # Many devices on few cores may take long to meet; that is not a deadlock.
    flags += ["--xla_cpu_multi_thread_eigen=false", "--xla_cpu_collective_call_terminate_timeout_seconds=600"]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": " ".join(flags).strip(),
        "V2T_COORDINATOR": f"127.0.0.1:{port}" if processes > 1 else "none",
        "V2T_NUM_PROCESSES": str(processes),
        "V2T_PROCESS_ID": str(process),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def show(process: int, stream: BinaryIO, lock: threading.Lock) -> None:
    """Prints whole lines of a process, each with its number."""
    for line in stream:
        with lock:
            sys.stdout.buffer.write(f"[{process}] ".encode() + line.rstrip(b"\n") + b"\n")
            sys.stdout.buffer.flush()


def run(command: list[str], processes: int, devices: int) -> int:
    """Returns the exit status: 0, or that of the first process that failed (128 + n after signal n)."""
    port, lock = free_port(), threading.Lock()
    started = [
        subprocess.Popen(
            command,
            env=environment(i, processes, devices, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C comes through here, once
        )
        for i in range(processes)
    ]

    signals = 0

    def pass_on(signum: int, _: object) -> None:
        nonlocal signals
        signals += 1  # the first stops a run in order, the second at once; a process stuck in a collective ignores both
        for process in started:
            if process.poll() is None:
                process.send_signal(signum if signals < 3 else signal.SIGKILL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, pass_on)
    shown = [
        threading.Thread(target=show, args=(i, process.stdout, lock), daemon=True) for i, process in enumerate(started)
    ]
    for thread in shown:
        thread.start()
    failed: tuple[int, int] | None = None
    ends = 0.0
    while any(process.poll() is None for process in started):
        for i, process in enumerate(started):
            if failed is None and process.poll():
                failed, ends = (i, process.returncode), time.monotonic() + PATIENCE
        if failed is not None and time.monotonic() > ends - PATIENCE + 2:
            for process in started:
                if process.poll() is None:
                    process.terminate() if time.monotonic() < ends else process.kill()
        time.sleep(0.1)
    for thread in shown:
        thread.join(5)
    codes = [process.returncode for process in started]
    if failed is None and any(codes):  # all ended in the same moment
        failed = next((i, code) for i, code in enumerate(codes) if code)
    if failed is None:
        return 0
    status = failed[1] if failed[1] > 0 else 128 - failed[1]
    print(f"local.py: process {failed[0]} ended with status {status}, and the run with it", file=sys.stderr)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each process")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, after --")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.processes < 1 or options.devices < 1:
        parser.error("give at least one process, one device and, after --, a command")
    if options.dry_run:
        for i in range(options.processes):
            given = environment(i, options.processes, options.devices, 12345)
            changed = [f"{name}={value!r}" for name, value in given.items() if os.environ.get(name) != value]
            print(f"[{i}]", *changed, *command)
        return
    raise SystemExit(run(command, options.processes, options.devices))


if __name__ == "__main__":
    main()
