"""Compiles train steps on meshes of eight devices in a process of its own, for what XLA says while it does.

Prints one JSON line for each: its name and the arrays that all-gathers leave. A last program, which XLA can't but
rematerialize, shows that its warning would be seen.
"""

import json
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from v2t_jax.config import MeshConfig, ModelConfig, OptimizerConfig, T5Config
from v2t_jax.models.embedder import EmbedderConfig, TokenMap
from v2t_jax.models.encoders import BertConfig, TextEncoder
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.parallel.mesh import OnMesh, make_mesh
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.step import (
    Batch,
    FrozenParams,
    Task,
    TrainState,
    frozen_shardings,
    make_step,
    shard_step,
)

VOCAB, ROWS, LENGTH = 88, 16, 8
MODEL = ModelConfig(
    t5=T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_encoder_layers=2, num_decoder_layers=2),
    embedding_width=16,
    num_pseudo_tokens=2,
    max_length=LENGTH,
)
EMBEDDER = EmbedderConfig(BertConfig(VOCAB, 16, 2, 2, 32, 64, 2), width=16)
CASES = [("inverter", MeshConfig(2, 2, 2)), ("corrector", MeshConfig(1, 4, 2))]
MARK = "the control begins"


def gathered(hlo_text: str) -> list[list[int]]:
    """The shapes of what all-gathers leave."""
    found = []
    for line in hlo_text.splitlines():
        if match := re.search(r"= (.*?) all-gather(-start)?\(", line):
            found += [[int(n) for n in dims.split(",")] for dims in re.findall(r"\w+\[([\d,]+)\]", match[1])]
    return found


def train_step(stage: str, config: MeshConfig) -> str:
    mesh = make_mesh(config)
    params = NETWORKS[stage](MODEL).abstract_params()
    optimizer = make_optimizer(OptimizerConfig(), 10)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, jax.eval_shape(optimizer.init, params))
    step = make_step(Task(stage, MODEL, EMBEDDER, TokenMap((2,), 3)).loss, optimizer, 1, 0)
    frozen = FrozenParams(
        {"encoder": TextEncoder(EMBEDDER.encoder).abstract_params()},
        jax.ShapeDtypeStruct((VOCAB,), jnp.int32),
        NETWORKS["inverter"](MODEL).abstract_params() if stage == "corrector" else None,
    )
    program, shardings = shard_step(step, mesh, state, stage)
    frozen = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), frozen, frozen_shardings(mesh, frozen)
    )
    return program.lower(state, frozen, Batch(jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32))).compile().as_text()


def control() -> str:
    """A cut through two axes at once becomes one of rows."""

    def run(x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, "fsdp")).reshape(16, 2, 32)
        return nn.with_logical_constraint(jnp.tanh(x), ("batch", None, None)) * 2

    return OnMesh(jax.jit(run), make_mesh(MeshConfig(1, 4, 2))).lower(jnp.ones((16, 64))).compile().as_text()


if __name__ == "__main__":
    for stage, config in CASES:
        print(json.dumps([f"{stage} {config.data}x{config.fsdp}x{config.model}", gathered(train_step(stage, config))]))
    print(MARK, file=sys.stderr, flush=True)
    control()
