"""The attacker who trains: the inverter learns on what a defence leaves of public texts (`v2t defend --adapt`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax import progress
from v2t_jax.config import OptimizerConfig
from v2t_jax.data.split import read_texts
from v2t_jax.decode.state import EOS, PAD
from v2t_jax.defences.measure import Attacked
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.models.layers import Params
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.step import Batch, FrozenParams, Task, TrainState, make_step

BATCH = 64
OPTIMIZER = OptimizerConfig(learning_rate=3e-4, schedule="linear", warmup_steps=0)


def tuning(model: InversionPipeline, num_steps: int, public: np.ndarray) -> Callable[[Attacked], Params]:
    """`tune(attacked)` -> the inverter's parameters, trained on from the model's own.

    It learns on the attacker's estimates of `public`, embeddings [N, E] of the training split's first N texts. Token
    embeddings stay: the ranker reads them too.
    """
    length, before = model.config.max_length, model.params["inverter"]
    encoded = model.vocabulary.encode(read_texts("wordnet", "train", limit=len(public)))
    fits = np.array([i for i, ids in enumerate(encoded) if 0 < len(ids) < length and ids.min() >= 0])
    texts = np.full((len(fits), length), PAD, np.int32)
    for row, i in enumerate(fits):
        texts[row, : len(encoded[i]) + 1] = [*encoded[i], EOS]
    optimizer, task = (
        make_optimizer(OPTIMIZER, num_steps, True),
        Task("inverter", model.config, None, None, shared_table=True),
    )
    step: Any = jax.jit(make_step(task.loss, optimizer, accumulate_steps=1, seed=0), donate_argnums=0)
    frozen = FrozenParams(None, jnp.asarray(model.vocabulary.vocab_map))

    def tune(one: Attacked) -> Params:
        estimates = one.attack(one.defence.store(public))
        rng, own = np.random.default_rng(0), jax.tree.map(jnp.copy, before)  # the step takes its memory
        state = TrainState(jnp.int32(0), own, jax.jit(optimizer.init)(own))
        with progress.bar(num_steps, "adapting the inverter", unit="steps") as update:
            for i in range(num_steps):
                rows = rng.integers(len(fits), size=BATCH)
                state, metrics = step(state, frozen, Batch(texts[rows], estimates[fits[rows]]))
                update(i + 1, loss=round(float(metrics.loss), 3))
        return state.params

    return tune
