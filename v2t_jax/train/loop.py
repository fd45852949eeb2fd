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
import functools
import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax import distributed, progress
from v2t_jax.config import Config, ModelConfig, Stage, StageConfig, T5Config, to_dict
from v2t_jax.data.blocks import StoredTexts
from v2t_jax.data.stored import StoredBatches
from v2t_jax.data.tokenize import Vocabulary, read_tokenizer
from v2t_jax.errors import InputError
from v2t_jax.eval.card import model_card
from v2t_jax.eval.evaluate import evaluate, plot
from v2t_jax.eval.metrics import text_scores
from v2t_jax.interop.checkpoint import sha256_of, weight_files
from v2t_jax.interop.hf_t5 import load_t5
from v2t_jax.interop.hub import folder_of
from v2t_jax.interop.sentence_transformers import load_embedder
from v2t_jax.models.embedder import Embedder, PieceMap, embed_pieces
from v2t_jax.models.layers import Params
from v2t_jax.pretrained import CARD_HEAD, Inverter, check_length, load, locate_model, norm_statistics
from v2t_jax.sharding import batch_sharding, make_mesh, replicated
from v2t_jax.train.checkpoint import Checkpoints
from v2t_jax.train.columns import EMBEDDING, check_column
from v2t_jax.train.optim import make_optimizer
from v2t_jax.train.step import (
    NETWORKS,
    Batch,
    Frozen,
    Metrics,
    TrainState,
    frozen_shardings,
    greedy_hypotheses,
    make_loss,
    make_step,
    shard_step,
)
from v2t_jax.train.texts import Stores, make_batches, open_texts, tokens_sha256
from v2t_jax.train.workdir import Log, check_workdir, claim_workdir

STATISTICS_TEXTS = 4096  # texts whose embeddings the input statistics are taken from
NORM_TEXTS = 256  # texts whose vectors' lengths are recorded in the model: by them it knows foreign vectors


class TrainingStopped(Exception):
    """The run was interrupted and has saved itself; the same command goes on.

    Attributes:
        preempted: by SIGTERM, as schedulers do; otherwise by Ctrl-C.
    """

    def __init__(self, message: str, preempted: bool):
        super().__init__(message)
        self.preempted = preempted


@dataclasses.dataclass
class Setup:
    """What both stages work with."""

    config: Config
    model: ModelConfig  # with the embedder's width and the vocabulary's size filled in
    embedder: Embedder
    vocabulary: Vocabulary
    stores: Stores
    held_out: list[str]  # normalised, short enough for the model
    initial_t5: Params | None  # that both networks start from

    @property
    def stored(self) -> StoredTexts:
        """The built data set that `data.sources` names.

        Raises:
            InputError: it names other sources.
        """
        if not isinstance(self.stores, StoredTexts):
            raise InputError(
                "data.embeddings and data.hypotheses need a built data set in data.sources: v2t data build."
            )
        return self.stores

    @property
    def pieces(self) -> jax.Array:
        return jnp.asarray(self.vocabulary.pieces)

    def hashes(self) -> dict[str, str]:
        """Of all that the config names but doesn't hold."""
        return {
            "embedder": self.embedder.weights_sha256,
            "pieces": hashlib.sha256(self.vocabulary.pieces.tobytes()).hexdigest(),
            "tokens": tokens_sha256(self.stores),
            **{
                f"column {name}": hashlib.sha256(json.dumps(self.stored.column(name).made_by).encode()).hexdigest()
                for stage in self.config.stages
                for name in column_names(self.config, stage).values()
            },
            **(
                {"initial_inverter": sha256_of([locate_model(self.config.initial_inverter) / "inverter.safetensors"])}
                if self.config.initial_inverter
                else {}
            ),
            **({"initial_t5": sha256_of(weight_files(folder_of(self.config.initial_t5)))} if self.initial_t5 else {}),
        }

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Ids [n, L] -> embeddings [n, E] by the path that training uses."""
        embed = jax.jit(embed_pieces, static_argnums=(0, 1))
        piece_map = PieceMap.of(self.embedder)
        parts = [
            embed(self.embedder.config, piece_map, self.embedder.params, self.pieces, ids[i : i + 256])
            for i in range(0, len(ids), 256)
        ]
        return np.concatenate([np.asarray(part) for part in parts])


def train(config: Config, workdir: Path) -> Path:
    """Runs the recipe's stages, each from its newest checkpoint if there is one.

    Returns:
        The folder of the finished model.
    Raises:
        InputError: a setting or a source is wrong, `workdir` holds another recipe's run, or its disk is full.
        TrainingStopped: SIGINT or SIGTERM came; everything is saved.
    """
    try:
        return _train(config, workdir)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise InputError(
            f"The processes of the run have lost each other ({(str(error).splitlines() or [''])[0]}): see why one of "
            "them ended, then start all of them again, to go on from the newest checkpoint."
        ) from error
    except OSError as error:
        raise InputError(
            f"The run stopped at {error.filename or workdir} ({error.strerror or error}); mend that, or free space, "
            "then run the same command to go on from the newest checkpoint."
        ) from error


def _train(config: Config, workdir: Path) -> Path:
    check_workdir(config, workdir)  # first: it takes a moment, and what follows a minute
    distributed.barrier("looked at the work directory")  # before process 0 writes there
    setup = prepare(config)
    claim_workdir(config, workdir, setup.hashes())
    params: dict[Stage, Params] = {}
    if config.initial_inverter:
        params["inverter"] = trained_inverter(setup)
    with stop_signals() as stopped:
        for stage in config.stages:
            params[stage] = train_stage(setup, stage, workdir / stage, params, stopped)
    params = distributed.fetch(params)
    norm = norm_statistics(setup.embedder.embed(setup.held_out[:NORM_TEXTS]))
    inverter = Inverter(config.name, setup.model, params, setup.embedder, setup.vocabulary, embedding_norm=norm)
    folder = workdir / "model"
    with distributed.main_first("written the model") as here:
        if here:
            inverter.save(folder, record={"recipe": to_dict(config)})
    report = score_model(setup, load(str(folder)), workdir)
    if distributed.is_main():
        where = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        card = model_card(to_dict(config), report, where)
        (folder / "README.md").write_text(CARD_HEAD + card, encoding="utf-8")
    return folder


def trained_inverter(setup: Setup) -> Params:
    """The inverter of the model that the recipe names.

    Raises:
        InputError: it isn't of the recipe's sizes and word-pieces.
    """
    name = setup.config.initial_inverter
    found = load(name, setup.embedder)
    params = found.params["inverter"]
    expected = jax.eval_shape(functools.partial(NETWORKS["inverter"].init, setup.model), jax.random.key(0))
    shapes = jax.tree.map(lambda p: p.shape, (params, expected))
    if found.bridged or shapes[0] != shapes[1] or not np.array_equal(found.vocabulary.pieces, setup.vocabulary.pieces):
        raise InputError(
            f"The inverter of {name} has other sizes or word-pieces than this recipe: give both the same model, "
            "data.sources and data.vocabulary_size, or train a new one."
        )
    return params


def score_model(setup: Setup, inverter: Inverter, workdir: Path) -> dict[str, Any]:
    """The final evaluation, as numbers and as a plot."""
    settings = setup.config.evaluation
    num_steps = settings.num_steps if inverter.has_corrector else (0,)
    texts = setup.held_out[: settings.num_examples]
    report = evaluate(inverter, texts, num_steps, settings.sequence_beam_width)
    if distributed.is_main():
        (workdir / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, workdir / "evaluation.png")
    return report


def prepare(config: Config) -> Setup:
    """Loads the embedder, reads and tokenises the text, settles vocabulary and widths."""
    embedder = load_embedder(config.embedder, config.embedder_dtype)
    check_length(config.model, embedder)
    num_held_out = max(config.evaluation.num_examples, NORM_TEXTS)
    vocabulary, stores, held_out = open_texts(config, embedder.tokenizer, num_held_out)
    t5, pretrained = dataclasses.replace(config.model.t5, vocab_size=vocabulary.size), None
    if config.initial_t5:
        t5, pretrained = pretrained_t5(config, vocabulary)
    model = dataclasses.replace(config.model, t5=t5, embedding_width=embedder.width)
    return Setup(config, model, embedder, vocabulary, stores, held_out, pretrained)


def pretrained_t5(config: Config, vocabulary: Vocabulary) -> tuple[T5Config, Params]:
    """The T5 that the recipe starts from, under the recipe's own dtype, dropout and the like.

    Raises:
        InputError: there is none, or it has another tokenizer than the embedder.
    """
    loaded, params = load_t5(config.initial_t5)
    tokenizer = read_tokenizer(folder_of(config.initial_t5) / "tokenizer.json")
    in_order = np.array_equal(vocabulary.pieces, np.arange(vocabulary.size)) and vocabulary.size <= loaded.vocab_size
    if not in_order or tokenizer.get_vocab() != vocabulary.tokenizer.get_vocab():
        raise InputError(
            f"{config.initial_t5} and {config.embedder} have different tokenizers: choose an embedder with T5's, such "
            "as gtr-base, or leave initial_t5 empty."
        )
    kept = {name: getattr(config.model.t5, name) for name in ("dropout_rate", "dtype", "remat", "scan_unroll")}
    return dataclasses.replace(loaded, **kept), params


def column_names(config: Config, stage: Stage) -> dict[str, str]:
    """The data set's columns that a stage reads, by the batch's field that each fills."""
    found = {"embedding": config.data.embeddings}
    if stage == "corrector" and config.data.hypotheses:
        found |= {"hypothesis": config.data.hypotheses, "hypothesis_embedding": config.data.hypotheses + EMBEDDING}
    return {field: name for field, name in found.items() if name}


def initial_params(
    setup: Setup, stage: Stage, trained: dict[Stage, Params], batches: Callable[[int], np.ndarray]
) -> Params:
    """Random parameters, with the recipe's options laid over them."""
    config, model = setup.config, setup.model
    key = jax.random.fold_in(jax.random.key(config.seed), 1 + config.stages.index(stage))
    params = NETWORKS[stage].init(model, key)
    if setup.initial_t5 is not None:
        params["t5"] = jax.tree.map(jnp.asarray, setup.initial_t5)
    if config.initial_embedding == "embedder":
        words = setup.embedder.params["encoder"]["word_embedding"][setup.pieces]
        if words.shape[1] != model.t5.d_model:
            raise InputError(
                f"initial_embedding=embedder needs model.t5.d_model={words.shape[1]}, the embedder's width; "
                f"it is {model.t5.d_model}."
            )
        words = words - words.mean(axis=0, keepdims=True)
        params["t5"]["token_embedding"] = words * (config.initial_embedding_std / words.std())
        # Small embeddings under a tied head scaled by 1/sqrt(D) would start with logits near zero.
        params["t5"]["decoder"]["final_norm"]["scale"] *= model.t5.d_model**0.5
    if model.standardise:
        rows: list[np.ndarray] = []
        while sum(len(row) for row in rows) < STATISTICS_TEXTS:
            batch = batches(len(rows))
            rows.append(np.pad(batch, ((0, 0), (0, model.max_length - batch.shape[1]))))
        e = setup.embed(np.concatenate(rows)[:STATISTICS_TEXTS])
        std = e.std(axis=0)
        # Some embedders have constant dimensions: there the deviation is only rounding.
        params["statistics"] = {
            "mean": jnp.asarray(e.mean(axis=0)),
            "std": jnp.asarray(np.maximum(std, 0.1 * std.mean())),
        }
    if stage == "corrector" and config.corrector_from_inverter:
        source = trained["inverter"]
        params["t5"] = jax.tree.map(jnp.copy, source["t5"])
        params["projection_target"] = jax.tree.map(jnp.copy, source["projection"])
        for name in ("statistics", "bag_of_words"):
            if name in source:
                params[name] = jax.tree.map(jnp.copy, source[name])
    return params


def train_stage(setup: Setup, stage: Stage, folder: Path, trained: dict[Stage, Params], stopped: "StopFlag") -> Params:
    """Trains one network to its recipe's number of steps and returns its parameters."""
    config, model = setup.config, setup.model
    settings: StageConfig = getattr(config, stage)
    columns = column_names(config, stage)
    batches = make_batches(config, setup.stores, settings.batch_size, [*columns.values()])
    for name in columns.values():
        check_column(setup.stored.column(name), setup.embedder)
    mesh = make_mesh(config.mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if settings.batch_size % (parts * settings.optimizer.accumulate_steps):
        raise InputError(
            f"{stage}.batch_size={settings.batch_size} can't be cut into {settings.optimizer.accumulate_steps} "
            f"micro-batches over {parts} devices: make it a multiple of their product."
        )
    optimizer = make_optimizer(settings.optimizer, settings.num_steps)
    loss_fn = make_loss(
        stage, model, setup.embedder.config, PieceMap.of(setup.embedder), config.partial_hypotheses, config.mesh.decode
    )
    may_skip = settings.optimizer.skip_bad_updates
    step_fn = make_step(loss_fn, optimizer, settings.optimizer.accumulate_steps, config.seed, may_skip > 0)

    def first_state(params: Params) -> TrainState:
        # Copied, because the first step gives the state's memory up, and two leaves may be one array.
        return TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))

    with progress.stage(f"making the {stage}'s first parameters"):
        params = initial_params(setup, stage, trained, batches)
        step_fn, shardings = shard_step(step_fn, mesh, jax.eval_shape(first_state, params), stage)
        params = distributed.put(params, shardings.params)
        state = jax.jit(first_state, out_shardings=shardings)(params)
    guesses = stage == "corrector" and not config.data.hypotheses
    frozen = Frozen(setup.embedder.params, setup.pieces, trained.get("inverter") if guesses else None)
    frozen = distributed.put(frozen, frozen_shardings(mesh, frozen))
    cut = batch_sharding(mesh)
    rows = distributed.local_rows(cut, settings.batch_size)
    vote = distributed.Vote(cut, replicated(mesh))

    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint)
    if checkpoints.latest() is not None:
        with progress.stage(f"restoring the {stage}"):
            state = checkpoints.restore(state)
        progress.note(f"{stage}: going on from step {int(state.step)}")
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
    ):
        while step < last:
            local = batches(step, rows)
            read = batches.columns(step, rows) if isinstance(batches, StoredBatches) else {}
            given = Batch(local, **{field: read[name] for field, name in columns.items()})
            batch = jax.tree.map(lambda a: distributed.global_batch(cut, a, rows, settings.batch_size), given)
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
                for bad, (loss, _, gradient_norm, _, bad_updates) in distributed.fetch(unchecked):
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
                    log.write({"step": step} | evaluate_stage(setup, stage, state.params, trained, folder, step))
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


def evaluate_stage(
    setup: Setup, stage: Stage, params: Params, trained: dict[Stage, Params], folder: Path, step: int
) -> dict[str, float]:
    """Recovers held-out texts with the parameters as they are: greedily, with one correction step for the corrector."""
    references = setup.held_out[: setup.config.evaluation.num_examples]
    networks = dict(trained) | {stage: params}
    inverter = Inverter(setup.config.name, setup.model, networks, setup.embedder, setup.vocabulary)
    # Cut over all devices of all hosts, filled up to a multiple of them.
    cut = batch_sharding(make_mesh(setup.config.mesh))
    e = setup.embedder.embed(references)
    e = np.concatenate([e, np.repeat(e[-1:], -len(e) % cut.num_devices, axis=0)])
    e = distributed.put(e, cut)
    ids = distributed.fetch(jax.jit(greedy_hypotheses, static_argnums=0)(setup.model, networks["inverter"], e))
    if stage == "corrector":
        loop = inverter.correction_loop(sequence_beam_width=1, mode="upstream")
        ids = loop(inverter.loop_params(), e, 1).ids
    predictions = setup.vocabulary.decode(ids[: len(references)])
    scores = text_scores(predictions, references)
    with Log(folder / "samples.jsonl") as samples:
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
