"""The training step: texts' ids in, new state and metrics out; one jitted, sharded program.

The frozen embedder runs inside it, and for the corrector so does the inverter's greedy decoding: nothing is cached on
disk, and every span and every epoch has its own embeddings. A batch may bring what can't be computed here (feed.py):
columns of a data set, and the texts in the tokens of an embedder that doesn't share the model's vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from v2t_jax.config import DecodeLayout, ModelConfig, Stage
from v2t_jax.decode.sample import first_argmax, greedy
from v2t_jax.decode.state import EOS, PAD, truncate_after_eos
from v2t_jax.models.corrector import NETWORKS, Corrector
from v2t_jax.models.embedder import EmbedderConfig, TokenMap, embed_model_ids
from v2t_jax.models.embedder import embed as embed_tokens
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import round_weights
from v2t_jax.parallel.mesh import (
    OnMesh,
    batch_sharding,
    decoding_params,
    param_specs,
    replicated,
    spread_rows,
    state_shardings,
)


class TrainState(NamedTuple):
    """Everything a run needs to resume: the data position and the dropout keys are functions of `step`."""

    step: jax.Array  # [] int32, batches seen
    params: Params
    optimizer: Any
    bad_updates: Any = np.zeros((), np.int32)  # [] int32, updates so far whose loss or gradient wasn't finite


class Tokens(NamedTuple):
    """Texts in the embedder's own tokens, int32 [B, M]."""

    ids: Any
    mask: Any


class Batch(NamedTuple):
    """What a step learns from; what is None is computed on the fly."""

    ids: Any  # [B, L] int32
    embedding: Any = None  # [B, E], of ids
    tokens: Tokens | None = None  # ids retokenized, to compute `embedding` from
    hypothesis: Any = None  # [B, max_length] int32, to be corrected
    hypothesis_embedding: Any = None  # [B, E]
    hypothesis_tokens: Tokens | None = None


class FrozenParams(NamedTuple):
    """Weights that training reads but doesn't update."""

    embedder: Params | None  # None: its network doesn't run here, and batches bring the embeddings
    vocab_map: jax.Array  # [V] int32, model id -> embedder id
    inverter: Params | None = None  # makes the corrector's hypotheses


class Metrics(NamedTuple):
    """Scalars of one step, float32."""

    loss: jax.Array  # mean cross entropy over tokens that aren't padding, nats
    token_accuracy: jax.Array
    gradient_norm: jax.Array  # before clipping
    tokens: jax.Array  # tokens that aren't padding
    bad_updates: jax.Array  # int32, as in the state


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """logits [B, L, V], labels [B, L] with pad 0 -> summed loss, correct tokens, tokens; padding doesn't count.

    The vocabulary axis is reduced by sums and maxima only: where it is sharded, each device works on its own tokens and
    three numbers per position are exchanged (Shoeybi et al. 2019, section 3); indexing would gather the logits.
    """
    weights = (labels != PAD).astype(jnp.float32)
    best = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    shifted = logits - best[..., None]
    is_label = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
    chosen = jnp.sum(jnp.where(is_label, shifted, 0.0), axis=-1)
    losses = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - chosen
    # The loss needs the maximum anyway; an argmax would be another pass over the logits.
    correct = (chosen >= 0).astype(jnp.float32)
    return jnp.sum(losses * weights), jnp.sum(correct * weights), jnp.sum(weights)


def greedy_hypotheses(config: ModelConfig, params: Params, e: jax.Array, decode: DecodeLayout = "batch") -> jax.Array:
    """The inverter's greedy outputs, ids [B, L]; on a mesh in the layout `decode` (parallel/mesh.py)."""
    params = decoding_params({**params, "t5": round_weights(config.t5, params["t5"])}, Inverter.PARAM_AXES, decode)
    return spread_rows(functools.partial(_greedy, config, params), decode, e)


def _greedy(config: ModelConfig, params: Params, e: jax.Array) -> jax.Array:
    tokens_to_logits, cache = Inverter(config).start_decoding(params, e)
    decoded = greedy(tokens_to_logits, cache, batch_size=e.shape[0], max_length=config.max_length)
    return decoded.ids


def mixed_hypotheses(config: ModelConfig, params: Params, e: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
    """The texts `ids` [B, L] with a random share of tokens replaced by what the inverter predicts from those before.

    The share is uniform in 0..1 for each text. In later steps of the loop a corrector meets nearly correct hypotheses,
    which the inverter's outputs rarely are. One teacher-forced pass makes these, at a fraction of decoding's cost.
    """
    k_share, k_tokens = jax.random.split(key)
    logits = Inverter(config).apply({"params": params}, e, ids)
    guess = first_argmax(logits.reshape(-1, logits.shape[-1])).reshape(ids.shape)
    share = jax.random.uniform(k_share, (ids.shape[0], 1))
    replace = (jax.random.uniform(k_tokens, ids.shape) < share) & (guess != PAD)
    return truncate_after_eos(jnp.where(replace & (ids != EOS) & (ids != PAD), guess, ids))


def training_hypotheses(
    config: ModelConfig,
    params: Params,
    e: jax.Array,
    ids: jax.Array,
    partial_key: jax.Array | None,
    decode: DecodeLayout = "batch",
) -> jax.Array:
    """The corrector's input [B, max_length]: the inverter's outputs; with a key, every other one is mixed."""
    if partial_key is None:
        return greedy_hypotheses(config, params, e, decode)
    # Every other row rather than one half, so that a device keeps its own rows.
    e, ids = e.reshape(-1, 2, e.shape[1]), ids.reshape(-1, 2, ids.shape[1])
    partial = mixed_hypotheses(config, params, e[:, 1], ids[:, 1], partial_key)
    partial = jnp.pad(partial, ((0, 0), (0, config.max_length - partial.shape[1])))
    both = jnp.stack([greedy_hypotheses(config, params, e[:, 0], decode), partial], axis=1)
    return both.reshape(-1, config.max_length)


def make_embed(
    embedder: EmbedderConfig | None, token_map: TokenMap | None
) -> Callable[[FrozenParams, jax.Array, Tokens | None, jax.Array | None], jax.Array]:
    """`embed(frozen, ids, tokens, embedding) -> [B, E]`, from the last of these that isn't None.

    Args:
        embedder: None if it can't run inside the step.
        token_map: None if it has another vocabulary than the model.
    """

    def embed(frozen: FrozenParams, ids: jax.Array, tokens: Tokens | None, embedding: jax.Array | None) -> jax.Array:
        if embedding is not None:
            return embedding.astype(jnp.float32)
        if embedder is None or frozen.embedder is None or (token_map is None and tokens is None):
            raise ValueError("batches must bring embeddings, or tokens of an embedder that runs here")
        run: Callable[..., jax.Array] = functools.partial(embed_tokens, embedder, frozen.embedder)
        if tokens is not None:
            return jax.lax.stop_gradient(spread_rows(run, "batch", *tokens))
        assert token_map is not None
        run = functools.partial(embed_model_ids, embedder, token_map, frozen.embedder, frozen.vocab_map)
        return jax.lax.stop_gradient(spread_rows(run, "batch", ids))

    return embed


def make_loss(
    stage: Stage,
    model: ModelConfig,
    embedder: EmbedderConfig | None,
    token_map: TokenMap | None,
    partial_hypotheses: bool = False,
    decode: DecodeLayout = "batch",
) -> Callable[[Params, FrozenParams, Batch, jax.Array | None], tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
    """`loss(params, frozen, batch, dropout_key) -> (summed loss, (correct tokens, tokens))`; see `make_embed`."""
    embed = make_embed(embedder, token_map)

    def inverter_loss(params: Params, frozen: FrozenParams, batch: Batch, key: jax.Array | None) -> Any:
        e = embed(frozen, batch.ids, batch.tokens, batch.embedding)
        logits = Inverter(model).apply({"params": params}, e, batch.ids, rngs=_dropout(key))
        loss, correct, tokens = cross_entropy(logits, batch.ids)
        return loss, (correct, tokens)

    def corrector_loss(params: Params, frozen: FrozenParams, batch: Batch, key: jax.Array | None) -> Any:
        e = embed(frozen, batch.ids, batch.tokens, batch.embedding)
        partial_key, key = (None, None) if key is None else jax.random.split(key)
        hypothesis = batch.hypothesis
        if hypothesis is None:
            assert frozen.inverter is not None
            partial_key = partial_key if partial_hypotheses else None
            hypothesis = training_hypotheses(model, frozen.inverter, e, batch.ids, partial_key, decode)
        e_hat = embed(frozen, hypothesis, batch.hypothesis_tokens, batch.hypothesis_embedding)
        logits = Corrector(model).apply({"params": params}, e, hypothesis, e_hat, batch.ids, rngs=_dropout(key))
        loss, correct, tokens = cross_entropy(logits, batch.ids)
        return loss, (correct, tokens)

    return inverter_loss if stage == "inverter" else corrector_loss


def _dropout(key: jax.Array | None) -> dict[str, jax.Array]:
    """Random numbers for a network in training; without a key there is no dropout."""
    return {} if key is None else {"dropout": key}


def make_hypothesize(
    model: ModelConfig,
    embedder: EmbedderConfig,
    partial_hypotheses: bool,
    decode: DecodeLayout,
    accumulate_steps: int,
    seed: int,
) -> Callable[[FrozenParams, Batch, jax.Array], jax.Array]:
    """`hypothesize(frozen, batch, step) -> [B, max_length]`: the corrector's hypotheses as a program of its own.

    For an embedder with another vocabulary, which the host must retokenize them for before the step can embed them.
    """
    embed = make_embed(embedder, None)

    def hypothesize(frozen: FrozenParams, batch: Batch, step: jax.Array) -> jax.Array:
        def part(given: tuple[Batch, jax.Array]) -> jax.Array:
            rows, key = given
            e = embed(frozen, rows.ids, rows.tokens, rows.embedding)
            assert frozen.inverter is not None
            return training_hypotheses(model, frozen.inverter, e, rows.ids, key if partial_hypotheses else None, decode)

        key = jax.random.fold_in(jax.random.key(seed), step)
        if accumulate_steps == 1:
            return part((batch, key))
        keys = jax.random.split(key, accumulate_steps)
        found = jax.lax.map(part, (_micro_batches(batch, accumulate_steps), keys))
        return found.swapaxes(0, 1).reshape(-1, model.max_length)

    return hypothesize


def _micro_batches(batch: Any, count: int) -> Any:
    """A batch's arrays [B, ...] as [count, B / count, ...]."""
    # Every n-th row rather than n-th part, so that a device keeps its own rows.
    return jax.tree.map(lambda rows: rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1), batch)


def make_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    accumulate_steps: int,
    seed: int,
    skip_bad: bool = False,
) -> Callable[[TrainState, FrozenParams, Any], tuple[TrainState, Metrics]]:
    """`step(state, frozen, batch) -> (state, metrics)`, summing gradients of `accumulate_steps` micro-batches.

    A batch is whatever the loss takes, a tree of arrays [B, ...].

    With `skip_bad`, an update with a non-finite loss or gradient leaves parameters and optimizer unchanged.
    """

    def gradients(params: Params, frozen: FrozenParams, batch: Any, key: jax.Array) -> Any:
        (loss, (correct, tokens)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, batch, key)
        return grads, (loss, correct, tokens)

    def step(state: TrainState, frozen: FrozenParams, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate_steps == 1:
            grads, sums = gradients(state.params, frozen, batch, key)
        else:
            micro = _micro_batches(batch, accumulate_steps)
            keys = jax.random.split(key, accumulate_steps)
            zeros = jax.tree.map(jnp.zeros_like, state.params), (jnp.float32(0),) * 3

            def add(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradients(state.params, frozen, *part)), None

            (grads, sums), _ = jax.lax.scan(add, zeros, (micro, keys))
        loss, correct, tokens = sums
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if skip_bad:
            old = state.params, state.optimizer
            params, optimizer_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, optimizer_state), old
            )
        bad_updates = state.bad_updates + jnp.where(finite, 0, 1).astype(jnp.int32)
        metrics = Metrics(loss / tokens, correct / tokens, norm, tokens, bad_updates)
        return TrainState(state.step + 1, params, optimizer_state, bad_updates), metrics

    return step


def shard_step(step: Callable, mesh: Mesh, state: Any, stage: Stage) -> tuple[OnMesh, Any]:
    """Jits `step` over `mesh`: batches split over (data, fsdp), parameters by PARAM_AXES, frozen weights as they are.

    Args:
        state: a TrainState, of arrays or of shapes.
    Returns:
        the step, which donates the old state, and the state's shardings.
    """
    specs = param_specs(state.params, NETWORKS[stage].PARAM_AXES)
    shardings = state_shardings(mesh, state, specs)
    jitted = jax.jit(
        step,
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    return OnMesh(jitted, mesh), shardings


def shard_hypothesize(hypothesize: Callable, mesh: Mesh) -> OnMesh:
    """Jits `make_hypothesize`'s function over `mesh`, with batches as in the step."""
    rows = batch_sharding(mesh)
    return OnMesh(jax.jit(hypothesize, in_shardings=(None, rows, replicated(mesh)), out_shardings=rows), mesh)


def frozen_shardings(mesh: Mesh, frozen: FrozenParams) -> Any:
    """The inverter is sharded as in its training; the embedder, small beside a training state, is replicated."""
    whole: Any = replicated(mesh)
    cut = None
    if frozen.inverter is not None:
        cut = state_shardings(mesh, frozen.inverter, param_specs(frozen.inverter, Inverter.PARAM_AXES))
    return FrozenParams(jax.tree.map(lambda _: whole, frozen.embedder), whole, cut)
