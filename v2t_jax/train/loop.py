"""Training from start to end: a recipe and a work directory in, a model folder out.

WORKDIR/config.json                 the recipe; a run with other decisive settings is refused
WORKDIR/inputs.json                 hashes of embedder, vocabulary and texts; others are refused
WORKDIR/STAGE/log.jsonl             one line every `log_every_steps`
WORKDIR/STAGE/samples.jsonl         held-out texts and their recovered versions
WORKDIR/STAGE/checkpoints/          by Orbax; a stage resumes from the newest
WORKDIR/model/                      the finished model, for `v2t_jax.load`
WORKDIR/evaluation.{json,png}       its scores on held-out texts, by correction steps and beam width
"""

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from v2t_jax import progress
from v2t_jax.config import STAGES, Config, Stage, StageConfig, to_dict
from v2t_jax.data.batches import Batches
from v2t_jax.data.dataset import resumable
from v2t_jax.data.recipe import make_batches
from v2t_jax.embedders.black_box import embed_once
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.eval.evaluate import evaluate, plot
from v2t_jax.eval.metrics import text_scores
from v2t_jax.eval.model_card import model_card
from v2t_jax.inversion.api import invert_on_all_hosts, invert_strings
from v2t_jax.inversion.pipeline import CARD_HEAD, InversionPipeline, norm_statistics
from v2t_jax.models.layers import Params
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import OnMesh, batch_sharding, make_mesh
from v2t_jax.train.checkpoint import Checkpoints
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.setup import (
    NORM_TEXTS,
    TrainContext,
    check_batches,
    column_names,
    initial_params,
    prepare,
    trained_network,
)
from v2t_jax.train.step import (
    Batch,
    FrozenParams,
    Metrics,
    TrainState,
    frozen_shardings,
    make_hypothesize,
    make_step,
    shard_step,
)
from v2t_jax.train.workdir import Log, check_workdir, claim_workdir, open_log

EDITED_CALLS = 400  # of the embedder for a held-out text, where evaluation during training edits
StopSignal = Callable[[], int]  # SIGINT or SIGTERM once it has arrived, 0 before


class TrainingStopped(Exception):
    """The run was interrupted, by a scheduler's SIGTERM (`preempted`) or by Ctrl-C, and saved; it can be resumed."""

    def __init__(self, message: str, preempted: bool):
        super().__init__(message)
        self.preempted = preempted


def train(config: Config, workdir: Path) -> Path:
    """Runs the recipe's stages, each from its newest checkpoint if there is one, and returns the model's folder.

    Raises:
        TrainingStopped: SIGINT or SIGTERM arrived; everything is saved.
    """
    with resumable("The run", workdir):
        check_workdir(config, workdir)  # first, because it takes a moment and the rest a minute
        mesh = make_mesh(config.mesh)
        check_batches(config, mesh)
        processes.barrier("looked at the work directory")  # before process 0 writes there
        context = prepare(config)
        claim_workdir(config, workdir, context.hashes())
        params: dict[Stage, Params] = {}
        for stage in STAGES:
            if stage not in config.stages and getattr(config, f"initial_{stage}"):
                params[stage] = trained_network(context, stage, mesh)
        with stop_signals() as stop_signal:
            for stage in config.stages:
                params[stage] = train_stage(context, stage, workdir / stage, params, stop_signal)
        inverter, folder = context.inverter(params), workdir / "model"
        inverter.embedding_norm = norm_statistics(embed_once(context.embedder, context.held_out[:NORM_TEXTS]))
        whole = dataclasses.replace(inverter, params=processes.fetch(params, main_only=True))
        with processes.main_first("written the model") as here:
            if here:
                whole.save(folder, record={"recipe": to_dict(config)})
        del whole
        if context.in_step and config.embedder_dtype != "float32":  # scores are for the exact embedder's vectors
            inverter = dataclasses.replace(inverter, embedder=load_embedder(config.embedder))
        settings = config.evaluation
        num_steps = settings.num_steps if inverter.has_corrector else (0,)
        report = evaluate(inverter, context.held_out[: settings.num_examples], num_steps, settings.sequence_beam_width)
        if processes.is_main():
            (workdir / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
            plot(report, workdir / "evaluation.png")
            card = model_card(to_dict(config), report, f"{jax.device_count()} x {jax.devices()[0].device_kind}")
            (folder / "README.md").write_text(CARD_HEAD + card, encoding="utf-8")
    return folder


def train_stage(
    context: TrainContext, stage: Stage, folder: Path, trained: dict[Stage, Params], stop_signal: StopSignal
) -> Params:
    """Trains one network to its recipe's number of steps and returns its parameters."""
    config = context.config
    settings: StageConfig = getattr(config, stage)
    mesh, last, every = make_mesh(config.mesh), settings.num_steps, config.evaluation.every_steps
    columns = [context.columns[name] for name in column_names(config, stage).values()]
    batches = make_batches(config, context.datasets, settings.batch_size, columns)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
    step_fn, state = _start(context, stage, trained, batches, checkpoints)
    reads = stage == "ranker" or (stage == "corrector" and not config.data.hypotheses)
    frozen = context.frozen(trained["inverter"] if reads else None)
    frozen = processes.put(frozen, frozen_shardings(mesh, frozen))
    feed, vote = Feed(context, stage, batches, frozen, mesh), processes.Vote(mesh)
    watch = _Watch(stage, settings.optimizer.skip_bad_updates, checkpoints)
    probe, compiled, first = context.inverter({}), set[int](), int(state.step)
    with (
        progress.bar(last, f"training the {stage}", unit="steps", start=first) as update,
        open_log(folder / "log.jsonl", until=first) as log,
        open_log(folder / "samples.jsonl", until=first) as samples,
    ):
        if first < last:
            upcoming = feed.start(first)
        for step in range(first + 1, last + 1):
            batch = upcoming()
            if step < last:  # made while this one runs
                upcoming = feed.start(step)
            width = batch.ids.shape[1]
            with nullcontext() if width in compiled else progress.stage(f"compiling the step for {width} tokens"):
                state, metrics = step_fn(state, frozen, batch)
            watch.add(step, metrics, batch.ids.size)
            if width not in compiled:
                compiled.add(width)
                watch.restart()
            update(step)
            stopping = vote(stop_signal())  # whichever process got the signal, all stop at the same step
            logging = step % config.log_every_steps == 0 or step == last
            saving = step % config.checkpoint.every_steps == 0 or step == last
            if logging or saving or stopping:
                watch.check()
            if logging:
                record = watch.record(settings.batch_size)
                log(record)
                update(step, loss=record["loss"], accuracy=record["token_accuracy"])
            if saving or stopping:
                checkpoints.save(step, state)
            if (every and step % every == 0) or step == last:
                with progress.stage(f"recovering held-out texts at step {step}"):
                    probe.params = context.decodable(dict(trained) | {stage: state.params})
                    log({"step": step} | evaluate_stage(context, probe, samples, step))
                    probe.release()
                watch.restart()
            if stopping:
                checkpoints.close()
                raise TrainingStopped(
                    f"stopped at step {step} of the {stage}; everything is saved: run the same command to resume",
                    preempted=stopping == signal.SIGTERM,
                )
    checkpoints.close()
    return state.params


def _start(
    context: TrainContext, stage: Stage, trained: dict[Stage, Params], batches: Batches, checkpoints: Checkpoints
) -> tuple[OnMesh, TrainState]:
    """A stage's step, and the state it begins with: new, or the newest checkpoint's."""
    settings: StageConfig = getattr(context.config, stage)
    mesh, options = make_mesh(context.config.mesh), settings.optimizer
    task = context.task(stage)
    optimizer, loss = make_optimizer(options, settings.num_steps, task.shared_table), task.loss
    step_fn = make_step(loss, optimizer, options.accumulate_steps, context.config.seed, options.skip_bad_updates > 0)

    def first_state(params: Params) -> TrainState:
        # Copied, because the first step gives the state's memory up, and two leaves may be one array.
        return TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))

    abstract = jax.eval_shape(first_state, NETWORKS[stage](context.model).abstract_params())
    step_fn, shardings = shard_step(step_fn, mesh, abstract, stage)
    if checkpoints.latest() is None:
        with progress.stage(f"making the {stage}'s first parameters"):
            params = initial_params(context, stage, trained, batches, mesh)
            return step_fn, jax.jit(first_state, out_shardings=shardings)(params)
    with progress.stage(f"restoring the {stage}"):
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        state = checkpoints.restore(like)
    if (step := int(state.step)) > settings.num_steps:
        raise InputError(
            f"The {stage} is already at step {step}; {stage}.num_steps={settings.num_steps} would end before it: give "
            "more steps, or a new --workdir."
        )
    progress.note(f"{stage}: resuming from step {step}")
    return step_fn, state


class Feed:
    """Batches on their devices, made a step ahead: ids, columns, and tokens for an embedder with its own vocabulary.

    For these the host retokenizes texts, and the corrector's hypotheses, which a program of their own makes while the
    step before is still running.
    """

    def __init__(self, context: TrainContext, stage: Stage, batches: Batches, frozen: FrozenParams, mesh: Mesh) -> None:
        settings: StageConfig = getattr(context.config, stage)
        self._context, self._batches, self._frozen = context, batches, frozen
        self._columns = column_names(context.config, stage)
        self._size, self._sharding = settings.batch_size, batch_sharding(mesh)
        self._rows = processes.local_rows(self._sharding, self._size)
        self._hypothesize: OnMesh | None = None
        if context.retokenizes and frozen.inverter is not None and not context.config.data.hypotheses:
            parts, seed = settings.optimizer.accumulate_steps, context.config.seed
            self._hypothesize = make_hypothesize(context.task(stage), parts, seed, mesh)

    def start(self, step: int) -> Callable[[], Batch]:
        """Begins to make a step's batch; the function returned waits for it."""
        ids, columns = self._batches(step, self._rows), self._batches.columns(step, self._rows)
        read: dict[str, Any] = {field: columns[name] for field, name in self._columns.items()}
        local = Batch(ids, **read)
        if self._context.retokenizes and local.embedding is None:
            local = local._replace(tokens=self._context.retokenize(ids))
        batch = self._global(local)
        if self._hypothesize is None:
            return lambda: batch
        hypotheses = self._hypothesize(self._frozen, batch, jnp.int32(step))

        def finish() -> Batch:
            tokens = self._context.retokenize(processes.local_batch(hypotheses, self._rows))
            return batch._replace(hypothesis=hypotheses, hypothesis_tokens=self._global(tokens))

        return finish

    def _global(self, local: Any) -> Any:
        return jax.tree.map(lambda x: processes.global_batch(self._sharding, x, self._rows, self._size), local)


class _Watch:
    """Looks at past steps' metrics: the host runs one step ahead of the device, NaN stops the run, rates are logged."""

    def __init__(self, stage: Stage, allowed: int, checkpoints: Checkpoints) -> None:
        self._stage, self._checkpoints = stage, checkpoints
        self._allowed = allowed  # updates with a loss or gradient that isn't finite, which the step skips
        self._unchecked: list[tuple[int, Metrics, int]] = []
        self._last: tuple[int, Metrics]
        self._since, self._timed = time.perf_counter(), list[tuple[float, int]]()

    def add(self, step: int, metrics: Metrics, positions: int) -> None:
        """Waits for the step before this one: what is shown as done is done."""
        self._unchecked.append((step, metrics, positions))
        if len(self._unchecked) > 1:
            jax.block_until_ready(self._unchecked[-2][1])

    def check(self) -> None:
        """Refuses losses and gradients since the last call that aren't finite, if they are too many."""
        for step, metrics, positions in processes.fetch(self._unchecked):  # arrays, the steps too
            # A finite loss with a gradient that isn't has spoilt the parameters, unless the update is skipped.
            finite = math.isfinite(metrics.loss) and math.isfinite(metrics.gradient_norm)
            if not finite and (not self._allowed or metrics.bad_updates > self._allowed):
                kept = self._checkpoints.latest()
                self._checkpoints.close()
                raise InputError(
                    f"The {self._stage}'s loss is {metrics.loss} and its gradient's norm {metrics.gradient_norm} at "
                    f"step {step}; {f'the checkpoint of step {kept} is untouched' if kept else 'nothing was saved yet'}"
                    ": lower the learning rate or clip the gradient, in a new --workdir."
                )
            self._last = int(step), metrics
            self._timed.append((float(metrics.tokens), int(positions)))
        self._unchecked.clear()

    def restart(self) -> None:
        """Leaves what ran until now, compilation or evaluation, out of the log's rates."""
        self.check()
        self._since, self._timed = time.perf_counter(), []

    def record(self, batch_size: int) -> dict[str, Any]:
        """The last checked step as a line of the log, with the rates since the line before."""
        step, metrics = self._last
        line: dict[str, Any] = {"step": step}
        line |= {name: round(float(getattr(metrics, name)), 4) for name in ("loss", "token_accuracy", "gradient_norm")}
        if self._allowed:
            line["bad_updates"] = int(metrics.bad_updates)
        if self._timed:
            seconds, (tokens, positions) = time.perf_counter() - self._since, map(sum, zip(*self._timed, strict=True))
            line["sequences_per_second"] = round(len(self._timed) * batch_size / seconds, 1)
            line["tokens_per_second"] = round(tokens / seconds, 1)
            line["padding_share"] = round(1 - tokens / positions, 4)
            self.restart()
        return line


def evaluate_stage(context: TrainContext, inverter: InversionPipeline, samples: Log, step: int) -> dict[str, float]:
    """Scores on held-out texts with the current parameters: greedy, then one correction step, or edits by a ranker."""
    references = context.held_out[: context.config.evaluation.num_examples]
    options: dict[str, Any] = {"num_steps": int(inverter.has_corrector), "sequence_beam_width": 1}
    # This mode scores the corrected text even where the first guess was better; with a vocabulary of its own, a model
    # would write up to 127 tokens in it.
    if "ranker" in inverter.params:
        options |= {"search": "edits", "budget": EDITED_CALLS}
    elif inverter.shares_vocabulary:
        options["mode"] = "upstream"
    predictions = [one.text for one in invert_on_all_hosts(invert_strings, inverter, references, **options)]
    scores = text_scores(predictions, references)
    for prediction, reference in list(zip(predictions, references, strict=True))[:10]:
        samples({"step": step, "reference": reference, "recovered": prediction})
    return {f"held_out_{name}": round(value.mean, 4) for name, value in scores.items()}


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Turns SIGINT and SIGTERM into a number while training runs; a second one ends the process the ordinary way."""
    arrived = 0

    def handle(signum: int, _: Any) -> None:
        nonlocal arrived
        arrived = signum
        progress.note("stopping after this step; everything will be saved")
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: arrived
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
