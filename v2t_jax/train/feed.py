"""Batches on their devices, prepared a step ahead: ids, columns, and tokens for an embedder with its own vocabulary.

Where embedder and model share a vocabulary, a batch is ids alone. Otherwise the host retokenizes: texts, and the
corrector's hypotheses, which a program of their own makes while the step before is still running.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from v2t_jax.config import Stage, StageConfig
from v2t_jax.data.batches import Batches
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import batch_sharding
from v2t_jax.train.setup import TrainContext, column_names
from v2t_jax.train.step import Batch, FrozenParams, make_hypothesize, shard_hypothesize


class Fed(NamedTuple):
    """A step's batch, and the number of its tokens that aren't padding (taken to be alike on all hosts)."""

    batch: Batch
    tokens: float


class Feed:
    """Makes the batch of any step of a stage."""

    def __init__(self, context: TrainContext, stage: Stage, batches: Batches, frozen: FrozenParams, mesh: Mesh) -> None:
        config = context.config
        settings: StageConfig = getattr(config, stage)
        self._context, self._batches, self._frozen = context, batches, frozen
        self._columns = column_names(config, stage)
        self._size, self._sharding = settings.batch_size, batch_sharding(mesh)
        self._rows = processes.local_rows(self._sharding, self._size)
        self._hypothesize: Callable[..., jax.Array] | None = None
        if context.retokenizes and frozen.inverter is not None:
            assert context.in_step is not None
            self._hypothesize = shard_hypothesize(
                make_hypothesize(
                    *(context.model, context.in_step.config, config.partial_hypotheses, config.mesh.decode),
                    *(settings.optimizer.accumulate_steps, config.seed),
                ),
                mesh,
            )

    def start(self, step: int) -> Callable[[], Fed]:
        """Begins to make a step's batch; the function returned waits for it."""
        ids = self._batches(step, self._rows)
        read = self._batches.columns(step, self._rows)
        columns: dict[str, Any] = {field: read[name] for field, name in self._columns.items()}
        local = Batch(ids, **columns)
        if self._context.retokenizes and local.embedding is None:
            local = local._replace(tokens=self._context.retokenize(ids))
        batch = self._global(local)
        tokens = float((ids != 0).sum()) * self._size / len(ids)
        if self._hypothesize is None:
            return lambda: Fed(batch, tokens)
        hypotheses = self._hypothesize(self._frozen, batch, jnp.int32(step))

        def finish() -> Fed:
            retokenized = self._context.retokenize(processes.local_batch(hypotheses, self._rows))
            made = batch._replace(hypothesis=hypotheses, hypothesis_tokens=self._global(retokenized))
            return Fed(made, tokens)

        return finish

    def _global(self, local: Any) -> Any:
        def place(array: np.ndarray) -> jax.Array:
            return processes.global_batch(self._sharding, array, self._rows, self._size)

        return jax.tree.map(place, local)
