"""Whole runs: they learn, end in a model folder, go on exactly where they stopped, and say what is wrong."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import v2t_jax
from tests.helpers.tiny_run import make_recipe
from v2t_jax.config import MeshConfig, StageConfig, to_dict
from v2t_jax.data import recipe as recipe_data
from v2t_jax.data.split import read_texts
from v2t_jax.errors import InputError
from v2t_jax.train import loop
from v2t_jax.train.checkpoint import Checkpoints
from v2t_jax.train.loop import TrainingStopped, train
from v2t_jax.train.setup import prepare
from v2t_jax.train.step import Task


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """The work directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    assert train(recipe, workdir) == workdir / "model"
    return workdir


def log(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "log.jsonl").read_text().splitlines()]


def inverter_only(recipe, **changes):
    return dataclasses.replace(recipe, stages=("inverter",), **changes)


@pytest.mark.parametrize("stage", ["inverter", "corrector"])
def test_the_loss_falls(finished, stage):
    lines = [line for line in log(finished, stage) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(5, lines[-1]["step"] + 1, 5))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    assert all(0 < line["tokens_per_second"] < 1e7 and 0 <= line["padding_share"] < 1 for line in lines[1:])


def test_the_model_folder_gives_what_the_run_gave(finished, recipe):
    model = v2t_jax.load(str(finished / "model"))
    assert model.has_corrector and model.name == "test" and model.config.t5.vocab_size == 60
    # The last checkpoint holds the same parameters, to the bit.
    saved = Checkpoints(finished / "corrector" / "checkpoints", recipe.checkpoint)
    setup = prepare(recipe)
    optimizer = loop.make_optimizer(recipe.corrector.optimizer, recipe.corrector.num_steps)
    params = jax.tree.map(jnp.zeros_like, model.params["corrector"])
    state = saved.restore(loop.TrainState(jnp.int32(0), params, optimizer.init(params)))
    saved.close()
    assert int(state.step) == recipe.corrector.num_steps
    jax.tree.map(np.testing.assert_array_equal, state.params, model.params["corrector"])
    # And so the folder recovers the texts that the run's last evaluation did.
    e = model.embedder.embed(setup.held_out[: recipe.evaluation.num_examples])
    ids = model.correction_loop(sequence_beam_width=1, mode="upstream")(model.loop_params(), e, 1).ids
    samples = [json.loads(line) for line in (finished / "corrector" / "samples.jsonl").read_text().splitlines()]
    assert [sample["recovered"] for sample in samples] == model.vocabulary.decode(ids)


def test_the_run_ends_with_scores_over_steps_and_widths(finished, recipe):
    report = json.loads((finished / "evaluation.json").read_text())
    assert report["n"] == recipe.evaluation.num_examples
    assert [(row["sequence_beam_width"], row["num_steps"]) for row in report["rows"]] == [
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 2),
    ]
    assert all(
        row["cosine"] <= after["cosine"] for row, after in zip(report["rows"][::2], report["rows"][1::2], strict=True)
    )
    assert (finished / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    card, last = (finished / "model" / "README.md").read_text(), report["rows"][-1]
    assert card.startswith("---\nlibrary_name: v2t_jax\n") and "- **Trained:** 8 x cpu.\n" in card
    assert f"| 2 | 2 | {last['embedder_calls']:.0f} | {last['bleu']:.1f} ± {last['bleu_sem']:.1f} |" in card


def test_statistics_are_those_of_the_texts_and_are_not_trained(finished):
    model = v2t_jax.load(str(finished / "model"))
    e = model.embedder.embed(read_texts(model_record(finished)["data"]["sources"][0], "train"))
    for params in model.params.values():
        # Spans of the texts are in them too, so they are near, not equal.
        np.testing.assert_allclose(params["statistics"]["mean"], e.mean(0), atol=0.1)
        np.testing.assert_allclose(params["statistics"]["std"], e.std(0), rtol=0.5)
    for ours, theirs in zip(*(jax.tree.leaves(p["statistics"]) for p in model.params.values()), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def model_record(workdir):
    return json.loads((workdir / "model" / "config.json").read_text())["record"]["recipe"]


def test_resuming_changes_nothing(finished, recipe, tmp_path, monkeypatch):
    """Stopped by SIGTERM in both stages, between checkpoints, and started again: the same weights to the bit."""
    stops = [23, 60 + 7]
    calls = 0
    shard = loop.shard_step

    def interrupting(*args):
        step_fn, shardings = shard(*args)

        def step(*args):
            nonlocal calls
            calls += 1
            if calls in stops:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_fn(*args)

        return step, shardings

    monkeypatch.setattr(loop, "shard_step", interrupting)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(TrainingStopped, match="step 23 of the inverter"):
        train(recipe, tmp_path)
    with (tmp_path / "inverter" / "samples.jsonl").open("a") as samples:  # as of a run that was killed later
        samples.write('{"step": 40, "reference": "a", "recovered": "b"}\n{"step": 40, "ref')
    with pytest.raises(TrainingStopped, match="step 7 of the corrector"):
        train(recipe, tmp_path)
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train(recipe, tmp_path)
    assert calls == recipe.inverter.num_steps + recipe.corrector.num_steps  # no step was made twice
    for stage in recipe.stages:
        ours, theirs = (load_file(w / "model" / f"{stage}.safetensors") for w in (tmp_path, finished))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{stage} {name}")
        samples = [(folder / stage / "samples.jsonl").read_text() for folder in (tmp_path, finished)]
        assert samples[0] == samples[1]
    # The finished run, started once more, only writes the model again.
    train(recipe, tmp_path)
    assert calls == recipe.inverter.num_steps + recipe.corrector.num_steps


def test_every_array_may_be_cut(recipe, tmp_path):
    """Both stages and their evaluation on a mesh that cuts batches, widths and vocabulary."""
    short = {stage: dataclasses.replace(getattr(recipe, stage), num_steps=2, batch_size=8) for stage in recipe.stages}
    config = dataclasses.replace(recipe, mesh=MeshConfig(2, 2, 2), corrector_from_inverter=True, **short)
    model = v2t_jax.load(str(train(config, tmp_path)))
    assert model.has_corrector


@pytest.mark.parametrize("field", ["loss", "gradient_norm"])
def test_nan_stops_and_keeps_the_last_checkpoint(recipe, tmp_path, monkeypatch, field):
    original = loop.make_step

    def breaking(*args):
        step_fn = original(*args)

        def step(state, frozen, batch):
            after, metrics = step_fn(state, frozen, batch)
            bad = jnp.where(state.step >= 6, jnp.nan, getattr(metrics, field))
            return after, metrics._replace(**{field: bad})

        return step

    monkeypatch.setattr(loop, "make_step", breaking)
    checkpoint = dataclasses.replace(recipe.checkpoint, every_steps=4)
    config = inverter_only(recipe, checkpoint=checkpoint, log_every_steps=5)  # looked at at 5, 8 and 10 only
    with pytest.raises(InputError, match="nan.* at step 7; the checkpoint of step 4 is untouched"):
        train(config, tmp_path)
    checkpoints = Checkpoints(tmp_path / "inverter" / "checkpoints", checkpoint)
    assert checkpoints.latest() == 4
    checkpoints.close()
    assert not (tmp_path / "model").exists()


def test_bad_updates_may_be_left_out(recipe, tmp_path, monkeypatch):
    """Two steps of ten have a gradient that isn't finite: with an allowance of two the run goes on without them."""
    original = Task.loss

    def loss(self, params, frozen, batch, key):
        total, rest = original(self, params, frozen, batch, key)
        hit = jnp.any(jnp.all(jnp.broadcast_to(batch.ids[:1], bad.shape) == bad, axis=1))
        return total * jnp.where(hit, jnp.nan, 1.0), rest

    def run(allowed):
        optimizer = dataclasses.replace(recipe.inverter.optimizer, skip_bad_updates=allowed)
        stage = dataclasses.replace(recipe.inverter, num_steps=10, optimizer=optimizer)
        checkpoint = dataclasses.replace(recipe.checkpoint, every_steps=2)
        config = inverter_only(recipe, inverter=stage, checkpoint=checkpoint, log_every_steps=1)
        train(config, tmp_path / str(allowed))

    batches = loop.make_batches(recipe, prepare(recipe).datasets, recipe.inverter.batch_size)
    bad = np.stack([batches(step)[0] for step in (3, 6)])
    monkeypatch.setattr(Task, "loss", loss)
    run(2)
    lines = [line for line in log(tmp_path / "2", "inverter") if "loss" in line]
    assert [line["bad_updates"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [np.isfinite(line["loss"]) for line in lines] == [step not in (3, 6) for step in range(10)]
    with pytest.raises(InputError, match="loss is nan .* at step 7; the checkpoint of step 6 is untouched"):
        run(1)
    with pytest.raises(InputError, match="at step 4; the checkpoint of step 2"):
        run(0)


def test_a_full_disk_stops_with_a_sentence_and_the_run_goes_on_later(recipe, tmp_path, monkeypatch):
    """The log first (every write to /dev/full fails as on a full disk), then a checkpoint."""
    config = inverter_only(recipe, inverter=dataclasses.replace(recipe.inverter, num_steps=8), log_every_steps=2)
    log_file = tmp_path / "inverter" / "log.jsonl"
    log_file.parent.mkdir()
    log_file.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"stopped at .* \(No space left on device\); fix"):
        train(config, tmp_path)
    log_file.unlink()

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']")

    with monkeypatch.context() as patched:
        patched.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(InputError, match=r"checkpoint can't be written to .*\(No space left on device.*free space"):
            train(config, tmp_path)
    assert (train(config, tmp_path) / "inverter.safetensors").is_file()


def test_changed_inputs_are_refused_and_a_failed_start_claims_nothing(tmp_path):
    config = inverter_only(make_recipe(tmp_path / "recipe"))
    workdir = tmp_path / "run"
    mistyped = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=("none.txt",)))
    with pytest.raises(InputError, match="There is no file"):
        train(mistyped, workdir)
    assert not (workdir / "config.json").exists()
    loop.claim_workdir(config, workdir, prepare(config).hashes())
    with open(config.data.sources[0], "a", encoding="utf-8") as source:
        source.write("the old man sees a very big fish\n")
    with pytest.raises(InputError, match=r"has changed since the run .* began \(its tokens\)"):
        train(config, workdir)


def test_an_embedder_whose_folder_now_pools_differently_is_refused(tmp_path):
    config, workdir = inverter_only(make_recipe(tmp_path / "recipe")), tmp_path / "run"
    workdir.mkdir()
    loop.claim_workdir(config, workdir, prepare(config).hashes())
    recorded = json.loads((workdir / "inputs.json").read_text())
    pooling = Path(config.embedder) / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(InputError, match="run was made with an embedder whose pooling is 'mean', but that of .* 'cls'"):
        train(config, workdir)
    del recorded["identity"]  # as in an earlier version's
    (workdir / "inputs.json").write_text(json.dumps(recorded))
    loop.claim_workdir(config, workdir, prepare(config).hashes())
    assert json.loads((workdir / "inputs.json").read_text())["identity"]["pooling"] == "cls"  # from now on


def test_another_config_is_refused_by_the_fields_that_differ(finished, recipe):
    before = (finished / "config.json").read_text()
    optimizer = dataclasses.replace(recipe.corrector.optimizer, b1=0.8)
    other = dataclasses.replace(recipe, seed=1, corrector=dataclasses.replace(recipe.corrector, optimizer=optimizer))
    with pytest.raises(InputError, match=r"with seed=0, not 1; corrector.optimizer.b1=0.9, not 0.8: give a new"):
        train(other, finished)
    longer = dataclasses.replace(recipe.inverter, num_steps=100)  # the corrector trained on the hypotheses of 60 steps
    with pytest.raises(InputError, match=r"inverter.num_steps=60, not 100"):
        train(dataclasses.replace(recipe, inverter=longer), finished)
    assert (finished / "config.json").read_text() == before


def test_a_run_may_be_lengthened_logged_evaluated_and_checkpointed_differently(recipe, tmp_path):
    """With a constant learning rate it then ends with the very weights of a run that was as long from the start."""

    def run(workdir, num_steps, **changes):
        stage = dataclasses.replace(recipe.inverter, num_steps=num_steps)
        train(inverter_only(recipe, inverter=stage, **changes), workdir)
        return load_file(workdir / "model" / "inverter.safetensors")

    run(tmp_path / "resumed", 10)
    resumed = run(
        tmp_path / "resumed",
        16,
        log_every_steps=2,
        evaluation=dataclasses.replace(recipe.evaluation, every_steps=6, num_steps=(0,)),
        checkpoint=dataclasses.replace(recipe.checkpoint, every_steps=3, keep=1),
    )
    whole = run(tmp_path / "whole", 16)
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
    lines = [line["step"] for line in log(tmp_path / "resumed", "inverter") if "loss" in line]
    assert lines == [5, 10, 12, 14, 16]
    assert json.loads((tmp_path / "resumed" / "config.json").read_text())["inverter"]["num_steps"] == 16
    with pytest.raises(InputError, match="already at step 16; inverter.num_steps=12 would end before it"):
        run(tmp_path / "resumed", 12)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_damaged_work_directory(recipe, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="is damaged"):
        train(recipe, tmp_path)


def test_a_work_directory_that_is_a_file(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be used"):
        train(recipe, tmp_path / "file" / "workdir")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("corrector",)}, "put inverter before them"),
        ({"embedder": "no-such-embedder"}, "There is no embedder"),
        ({"model": {"max_length": 32}}, "reads texts of 31 at most"),
        ({"model": {"max_length": 3}}, "No held-out text"),
        # Before anything is opened:
        ({"embedder": "none", "inverter": StageConfig(num_steps=2, batch_size=12)}, "over 8 devices"),
        ({"embedder": "none", "mesh": MeshConfig(3, 1, 1)}, "doesn't fit 8 devices"),
        ({"initial_embedding": "embedder", "model": {"t5": {"d_model": 24}}}, "needs model.t5.d_model=16"),
        ({"mesh": MeshConfig(1, 1, 8)}, "which mesh.model=8 doesn't divide"),
        ({"data": {"held_out": "none.txt"}}, "There is no file"),
    ],
)
def test_settings_that_cannot_run(recipe, tmp_path, changes, message):
    def merge(config, changes):
        nested = {
            name: merge(getattr(config, name), value) if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return dataclasses.replace(config, **nested)

    with pytest.raises(InputError, match=message):
        train(merge(recipe, changes), tmp_path)


def test_the_recipe_is_kept_with_the_run_and_the_model(finished, recipe):
    expected = json.loads(json.dumps(to_dict(recipe)))
    assert json.loads((finished / "config.json").read_text()) == expected
    assert model_record(finished) == expected


def test_a_held_out_text_of_unknown_pieces_alone_is_left_out(tmp_path, monkeypatch):
    config = make_recipe(tmp_path)
    read = read_texts
    monkeypatch.setattr(recipe_data, "read_texts", lambda source, split, **kw: ["zyx", *read(source, split, **kw)])
    held_out = prepare(config).held_out
    assert held_out and all(text.strip() and "zyx" not in text for text in held_out)


def test_a_ranker_joins_a_trained_model_and_guides_its_edits(finished, recipe, tmp_path):
    model = str(finished / "model")
    settings = dataclasses.replace(recipe.corrector, num_steps=60)
    initial = {"initial_inverter": model, "initial_corrector": model, "corrector_from_inverter": False}
    ranker = dataclasses.replace(recipe, stages=("ranker",), ranker=settings, edited_hypotheses=True, **initial)
    made = v2t_jax.load(str(train(ranker, tmp_path / "ranker")))
    before = v2t_jax.load(model)
    for stage in ("inverter", "corrector"):
        jax.tree.map(np.testing.assert_array_equal, made.params[stage], before.params[stage])
    lines = [line for line in log(tmp_path / "ranker", "ranker") if "loss" in line]
    # A random embedder tells little of single words.
    assert lines[-1]["loss"] < 0.93 * lines[0]["loss"] and lines[-1]["token_accuracy"] > lines[0]["token_accuracy"]
    assert "held_out_bleu" in log(tmp_path / "ranker", "ranker")[-1]
    more = dataclasses.replace(ranker, initial_ranker=str(tmp_path / "ranker" / "model"))
    train(more, tmp_path / "more")
    again = [line for line in log(tmp_path / "more", "ranker") if "loss" in line]
    assert again[0]["loss"] < 0.95 * lines[0]["loss"]


def test_training_goes_on_from_a_model(finished, recipe, tmp_path):
    model = str(finished / "model")
    stage = dataclasses.replace(recipe.inverter, num_steps=5)
    again = dataclasses.replace(
        recipe, inverter=stage, corrector=stage, initial_inverter=model, initial_corrector=model
    )
    train(again, tmp_path / "again")
    for name in ("inverter", "corrector"):
        first = next(line["loss"] for line in log(tmp_path / "again", name) if "loss" in line)
        last = next(line["loss"] for line in reversed(log(finished, name)) if "loss" in line)
        assert first < 1.2 * last
    with pytest.raises(InputError, match="has no ranker; leave initial_ranker empty"):
        train(dataclasses.replace(again, initial_ranker=model), tmp_path / "none")


def test_a_corrector_alone_learns_from_a_trained_inverter(finished, recipe, tmp_path):
    model = str(finished / "model")
    short = dataclasses.replace(recipe.corrector, num_steps=5)
    alone = dataclasses.replace(recipe, stages=("corrector",), initial_inverter=model, corrector=short)
    made = v2t_jax.load(str(train(alone, tmp_path / "alone")))
    jax.tree.map(np.testing.assert_array_equal, made.params["inverter"], v2t_jax.load(model).params["inverter"])
    assert made.has_corrector and not (tmp_path / "alone" / "inverter").exists()
    tables = [params["t5"]["token_embedding"] for params in made.params.values()]
    assert np.abs(tables[0] - tables[1]).max() > 1e-3
    folder = train(dataclasses.replace(alone, shared_table=True), tmp_path / "shared")
    shared = v2t_jax.load(str(folder))
    jax.tree.map(np.testing.assert_array_equal, shared.params["inverter"], made.params["inverter"])
    np.testing.assert_array_equal(shared.params["corrector"]["t5"]["token_embedding"], tables[0])
    assert "t5/token_embedding" not in load_file(folder / "corrector.safetensors")
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *(m.params["corrector"]["t5"] for m in (shared, made)))
    assert moved["decoder"]["layers"]["feed_forward"]["wi"] > 0
    larger = dataclasses.replace(alone, model=dataclasses.replace(recipe.model, num_pseudo_tokens=3))
    with pytest.raises(InputError, match="has other sizes than this recipe"):
        train(larger, tmp_path / "larger")
    with pytest.raises(InputError, match="give a trained model as initial_inverter"):
        dataclasses.replace(recipe, stages=("corrector",))
