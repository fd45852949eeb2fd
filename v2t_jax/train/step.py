"""The training step: texts' ids in, new state and metrics out; one jitted, sharded program.

The frozen embedder runs inside it, and for the corrector so does the inverter's greedy decoding. A batch may bring what
can't be computed here: columns, and texts in the tokens of an embedder with another vocabulary (`loop.Feed`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from v2t_jax.config import DecodeLayout, ModelConfig, Stage
from v2t_jax.decode.sample import first_argmax, greedy
from v2t_jax.decode.state import EOS, PAD, arranged, truncate_after_eos
from v2t_jax.models.embedder import EmbedderConfig, TokenMap, embed_model_ids, embed_with_states
from v2t_jax.models.embedder import embed as embed_tokens
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.layers import Params
from v2t_jax.models.ranker import NETWORKS, Ranker
from v2t_jax.models.t5 import TABLE, round_weights
from v2t_jax.parallel.mesh import (
    OnMesh,
    batch_sharding,
    decoding_params,
    param_specs,
    replicated,
    spread_rows,
    state_shardings,
)
from v2t_jax.train.ranking import align, learned_slots, ranking_losses

LEAST_EDITED, MOST_EDITED = 0.06, 0.7  # share of a text's tokens that `edited_hypotheses` edits
MOVE_DEVIATION = 3.0  # by how many places it moves one
LIKELY = 64  # tokens that it draws from
STATES_A_TEXT = 2  # edited hypotheses of each text that the ranker learns from
BLIND_SHARE = 0.12  # of them, whose hidden states the ranker doesn't see, as with a black box


class TrainState(NamedTuple):
    """Everything a run needs to resume: the data position and the dropout keys are functions of `step`."""

    step: jax.Array  # [] int32, batches seen
    params: Params
    optimizer: Any
    bad_updates: Any = np.zeros((), np.int32)  # [] int32, updates so far whose loss or gradient wasn't finite


Tokens = tuple[Any, ...]  # texts in the embedder's own tokens: ids and mask, int32 [B, M]


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

    embedder: Any  # None: its network doesn't run here, and batches bring the embeddings
    vocab_map: jax.Array  # [V] int32, model id -> embedder id
    inverter: Any = None  # makes hypotheses


class Metrics(NamedTuple):
    """Scalars of one step, float32."""

    loss: jax.Array  # mean cross entropy over tokens that aren't padding, nats
    token_accuracy: jax.Array
    gradient_norm: jax.Array  # before clipping
    tokens: jax.Array  # tokens that aren't padding
    bad_updates: jax.Array  # int32, as in the state


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """logits [B, L, V], labels [B, L] with pad 0 -> summed loss, (correct tokens, tokens); padding doesn't count.

    The vocabulary axis is reduced by sums and maxima only: where it is sharded, three numbers per position are
    exchanged (Shoeybi et al. 2019, section 3); indexing would gather the logits.
    """
    weights = (labels != PAD).astype(jnp.float32)
    best = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    shifted = logits - best[..., None]
    is_label = jnp.arange(logits.shape[-1])[None, None] == labels[..., None]
    chosen = jnp.sum(jnp.where(is_label, shifted, 0.0), axis=-1)
    losses = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - chosen
    # The loss needs the maximum anyway; an argmax would be another pass over the logits.
    correct = (chosen >= 0).astype(jnp.float32)
    return jnp.sum(losses * weights), (jnp.sum(correct * weights), jnp.sum(weights))


def greedy_hypotheses(
    config: ModelConfig, params: Params, e: jax.Array, *_: Any, decode: DecodeLayout = "batch"
) -> jax.Array:
    """The inverter's greedy outputs, ids [B, L]; on a mesh in the layout `decode` (parallel/mesh.py)."""
    params = decoding_params({**params, "t5": round_weights(config.t5, params["t5"])}, Inverter.PARAM_AXES, decode)

    def run(e: jax.Array) -> jax.Array:
        tokens_to_logits, cache = Inverter(config).start_decoding(params, e)
        return greedy(tokens_to_logits, cache, batch_size=e.shape[0], max_length=config.max_length).ids

    return spread_rows(run, decode, e)


def mixed_hypotheses(config: ModelConfig, params: Params, e: jax.Array, ids: jax.Array, key: jax.Array) -> jax.Array:
    """The texts `ids` [B, L] with a random share of tokens replaced by what the inverter predicts from those before.

    Later steps of the loop meet nearly correct hypotheses, which the inverter's outputs rarely are. One teacher-forced
    pass makes these, at a fraction of decoding's cost.
    """
    k_share, k_tokens = jax.random.split(key)
    logits = Inverter(config).apply({"params": params}, e, ids)
    guess = first_argmax(logits.reshape(-1, logits.shape[-1])).reshape(ids.shape)
    share = jax.random.uniform(k_share, (ids.shape[0], 1))
    replace = (jax.random.uniform(k_tokens, ids.shape) < share) & (guess != PAD)
    return truncate_after_eos(jnp.where(replace & (ids != EOS) & (ids != PAD), guess, ids))


def edited_hypotheses(
    config: ModelConfig, params: Params, e: jax.Array, ids: jax.Array, key: jax.Array, copies: int = 1
) -> jax.Array:
    """The texts `ids` [B, L] with tokens lost, replaced, added and moved: [B * copies, L + 2], or max_length if less.

    A search by guided edits stands at such hypotheses: most words right, some missing, some out of place. New tokens
    are drawn from those that the inverter takes for likely at their place, or repeat the text's own. How much is edited
    differs from text to text.
    """
    k_share, k_fate, k_new, k_added, k_moved, k_distance, k_where, k_own, k_place = jax.random.split(key, 9)
    rows = jnp.repeat(ids, copies, axis=0)
    logits = Inverter(config).apply({"params": params}, e, ids)
    # In the order of ids: in that of logits, where they nearly tie, a draw would depend on the devices' rounding.
    likely = jnp.sort(jax.lax.top_k(logits, min(LIKELY, logits.shape[2]))[1], axis=2)
    top = jnp.take_along_axis(logits, likely, axis=2)
    top, likely = (jnp.repeat(x, copies, axis=0) for x in (top, likely))

    def drawn(key: jax.Array) -> jax.Array:
        return jnp.take_along_axis(likely, jax.random.categorical(key, top)[..., None], axis=2)[..., 0]

    is_token, uniform = rows > EOS, lambda key: jax.random.uniform(key, rows.shape)
    share = LEAST_EDITED + (MOST_EDITED - LEAST_EDITED) * jax.random.uniform(k_share, (len(rows), 1)) ** 1.5
    fate = uniform(k_fate) / share  # below 0.4 a token is replaced, below 0.65 lost
    kept = jnp.where(is_token, jnp.where(fate < 0.4, drawn(k_new), jnp.where(fate < 0.65, PAD, rows)), PAD)
    own = (uniform(k_own) * jnp.sum(is_token, axis=1, keepdims=True)).astype(jnp.int32)
    added = jnp.where(uniform(k_place) < 0.3, jnp.take_along_axis(rows, own, axis=1), drawn(k_added))
    added = jnp.where((uniform(k_where) < 0.45 * share) & (rows != PAD), added, PAD)
    place = jnp.arange(ids.shape[1], dtype=jnp.float32)[None]
    far = MOVE_DEVIATION * jax.random.normal(k_distance, rows.shape)
    behind = place + jnp.where(uniform(k_moved) < 0.3 * share, far, 0.0)
    before = jnp.broadcast_to(place - 0.5, rows.shape)
    tokens, places = jnp.concatenate([added, kept], axis=1), jnp.concatenate([before, behind], axis=1)
    return arranged(tokens, places, min(ids.shape[1] + 2, config.max_length))


@dataclass(frozen=True)
class Task:
    """What a stage's step computes: losses, and before them embeddings and the corrector's hypotheses."""

    stage: Stage
    model: ModelConfig
    embedder: EmbedderConfig | None  # None: it can't run inside the step
    token_map: TokenMap | None  # None: it has another vocabulary than the model
    partial_hypotheses: bool = False
    edited_hypotheses: bool = False
    decode: DecodeLayout = "batch"
    shared_table: bool = False  # whose token embeddings aren't trained

    def embed(self, frozen: FrozenParams, ids: Any, tokens: Tokens | None = None, embedding: Any = None) -> jax.Array:
        """[B, E], from the last argument that isn't None."""
        if embedding is not None:
            return embedding.astype(jnp.float32)
        assert self.embedder is not None
        if tokens is not None:
            rows, run = tokens, functools.partial(embed_tokens, self.embedder, frozen.embedder)
        else:
            assert self.token_map is not None
            weights = frozen.embedder, frozen.vocab_map
            rows, run = (ids,), functools.partial(embed_model_ids, self.embedder, self.token_map, *weights)
        return jax.lax.stop_gradient(spread_rows(run, "batch", *rows))

    def hypotheses(self, frozen: FrozenParams, e: jax.Array, ids: jax.Array, key: jax.Array | None) -> jax.Array:
        """What is to be corrected [B, max_length]: the inverter's outputs, and, with a key, what the recipe mixes in.

        The ranker learns from edited hypotheses alone.
        """
        kinds: list[Callable[..., jax.Array]] = [functools.partial(greedy_hypotheses, decode=self.decode)]
        if key is not None and self.stage == "ranker":
            kinds = [edited_hypotheses]
        elif key is not None:
            edited, partial = [edited_hypotheses] * self.edited_hypotheses, [mixed_hypotheses] * self.partial_hypotheses
            kinds += edited + partial + edited * bool(partial)
        # Rows in turn rather than in blocks, so that a device keeps its own rows.
        rows = [x.reshape(-1, len(kinds), x.shape[1]) for x in (e, ids)]
        made = [kind(self.model, frozen.inverter, *(x[:, i] for x in rows), key) for i, kind in enumerate(kinds)]
        made = [jnp.pad(x, ((0, 0), (0, self.model.max_length - x.shape[1]))) for x in made]
        return jnp.stack(made, axis=1).reshape(-1, self.model.max_length)

    def loss(self, params: Params, frozen: FrozenParams, batch: Batch, key: jax.Array | None) -> Any:
        """Summed loss, (correct tokens, tokens); without a key there is no dropout."""
        e = self.embed(frozen, batch.ids, batch.tokens, batch.embedding)
        if self.stage == "ranker":
            return self.ranker_loss(params, frozen, batch, e, key)
        inputs: tuple[jax.Array, ...] = (e,)
        if self.stage != "inverter":
            partial_key, key = (None, None) if key is None else jax.random.split(key)
            hypothesis = batch.hypothesis
            if hypothesis is None:
                hypothesis = self.hypotheses(frozen, e, batch.ids, partial_key)
            inputs = e, hypothesis, self.embed(frozen, hypothesis, batch.hypothesis_tokens, batch.hypothesis_embedding)
        if self.shared_table:
            params = {**params, "t5": {**params["t5"], TABLE: jax.lax.stop_gradient(params["t5"][TABLE])}}
        network, rngs = NETWORKS[self.stage](self.model), {} if key is None else {"dropout": key}
        return cross_entropy(network.apply({"params": params}, *inputs, batch.ids, rngs=rngs), batch.ids)

    def ranker_loss(
        self, params: Params, frozen: FrozenParams, batch: Batch, e: jax.Array, key: jax.Array | None
    ) -> Any:
        """As `loss`, of several hypotheses a text where they are made and embedded here."""
        k_edits, k_blind, k_slots = (None,) * 3 if key is None else jax.random.split(key, 3)
        text, hypothesis, tokens = batch.ids, batch.hypothesis, batch.hypothesis_tokens
        if hypothesis is None and k_edits is not None:
            hypothesis = edited_hypotheses(self.model, frozen.inverter, e, text, k_edits, STATES_A_TEXT)
            e, text = (jnp.repeat(x, STATES_A_TEXT, axis=0) for x in (e, text))
        elif hypothesis is None:
            hypothesis = self.hypotheses(frozen, e, text, None)
        states = jnp.zeros((*hypothesis.shape, self.model.state_width))
        if not self.model.state_width:
            embedding = self.embed(frozen, hypothesis, tokens, batch.hypothesis_embedding)
        else:
            assert self.embedder is not None and self.token_map is not None
            weights = frozen.embedder, frozen.vocab_map
            run = functools.partial(embed_with_states, self.embedder, self.token_map, *weights)
            embedding, states = jax.lax.stop_gradient(spread_rows(run, "batch", hypothesis))
            if k_blind is not None:
                states *= jax.random.bernoulli(k_blind, 1 - BLIND_SHARE, (len(states), 1, 1))
        found = align(hypothesis, text)
        slots = learned_slots(found, k_slots)
        table = jax.lax.stop_gradient(frozen.inverter["t5"][TABLE])
        ranking = Ranker(self.model).apply({"params": params}, table, e, hypothesis, embedding, states, slots)
        return ranking_losses(ranking, slots, found, hypothesis, text)


def make_hypothesize(task: Task, accumulate_steps: int, seed: int, mesh: Mesh) -> OnMesh:
    """`hypothesize(frozen, batch, step) -> [B, max_length]`: the corrector's hypotheses, for a host to retokenize."""

    def part(frozen: FrozenParams, rows: Batch, key: jax.Array) -> jax.Array:
        return task.hypotheses(frozen, task.embed(frozen, rows.ids, rows.tokens, rows.embedding), rows.ids, key)

    def hypothesize(frozen: FrozenParams, batch: Batch, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        if accumulate_steps == 1:
            return part(frozen, batch, key)
        parts = _micro_batches(batch, accumulate_steps), jax.random.split(key, accumulate_steps)
        found = jax.lax.map(lambda given: part(frozen, *given), parts)
        return found.swapaxes(0, 1).reshape(-1, task.model.max_length)

    rows = batch_sharding(mesh)
    return OnMesh(jax.jit(hypothesize, in_shardings=(None, rows, replicated(mesh)), out_shardings=rows), mesh)


def _micro_batches(batch: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...], with every n-th row rather than n-th part: a device keeps its own rows."""
    return jax.tree.map(lambda rows: rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1), batch)


def make_step(
    loss_fn: Callable, optimizer: optax.GradientTransformation, accumulate_steps: int, seed: int, skip_bad: bool = False
) -> Callable[[TrainState, FrozenParams, Any], tuple[TrainState, Metrics]]:
    """`step(state, frozen, batch) -> (state, metrics)`, summing gradients of `accumulate_steps` micro-batches.

    With `skip_bad`, an update with a non-finite loss or gradient leaves parameters and optimizer unchanged.
    """

    def step(state: TrainState, frozen: FrozenParams, batch: Any) -> tuple[TrainState, Metrics]:
        gradients = functools.partial(jax.value_and_grad(loss_fn, has_aux=True), state.params, frozen)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate_steps == 1:
            (loss, (correct, tokens)), grads = gradients(batch, key)
        else:
            zero = jnp.float32(0)
            zeros = (zero, (zero, zero)), jax.tree.map(jnp.zeros_like, state.params)
            parts = _micro_batches(batch, accumulate_steps), jax.random.split(key, accumulate_steps)
            ((loss, (correct, tokens)), grads), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, gradients(*part)), None), zeros, parts
            )
        grads = jax.tree.map(lambda g: g / tokens, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        new = optax.apply_updates(state.params, updates), optimizer_state
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if skip_bad:
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (state.params, state.optimizer))
        bad_updates = state.bad_updates + jnp.where(finite, 0, 1).astype(jnp.int32)
        metrics = Metrics(loss / tokens, correct / tokens, norm, tokens, bad_updates)
        return TrainState(state.step + 1, *new, bad_updates), metrics

    return step


def shard_step(step: Callable, mesh: Mesh, state: Any, stage: Stage) -> tuple[OnMesh, Any]:
    """The step jitted over `mesh`, donating the old state, and the shardings of `state` (of arrays or shapes)."""
    shardings = state_shardings(mesh, state, param_specs(state.params, NETWORKS[stage].PARAM_AXES))
    given, made = (shardings, None, batch_sharding(mesh)), (shardings, replicated(mesh))
    return OnMesh(jax.jit(step, in_shardings=given, out_shardings=made, donate_argnums=0), mesh), shardings


def frozen_shardings(mesh: Mesh, frozen: FrozenParams) -> FrozenParams:
    """The inverter is sharded as in its training; the embedder, small beside a training state, is replicated."""
    shardings: Any = jax.tree.map(lambda _: replicated(mesh), frozen)
    if frozen.inverter is None:
        return shardings
    cut = state_shardings(mesh, frozen.inverter, param_specs(frozen.inverter, Inverter.PARAM_AXES))
    return shardings._replace(inverter=cut)
