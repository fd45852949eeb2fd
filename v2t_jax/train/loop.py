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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from v2t_jax import progress
from v2t_jax.config import Config, Stage, StageConfig, to_dict
from v2t_jax.data.recipe import make_batches
from v2t_jax.embedders.black_box import embed_once
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.eval.evaluate import evaluate, plot
from v2t_jax.eval.metrics import text_scores
from v2t_jax.eval.model_card import model_card
from v2t_jax.inversion.api import embed_decoded, invert_on_all_hosts, invert_strings, run_correction
from v2t_jax.inversion.pipeline import CARD_HEAD, InversionPipeline, norm_statistics
from v2t_jax.models.corrector import NETWORKS
from v2t_jax.models.layers import Params
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import OnMesh, batch_sharding, make_mesh, replicated
from v2t_jax.train.checkpoint import Checkpoints
from v2t_jax.train.feed import Feed
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.setup import (
    NORM_TEXTS,
    TrainContext,
    check_batches,
    column_names,
    initial_params,
    prepare,
    trained_inverter,
)
from v2t_jax.train.step import (
    FrozenParams,
    Metrics,
    TrainState,
    frozen_shardings,
    make_loss,
    make_step,
    shard_step,
)
from v2t_jax.train.workdir import Log, check_workdir, claim_workdir


class TrainingStopped(Exception):
    """The run was interrupted and saved; the same command resumes it.

    Attributes:
        preempted: by SIGTERM, as from a scheduler; otherwise by Ctrl-C.
    """

    def __init__(self, message: str, preempted: bool):
        super().__init__(message)
        self.preempted = preempted


def train(config: Config, workdir: Path) -> Path:
    """Runs the recipe's stages, each from its newest checkpoint if there is one.

    Returns:
        The folder of the finished model.
    Raises:
        InputError: a setting or a source is wrong, `workdir` holds another recipe's run, the disk or a device's memory
            is full, or another process failed.
        TrainingStopped: SIGINT or SIGTERM arrived; everything is saved.
    """
    try:
        return _train(config, workdir)
    except jax.errors.JaxRuntimeError as error:
        fault = processes.explained(error)
        if fault is None:
            raise
        raise fault from error
    except OSError as error:
        raise InputError(
            f"The run stopped at {error.filename or workdir} ({error.strerror or error}); fix that, or free space, "
            "then run the same command to resume from the newest checkpoint."
        ) from error


def _train(config: Config, workdir: Path) -> Path:
    check_workdir(config, workdir)  # first, because it takes a moment and the rest a minute
    mesh = make_mesh(config.mesh)
    check_batches(config, mesh)
    processes.barrier("looked at the work directory")  # before process 0 writes there
    context = prepare(config)
    claim_workdir(config, workdir, context.hashes())
    params: dict[Stage, Params] = {}
    if config.initial_inverter:
        params["inverter"] = trained_inverter(context, mesh)
    with stop_signals() as stopped:
        for stage in config.stages:
            params[stage] = train_stage(context, stage, workdir / stage, params, stopped)
    norm = norm_statistics(embed_once(context.embedder, context.held_out[:NORM_TEXTS]))
    inverter = context.inverter(params)
    inverter.embedding_norm = norm
    folder = workdir / "model"
    whole = dataclasses.replace(inverter, params=processes.fetch_to_main(params))
    with processes.main_first("written the model") as here:
        if here:
            whole.save(folder, record={"recipe": to_dict(config)})
    del whole
    if context.in_step and config.embedder_dtype != "float32":  # scores are for the exact embedder's vectors
        inverter = dataclasses.replace(inverter, embedder=load_embedder(config.embedder))
    report = score_model(context, inverter, workdir)
    if processes.is_main():
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        card = model_card(to_dict(config), report, where)
        (folder / "README.md").write_text(CARD_HEAD + card, encoding="utf-8")
    return folder


def score_model(context: TrainContext, inverter: InversionPipeline, workdir: Path) -> dict[str, Any]:
    """The final evaluation, as numbers and as a plot."""
    settings = context.config.evaluation
    num_steps = settings.num_steps if inverter.has_corrector else (0,)
    texts = context.held_out[: settings.num_examples]
    report = evaluate(inverter, texts, num_steps, settings.sequence_beam_width)
    if processes.is_main():
        (workdir / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, workdir / "evaluation.png")
    return report


def train_stage(
    context: TrainContext, stage: Stage, folder: Path, trained: dict[Stage, Params], stopped: "StopFlag"
) -> Params:
    """Trains one network to its recipe's number of steps and returns its parameters."""
    config = context.config
    settings: StageConfig = getattr(config, stage)
    mesh, last = make_mesh(config.mesh), settings.num_steps
    names = column_names(config, stage).values()
    batches = make_batches(config, context.datasets, settings.batch_size, [context.columns[name] for name in names])
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
    step_fn, state = _start(context, stage, trained, batches, mesh, checkpoints)
    frozen = _frozen(context, stage, trained, mesh)
    feed = Feed(context, stage, batches, frozen, mesh)
    vote = processes.Vote(batch_sharding(mesh), replicated(mesh))
    watch = _Watch(stage, settings.optimizer.skip_bad_updates, checkpoints)
    rates, probe, compiled = _Rates(), context.inverter({}), set()
    step, recent = int(state.step), dict[str, Any]()
    with (
        progress.bar(last, f"training the {stage}", unit="steps", start=step) as update,
        Log(folder / "log.jsonl", until=step) as log,
        Log(folder / "samples.jsonl", until=step) as samples,
    ):
        upcoming = feed.start(step) if step < last else None
        while upcoming is not None:
            batch, tokens = upcoming()
            upcoming = feed.start(step + 1) if step + 1 < last else None
            if batch.ids.shape[1] not in compiled:
                compiled.add(batch.ids.shape[1])
                with progress.stage(f"compiling the step for {batch.ids.shape[1]} tokens"):
                    state, metrics = jax.block_until_ready(step_fn(state, frozen, batch))
                rates.restart()
            else:
                state, metrics = step_fn(state, frozen, batch)
                rates.add(batch.ids.shape, tokens)
            step += 1
            watch.add(step, metrics)
            stopping = vote(stopped.signal)  # whichever process got the signal, all stop at the same step
            logging = step % config.log_every_steps == 0 or step == last
            saving = step % config.checkpoint.every_steps == 0 or step == last
            if logging or saving or stopping:
                watch.check()
            if logging:
                recent = watch.record() | rates.read()
                log.write(recent)
            shown = {"loss": "loss", "token_accuracy": "accuracy"}
            update(step, **{name: recent[key] for key, name in shown.items() if key in recent})
            if saving:
                checkpoints.save(step, state)
            every = config.evaluation.every_steps
            if (every and step % every == 0) or step == last:
                with progress.stage(f"recovering held-out texts at step {step}"):
                    probe.params = context.decodable(dict(trained) | {stage: state.params})
                    log.write({"step": step} | evaluate_stage(context, probe, samples, step))
                    probe.release()
                rates.restart()
            if stopping:
                checkpoints.save(step, state)
                checkpoints.close()
                raise TrainingStopped(
                    f"stopped at step {step} of the {stage}; everything is saved: run the same command to resume",
                    preempted=stopping == signal.SIGTERM,
                )
    checkpoints.close()
    return state.params


def _start(
    context: TrainContext,
    stage: Stage,
    trained: dict[Stage, Params],
    batches: Any,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> tuple[OnMesh, TrainState]:
    """A stage's compiled-on-first-use step, and the state it begins with: new, or the newest checkpoint's."""
    config, settings = context.config, getattr(context.config, stage)
    optimizer = make_optimizer(settings.optimizer, settings.num_steps)
    network = context.in_step.config if context.in_step else None
    loss_fn = make_loss(stage, context.model, network, context.token_map, config.partial_hypotheses, config.mesh.decode)
    may_skip = settings.optimizer.skip_bad_updates > 0
    step_fn = make_step(loss_fn, optimizer, settings.optimizer.accumulate_steps, config.seed, may_skip)

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
    step = int(state.step)
    if step > settings.num_steps:
        raise InputError(
            f"The {stage} is already at step {step}; {stage}.num_steps={settings.num_steps} would end before it: give "
            "more steps, or a new --workdir."
        )
    progress.note(f"{stage}: resuming from step {step}")
    return step_fn, state


def _frozen(context: TrainContext, stage: Stage, trained: dict[Stage, Params], mesh: Mesh) -> FrozenParams:
    """What the stage reads but doesn't train, on its devices."""
    decodes = stage == "corrector" and not context.config.data.hypotheses
    weights = context.in_step.params if context.in_step else None
    vocab_map = jnp.asarray(context.vocabulary.vocab_map)
    frozen = FrozenParams(weights, vocab_map, trained.get("inverter") if decodes else None)
    return processes.put(frozen, frozen_shardings(mesh, frozen))


class _Watch:
    """Looks at the metrics of past steps: lets the host run one step ahead of the device, and stops at NaN.

    Args:
        allowed: updates with a loss or gradient that isn't finite, which the step then skips; 0 allows none.
    """

    def __init__(self, stage: Stage, allowed: int, checkpoints: Checkpoints) -> None:
        self._stage, self._allowed, self._checkpoints = stage, allowed, checkpoints
        self._unchecked: list[tuple[int, Metrics]] = []
        self._last: tuple[int, Metrics] | None = None

    def add(self, step: int, metrics: Metrics) -> None:
        """Waits for the step before this one: what is shown as done is done."""
        self._unchecked.append((step, metrics))
        if len(self._unchecked) > 1:
            jax.block_until_ready(self._unchecked[-2][1])

    def check(self) -> None:
        """Raises: InputError: a step since the last call had a loss or gradient that isn't finite, and one too many."""
        fetched = processes.fetch(self._unchecked)  # arrays, the steps too
        for step, metrics in fetched:
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
        self._last = fetched[-1]
        self._unchecked.clear()

    def record(self) -> dict[str, Any]:
        """The last checked step as a line of the log."""
        assert self._last is not None
        step, metrics = self._last
        return {
            "step": int(step),
            "loss": round(float(metrics.loss), 4),
            "token_accuracy": round(float(metrics.token_accuracy), 4),
            "gradient_norm": round(float(metrics.gradient_norm), 4),
            **({"bad_updates": int(metrics.bad_updates)} if self._allowed else {}),
        }


class _Rates:
    """Texts and tokens a second since the last line of the log, compilation and evaluation left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._since, self._texts, self._tokens, self._positions = time.perf_counter(), 0, 0.0, 0

    def add(self, shape: tuple[int, int], tokens: float) -> None:
        self._texts, self._tokens = self._texts + shape[0], self._tokens + tokens
        self._positions += shape[0] * shape[1]

    def read(self) -> dict[str, float]:
        """For a line of the log; empty if no step has run since the last restart."""
        seconds, texts = time.perf_counter() - self._since, self._texts
        tokens, positions = self._tokens, self._positions
        if not texts:
            return {}
        self.restart()
        return {
            "sequences_per_second": round(texts / seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding_share": round(1 - tokens / positions, 4),
        }


def evaluate_stage(context: TrainContext, inverter: InversionPipeline, samples: Log, step: int) -> dict[str, float]:
    """Scores on held-out texts with the current parameters: greedy, with one correction step for the corrector."""
    references = context.held_out[: context.config.evaluation.num_examples]
    num_steps = int(inverter.has_corrector)
    if inverter.mesh is None:
        options = {"num_steps": num_steps, "sequence_beam_width": 1}
        predictions = [one.text for one in invert_on_all_hosts(invert_strings, inverter, references, **options)]
    else:
        e = embed_decoded(inverter, references)
        ids = run_correction(inverter, e, num_steps, sequence_beam_width=1, mode="upstream").ids
        predictions = context.vocabulary.decode(ids)
    scores = text_scores(predictions, references)
    for prediction, reference in list(zip(predictions, references, strict=True))[:10]:
        samples.write({"step": step, "reference": reference, "recovered": prediction})
    return {f"held_out_{name}": round(value.mean, 4) for name, value in scores.items()}


class StopFlag:
    """SIGINT or SIGTERM once it has arrived, 0 before; a second signal ends the process the ordinary way."""

    def __init__(self) -> None:
        self.signal = 0

    def set(self, signum: int, _: Any) -> None:
        self.signal = signum
        progress.note("stopping after this step; everything will be saved")
        signal.signal(signum, signal.SIG_DFL if signum == signal.SIGTERM else signal.default_int_handler)


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turns SIGINT and SIGTERM into a flag while training runs."""
    flag = StopFlag()
    before = {signum: signal.signal(signum, flag.set) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
