"""What dividing a training step over devices costs: v2t bench scaling.

Weak scaling: every device has the same number of rows, on 1, 2, 4 and 8 CPU devices of one process and on two
processes of four. The devices share this machine's cores, so the time of a step says nothing; what is compared is the
processor time of all threads of all processes for one example, relative to one device. Ideal is 1.0: more is the
overhead of dividing (collectives, and each device's own copy of the optimiser's work). Beside it stand the bytes that
each kind of collective moves in a step, from the compiled program (`bench.collectives`).

The step is `v2t train`'s, of an inverter; a bag of random vectors stands in for the embedder.
"""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.bench import num_cores
from v2t_jax.bench.collectives import totals
from v2t_jax.config import DistributedConfig, MeshConfig, ModelConfig, OptimizerConfig, T5Config
from v2t_jax.errors import InputError
from v2t_jax.models import inverter
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.step import TrainState, cross_entropy, make_step, shard_step

LAYOUTS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 4))  # (processes, devices of each)
T5 = T5Config(vocab_size=2048, d_model=128, d_kv=32, d_ff=512, num_heads=4, num_encoder_layers=2, num_decoder_layers=2)


@dataclass(frozen=True)
class Scaling:
    """Measures weak scaling of the training step over CPU devices and processes."""

    rows: int = 16
    """rows of each device"""
    num_tokens: int = 32
    steps: int = 5
    """that are timed, after two that aren't"""
    fsdp: int = 1
    """devices that share one copy of the parameters, where there are so many"""
    json: bool = False
    """print one JSON document and nothing else"""

    def __post_init__(self) -> None:
        for name in ("rows", "num_tokens", "steps", "fsdp"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    def run(self) -> None:
        rows = compare(self)
        if self.json:
            print(json.dumps({"cores": num_cores(), "jax": jax.__version__, "rows": self.rows, "results": rows}))
            return
        print(f"weak scaling, {self.rows} rows a device, {num_cores()} shared cores, jax {jax.__version__}")
        for row in rows:
            moved = ", ".join(f"{n['count']} {kind} {n['bytes']:,} B" for kind, n in row["collectives"].items())
            print(
                f"{row['processes']} x {row['devices'] // row['processes']} devices: "
                f"{1000 * row['cpu_seconds_per_example']:.2f} ms of processor time an example, "
                f"{row['overhead']:.2f} of one device's; collectives a step: {moved or 'none'}"
            )


def measure(options: Scaling) -> dict[str, Any]:
    """This process's part of a layout: processor seconds an example over all processes, and collectives a step."""
    devices = jax.device_count()
    config = ModelConfig(t5=T5, embedding_width=128, num_pseudo_tokens=8, max_length=options.num_tokens)
    optimizer = make_optimizer(OptimizerConfig(), num_steps=1000)
    mesh = make_mesh(MeshConfig(fsdp=min(options.fsdp, devices)))

    def loss(params: Any, table: jax.Array, ids: jax.Array, key: jax.Array) -> Any:
        total, correct, tokens = cross_entropy(inverter.logits(config, params, table[ids].mean(axis=1), ids, key), ids)
        return total, (correct, tokens)

    def first_state(key: jax.Array) -> TrainState:
        params = inverter.init(config, key)
        return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))

    key = jax.random.key(0)
    step, shardings = shard_step(make_step(loss, optimizer, 1, 0), mesh, jax.eval_shape(first_state, key), "inverter")
    state = jax.jit(first_state, out_shardings=shardings)(key)
    rng, batch = np.random.default_rng(0), options.rows * devices
    table = rng.standard_normal((T5.vocab_size, config.embedding_width), np.float32)
    frozen = processes.put(table, replicated(mesh))
    all_ids = rng.integers(2, T5.vocab_size, (batch, options.num_tokens)).astype(np.int32)
    ids = processes.put(all_ids, batch_sharding(mesh))
    compiled = step.lower(state, frozen, ids).compile()
    for _ in range(2):
        state, metrics = jax.block_until_ready(compiled(state, frozen, ids))
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(options.steps):
        state, metrics = jax.block_until_ready(compiled(state, frozen, ids))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    examples = options.steps * batch
    return {
        "processes": jax.process_count(),
        "devices": devices,
        "cpu_seconds_per_example": sum(processes.gather(cpu)) / examples,
        "examples_per_second": examples / wall,
        "collectives": totals(compiled.as_text()),
    }


def run_layout(options: Scaling, processes: int, devices: int) -> dict[str, Any]:
    """A layout's numbers, from processes of its own.

    Raises:
        InputError: one of them failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from v2t_jax.bench.scaling import worker; worker(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(asdict(options))]
    started = []
    for i in range(processes):
        environ = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false "
            "--xla_cpu_collective_call_terminate_timeout_seconds=600",
            "V2T_COORDINATOR": f"127.0.0.1:{port}" if processes > 1 else "none",
            "V2T_NUM_PROCESSES": str(processes),
            "V2T_PROCESS_ID": str(i),
        }
        environ.pop("JAX_NUM_CPU_DEVICES", None)
        started.append(
            subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate() for process in started]
    failed = [error for process, (_, error) in zip(started, outputs, strict=True) if process.returncode]
    if failed:
        reason = (failed[0].strip().splitlines() or ["no word"])[-1]
        raise InputError(f"{processes} processes of {devices} devices failed: {reason}")
    found: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return found


def compare(options: Scaling, layouts: tuple[tuple[int, int], ...] = LAYOUTS) -> list[dict[str, Any]]:
    """`measure` of every layout, with "overhead": processor time an example relative to the first layout."""
    rows = [run_layout(options, *layout) for layout in layouts]
    base = rows[0]["cpu_seconds_per_example"]
    return [row | {"overhead": row["cpu_seconds_per_example"] / base} for row in rows]


def worker(options: str) -> None:
    """A process of a layout."""
    processes.start(DistributedConfig())
    print(json.dumps(measure(Scaling(**json.loads(options)))))
