"""Training from top to bottom: a recipe and a work directory in, a model folder out.

workdir/config.json                    the recipe as it ran; another recipe is refused here
workdir/inputs.json                    hashes of the embedder, word-pieces and texts; others are refused too
workdir/{inverter,corrector}/log.jsonl      a line every `log_every_steps`
workdir/{inverter,corrector}/samples.jsonl  held-out texts recovered along the way
workdir/{inverter,corrector}/checkpoints/   Orbax; a stage goes on where it stopped
workdir/model/                         the finished model, for `v2t_jax.load`
workdir/evaluation.{json,png}          its scores on held-out texts, over correction steps and beam widths
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

from v2t_jax import progress
from v2t_jax.config import Config, Stage, StageConfig, to_dict
from v2t_jax.data.dataset import StoredBatches
from v2t_jax.embedders.black_box import embed_once
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.eval.evaluate import evaluate, plot
from v2t_jax.eval.metrics import text_scores
from v2t_jax.eval.model_card import model_card
from v2t_jax.inversion.api import embed_anew, invert_on_all_hosts, invert_strings, run_correction
from v2t_jax.inversion.pipeline import CARD_HEAD, InversionPipeline, norm_statistics
from v2t_jax.models.layers import Params
from v2t_jax.parallel import processes
from v2t_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from v2t_jax.train.checkpoint import Checkpoints
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
    NETWORKS,
    Batch,
    FrozenParams,
    Metrics,
    TrainState,
    frozen_shardings,
    make_loss,
    make_step,
    shard_step,
)
from v2t_jax.train.texts import make_batches
from v2t_jax.train.workdir import Log, check_workdir, claim_workdir


class TrainingStopped(Exception):
    """The run was interrupted and has saved itself; the same command goes on.

    Attributes:
        preempted: by SIGTERM, as schedulers do; otherwise by Ctrl-C.
    """

    def __init__(self, message: str, preempted: bool):
        super().__init__(message)
        self.preempted = preempted


def train(config: Config, workdir: Path) -> Path:
    """Runs the recipe's stages, each from its newest checkpoint if there is one.

    Returns:
        The folder of the finished model.
    Raises:
        InputError: a setting or a source is wrong, `workdir` holds another recipe's run, its disk or a device's memory
            is full, or the run's processes have lost each other.
        TrainingStopped: SIGINT or SIGTERM came; everything is saved.
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
            f"The run stopped at {error.filename or workdir} ({error.strerror or error}); mend that, or free space, "
            "then run the same command to go on from the newest checkpoint."
        ) from error


def _train(config: Config, workdir: Path) -> Path:
    check_workdir(config, workdir)  # first: it takes a moment, and what follows a minute
    mesh = make_mesh(config.mesh)
    check_batches(config, mesh)
    processes.barrier("looked at the work directory")  # before process 0 writes there
    setup = prepare(config)
    claim_workdir(config, workdir, setup.hashes())
    params: dict[Stage, Params] = {}
    if config.initial_inverter:
        params["inverter"] = trained_inverter(setup, mesh)
    with stop_signals() as stopped:
        for stage in config.stages:
            params[stage] = train_stage(setup, stage, workdir / stage, params, stopped)
    norm = norm_statistics(embed_once(setup.embedder, setup.held_out[:NORM_TEXTS]))
    inverter = setup.inverter(params)
    inverter.embedding_norm = norm
    folder = workdir / "model"
    whole = dataclasses.replace(inverter, params=processes.fetch_to_main(params))
    with processes.main_first("written the model") as here:
        if here:
            whole.save(folder, record={"recipe": to_dict(config)})
    del whole
    if setup.in_step and config.embedder_dtype != "float32":  # the scores are of the victim's own vectors
        inverter = dataclasses.replace(inverter, embedder=load_embedder(config.embedder))
    report = score_model(setup, inverter, workdir)
    if processes.is_main():
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        card = model_card(to_dict(config), report, where)
        (folder / "README.md").write_text(CARD_HEAD + card, encoding="utf-8")
    return folder


def score_model(setup: TrainContext, inverter: InversionPipeline, workdir: Path) -> dict[str, Any]:
    """The final evaluation, as numbers and as a plot."""
    settings = setup.config.evaluation
    num_steps = settings.num_steps if inverter.has_corrector else (0,)
    texts = setup.held_out[: settings.num_examples]
    report = evaluate(inverter, texts, num_steps, settings.sequence_beam_width)
    if processes.is_main():
        (workdir / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, workdir / "evaluation.png")
    return report


def train_stage(
    setup: TrainContext, stage: Stage, folder: Path, trained: dict[Stage, Params], stopped: "StopFlag"
) -> Params:
    """Trains one network to its recipe's number of steps and returns its parameters."""
    config, model = setup.config, setup.model
    settings: StageConfig = getattr(config, stage)
    columns = column_names(config, stage)
    batches = make_batches(
        config, setup.stores, settings.batch_size, [setup.columns[name] for name in columns.values()]
    )
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(settings.optimizer, settings.num_steps)
    embedder = setup.in_step
    sizes, piece_map = (embedder.config, embedder.token_map()) if embedder else (None, None)
    loss_fn = make_loss(stage, model, sizes, piece_map, config.partial_hypotheses, config.mesh.decode)
    may_skip = settings.optimizer.skip_bad_updates
    step_fn = make_step(loss_fn, optimizer, settings.optimizer.accumulate_steps, config.seed, may_skip > 0)

    def first_state(params: Params) -> TrainState:
        # Copied, because the first step gives the state's memory up, and two leaves may be one array.
        return TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))

    abstract = jax.eval_shape(lambda key: first_state(NETWORKS[stage].init(model, key)), jax.random.key(0))
    step_fn, shardings = shard_step(step_fn, mesh, abstract, stage)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
    if checkpoints.latest() is None:
        with progress.stage(f"making the {stage}'s first parameters"):
            params = initial_params(setup, stage, trained, batches, mesh)
            state = jax.jit(first_state, out_shardings=shardings)(params)
            del params
    else:
        with progress.stage(f"restoring the {stage}"):
            state = checkpoints.restore(
                jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
            )
        progress.note(f"{stage}: going on from step {int(state.step)}")
    guesses = stage == "corrector" and not config.data.hypotheses
    weights = embedder.params if embedder else None
    frozen = FrozenParams(weights, setup.vocab_map, trained.get("inverter") if guesses else None)
    frozen = processes.put(frozen, frozen_shardings(mesh, frozen))
    cut = batch_sharding(mesh)
    rows = processes.local_rows(cut, settings.batch_size)
    vote = processes.Vote(cut, replicated(mesh))

    probe = setup.inverter({})
    step, last = int(state.step), settings.num_steps
    recent: dict[str, Any] = {}
    unchecked: list[tuple[int, Metrics]] = []
    since, texts, tokens, positions = time.perf_counter(), 0, 0.0, 0
    compiled: set[int] = set()

    def save(state: TrainState) -> None:
        checkpoints.save(step, state)

    with (
        progress.bar(last, f"training the {stage}", unit="steps", start=step) as update,
        Log(folder / "log.jsonl", until=step) as log,
        Log(folder / "samples.jsonl", until=step) as samples,
    ):
        while step < last:
            local = batches(step, rows)
            read = batches.columns(step, rows) if isinstance(batches, StoredBatches) else {}
            given = Batch(local, **{field: read[name] for field, name in columns.items()})
            batch = jax.tree.map(lambda a: processes.global_batch(cut, a, rows, settings.batch_size), given)
            ids = batch.ids
            if ids.shape[1] not in compiled:
                compiled.add(ids.shape[1])
                with progress.stage(f"compiling the step for {ids.shape[1]} tokens"):
                    state, metrics = jax.block_until_ready(step_fn(state, frozen, batch))
                since, texts, tokens, positions = time.perf_counter(), 0, 0.0, 0
            else:
                state, metrics = step_fn(state, frozen, batch)
                texts, positions = texts + len(ids), positions + ids.size
                tokens += float((local != 0).sum()) * len(ids) / len(local)  # taken to be alike on all hosts
            step += 1
            unchecked.append((step, metrics))
            if len(unchecked) > 1:  # one step ahead of the device and no more: what is shown as done is done
                jax.block_until_ready(unchecked[-2][1])
            stopping = vote(stopped.signal)  # whoever got the signal, all stop at the same step
            logging = step % config.log_every_steps == 0 or step == last
            saving = step % config.checkpoint.every_steps == 0 or step == last
            if logging or saving or stopping:
                for bad, (loss, _, gradient_norm, _, bad_updates) in processes.fetch(unchecked):
                    # A finite loss with a gradient that isn't has just spoilt the parameters, unless it is left out.
                    finite = math.isfinite(loss) and math.isfinite(gradient_norm)
                    if not finite and (not may_skip or bad_updates > may_skip):
                        kept = checkpoints.latest()
                        checkpoints.close()
                        raise InputError(
                            f"The {stage}'s loss is {loss} and its gradient's norm {gradient_norm} at step {bad}; "
                            f"{f'the checkpoint of step {kept} is untouched' if kept else 'nothing was saved yet'}: "
                            "lower the learning rate or clip the gradient, in a new --workdir."
                        )
                unchecked.clear()
                loss, gradient_norm = float(loss), float(gradient_norm)
            if logging:
                recent = {
                    "step": step,
                    "loss": round(loss, 4),
                    "token_accuracy": round(float(metrics.token_accuracy), 4),
                    "gradient_norm": round(gradient_norm, 4),
                    **({"bad_updates": int(bad_updates)} if may_skip else {}),
                }
            if logging and texts:  # none if nothing but a compilation has happened since the last line
                seconds = max(time.perf_counter() - since, 1e-9)
                recent |= {
                    "sequences_per_second": round(texts / seconds, 1),
                    "tokens_per_second": round(tokens / seconds, 1),
                    "padding_share": round(1 - tokens / positions, 4),
                }
                since, texts, tokens, positions = time.perf_counter(), 0, 0.0, 0
            if logging:
                log.write(recent)
            shown = {"loss": "loss", "token_accuracy": "accuracy"}
            update(step, **{name: recent[key] for key, name in shown.items() if key in recent})
            if saving:
                save(state)
            every = config.evaluation.every_steps
            if (every and step % every == 0) or step == last:
                with progress.stage(f"recovering held-out texts at step {step}"):
                    probe.params = setup.decodable(dict(trained) | {stage: state.params})
                    log.write({"step": step} | evaluate_stage(setup, probe, samples, step))
                since, texts, tokens, positions = time.perf_counter(), 0, 0.0, 0
            if stopping:
                save(state)
                checkpoints.close()
                raise TrainingStopped(
                    f"stopped at step {step} of the {stage}; everything is saved: run the same command to resume",
                    preempted=stopping == signal.SIGTERM,
                )
    checkpoints.close()
    return state.params


def evaluate_stage(setup: TrainContext, inverter: InversionPipeline, samples: Log, step: int) -> dict[str, float]:
    """Recovers held-out texts with the parameters as they are: greedily, with one correction step for the corrector."""
    references = setup.held_out[: setup.config.evaluation.num_examples]
    num_steps = int(inverter.has_corrector)
    if inverter.mesh is None:
        options = {"num_steps": num_steps, "sequence_beam_width": 1}
        predictions = [one.text for one in invert_on_all_hosts(invert_strings, inverter, references, **options)]
    else:
        e = embed_anew(inverter, references)
        ids = run_correction(inverter, e, num_steps, sequence_beam_width=1, mode="upstream").ids
        predictions = setup.vocabulary.decode(ids)
    scores = text_scores(predictions, references)
    for prediction, reference in list(zip(predictions, references, strict=True))[:10]:
        samples.write({"step": step, "reference": reference, "recovered": prediction})
    return {f"held_out_{name}": round(value.mean, 4) for name, value in scores.items()}


class StopFlag:
    """Which of SIGINT and SIGTERM has come, 0 for none; a second signal ends the process the ordinary way."""

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
