"""One step: what its loss counts, and that micro-batches and devices change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.tiny_run import make_embedder, make_texts
from v2t_jax.config import MeshConfig, ModelConfig, T5Config
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.load import load_embedder
from v2t_jax.models.embedder import embed_model_ids
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.parallel.mesh import make_mesh, replicated
from v2t_jax.train.step import (
    STATES_A_TEXT,
    Batch,
    FrozenParams,
    Task,
    TrainState,
    cross_entropy,
    edited_hypotheses,
    greedy_hypotheses,
    make_step,
    mixed_hypotheses,
    shard_step,
)

T5 = T5Config(
    vocab_size=60,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.0,
)
MODEL = ModelConfig(
    t5=T5,
    embedding_width=16,
    num_pseudo_tokens=2,
    max_length=8,
    state_width=16,
    projection_dropout=0.0,
    standardize=True,
    bag_of_words=True,
)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return load_embedder(str(make_embedder(tmp_path_factory.mktemp("step") / "embedder")))


@pytest.fixture(scope="module")
def vocabulary(embedder):
    return Vocabulary.full(embedder.tokenizer)


@pytest.fixture(scope="module")
def ids(vocabulary):
    """32 texts, [32, 8]."""
    rows = vocabulary.encode(make_texts(32))
    return np.stack([np.pad(row, (0, 8 - len(row))) + np.eye(8, dtype=np.int32)[len(row)] for row in rows])


@pytest.fixture
def frozen(embedder, vocabulary):
    return FrozenParams(
        embedder.params, jnp.asarray(vocabulary.vocab_map), Inverter(MODEL).init_params(jax.random.key(5))
    )


def loss_of(stage, embedder, model=MODEL):
    return Task(stage, model, embedder.config, embedder.token_map()).loss


def new_state(stage, optimizer):
    params = jax.jit(NETWORKS[stage](MODEL).init_params)(jax.random.key(1))
    return TrainState(jnp.int32(0), params, optimizer.init(params))


@pytest.mark.parametrize("prefix", ["", "the cat sees "])
def test_on_device_embeddings_are_the_embedders(embedder, vocabulary, prefix):
    """The shared vocabulary is what re-embeds hypotheses without leaving the device."""
    prefixed = dataclasses.replace(embedder, config=dataclasses.replace(embedder.config, prefix=prefix))
    rng = np.random.default_rng(0)
    texts = [*make_texts(20, seed=3), "cat", "the dogs and birds"]
    rows = vocabulary.encode(texts)
    garbage = rng.integers(2, 60, (len(rows), 10)).astype(np.int32)  # what follows the end doesn't count
    for row, kept in zip(garbage, rows, strict=True):
        row[: len(kept)] = kept
        row[len(kept)] = 1
    got = embed_model_ids(
        prefixed.config,
        prefixed.token_map(),
        prefixed.params,
        jnp.asarray(vocabulary.vocab_map),
        jnp.asarray(garbage),
    )
    expected = prefixed.embed(vocabulary.decode(garbage))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(got, prefixed.embed(texts), atol=2e-6)


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1e-9, 0.5, 0.5]]]))
    loss, (correct, tokens) = cross_entropy(logits, jnp.asarray([[1, 2, 0]]))
    assert float(loss) == pytest.approx(-np.log(0.25) - np.log(0.8), rel=1e-5)
    assert (float(correct), float(tokens)) == (1.0, 2.0)


@pytest.mark.parametrize("stage", ["inverter", "corrector"])
def test_padding_does_not_count(stage, embedder, ids, frozen):
    loss_fn = jax.jit(loss_of(stage, embedder))
    params = new_state(stage, optax.sgd(0.1)).params
    loss, (correct, tokens) = loss_fn(params, frozen, Batch(ids), None)
    wide, (wide_correct, wide_tokens) = loss_fn(params, frozen, Batch(np.pad(ids, ((0, 0), (0, 5)))), None)
    assert float(tokens) == float(wide_tokens) == (ids != 0).sum()
    assert float(correct) == float(wide_correct)
    assert float(loss) == pytest.approx(float(wide), rel=1e-6)


@pytest.mark.parametrize("stage", ["inverter", "corrector"])
def test_accumulating_changes_nothing(stage, embedder, ids, frozen):
    optimizer, loss_fn = optax.sgd(0.1), loss_of(stage, embedder)
    whole, parts = (
        jax.jit(make_step(loss_fn, optimizer, n, 0))(new_state(stage, optimizer), frozen, Batch(ids)) for n in (1, 4)
    )
    for one, four in zip(whole[1], parts[1], strict=True):
        assert float(one) == pytest.approx(float(four), rel=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), whole[0].params, parts[0].params)


def test_the_rankers_losses_add_up(embedder, ids, frozen):
    """Each micro-batch draws edits of its own; without a key all hypotheses are the inverter's."""
    loss_fn, params = jax.jit(loss_of("ranker", embedder)), new_state("ranker", optax.sgd(0.1)).params
    whole, *halves = (loss_fn(params, frozen, Batch(rows), None) for rows in (ids, ids[:16], ids[16:]))
    np.testing.assert_allclose(jax.tree.leaves(whole), np.sum([jax.tree.leaves(x) for x in halves], axis=0), rtol=1e-5)
    assert float(whole[1][1]) == len(ids)
    drawn = loss_fn(params, frozen, Batch(ids), jax.random.key(0))
    assert float(drawn[1][1]) == STATES_A_TEXT * len(ids) and float(drawn[0]) != pytest.approx(float(whole[0]))


def test_statistics_and_frozen_weights_get_no_gradient(embedder, ids, frozen):
    params = new_state("corrector", optax.sgd(0.1)).params
    loss_fn = lambda p, f: loss_of("corrector", embedder)(p, f, Batch(jnp.asarray(ids)), None)[0]  # noqa: E731
    grads, frozen_grads = jax.jit(jax.grad(loss_fn, argnums=(0, 1), allow_int=True))(params, frozen)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads["statistics"]))
    floats = [g for g in jax.tree.leaves(frozen_grads) if g.dtype == jnp.float32]
    assert floats and all(not np.asarray(g).any() for g in floats)
    for name in ("projection_target", "projection_difference", "projection_hypothesis", "input_norm", "bag_of_words"):
        assert all(np.asarray(g).any() for g in jax.tree.leaves(grads[name])), name


def run_on(devices, shape, stage, embedder, ids, frozen):
    """Losses of five steps, and the state after them, on a mesh of this shape."""
    model = dataclasses.replace(MODEL, projection_dropout=0.1)
    mesh = make_mesh(MeshConfig(*shape), devices)
    optimizer = optax.adamw(1e-3)
    step = make_step(loss_of(stage, embedder, model), optimizer, 1, 0)
    state = new_state(stage, optimizer)
    step, shardings = shard_step(step, mesh, state, stage)
    state, frozen = jax.device_put(state, shardings), jax.device_put(frozen, replicated(mesh))
    losses = []
    for _ in range(5):
        state, metrics = step(state, frozen, Batch(ids))
        losses.append(float(metrics.loss))
    return losses, state


def test_eight_devices_train_the_ranker_as_one_does(embedder, ids, frozen):
    expected, alone = run_on(jax.devices()[:1], (1, 1, 1), "ranker", embedder, ids, frozen)
    assert expected[-1] < expected[0]
    for shape in ((8, 1, 1), (2, 2, 2)):
        losses, state = run_on(jax.devices(), shape, "ranker", embedder, ids, frozen)
        np.testing.assert_allclose(losses, expected, atol=1e-5, err_msg=str(shape))
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), state.params, alone.params)


@pytest.mark.parametrize("stage", ["inverter", "corrector"])
def test_eight_devices_do_what_one_does(stage, embedder, ids, frozen):
    expected, alone = run_on(jax.devices()[:1], (1, 1, 1), stage, embedder, ids, frozen)
    assert expected[-1] < expected[0]
    for shape in ((8, 1, 1), (2, 2, 2)):
        losses, state = run_on(jax.devices(), shape, stage, embedder, ids, frozen)
        np.testing.assert_allclose(losses, expected, atol=1e-5, err_msg=str(shape))
        kernel = state.params["t5"]["decoder"]["layers"]["feed_forward"]["wi"]
        assert len(kernel.sharding.device_set) == 8
        if shape == (2, 2, 2):
            assert kernel.addressable_shards[0].data.shape == (2, 8, 16)  # fsdp cuts rows, model columns
            moment = optax.tree_utils.tree_get(state.optimizer, "mu")
            assert moment["t5"]["decoder"]["layers"]["feed_forward"]["wi"].sharding == kernel.sharding
        table = state.params["t5"]["token_embedding"]
        np.testing.assert_allclose(table, alone.params["t5"]["token_embedding"], atol=1e-4)


def test_mixed_hypotheses_hold_the_truth_and_what_the_inverter_takes_for_likeliest(frozen, embedder, ids):
    e = embed_model_ids(embedder.config, embedder.token_map(), frozen.embedder, frozen.vocab_map, jnp.asarray(ids))
    guess = np.argmax(Inverter(MODEL).apply({"params": frozen.inverter}, e, jnp.asarray(ids)), axis=-1)
    seen = set()
    for seed in range(4):
        mixed = np.asarray(mixed_hypotheses(MODEL, frozen.inverter, e, jnp.asarray(ids), jax.random.key(seed)))
        for row, truth, likeliest in zip(mixed, ids, guess, strict=True):
            length = int(np.argmax(row == 1)) + 1
            assert row[length - 1] == 1 and not row[length:].any() and length <= np.argmax(truth == 1) + 1
            assert ((row == truth) | (row == likeliest))[:length].all()
        seen.add(mixed.tobytes())
        changed = ((mixed != ids) & (ids > 1)).mean(axis=1)
        assert changed.min() < 0.2 < changed.max()  # from nearly right to wrong
    assert len(seen) == 4


def test_edited_hypotheses_lose_replace_add_and_move_words(frozen, embedder, ids):
    e = embed_model_ids(embedder.config, embedder.token_map(), frozen.embedder, frozen.vocab_map, jnp.asarray(ids))
    made = [
        np.asarray(edited_hypotheses(MODEL, frozen.inverter, e, jnp.asarray(ids[:, :7]), jax.random.key(seed)))
        for seed in range(8)
    ]
    lost = added = moved = kept = 0
    for edited in made:
        assert edited.shape == ids.shape
        for row, truth in zip(edited, ids, strict=True):
            length = int(np.argmax(row == 1))
            assert row[length] == 1 and (row[:length] > 1).all() and not row[length + 1 :].any()
            words, text = row[:length].tolist(), [i for i in truth[:7].tolist() if i > 1]
            lost, added = lost + len(set(text) - set(words)), added + len(set(words) - set(text))
            common = [i for i in words if text.count(i) == 1 and words.count(i) == 1]
            moved += common != sorted(common, key=text.index)
            kept += len(common)
    assert min(lost, added) > 100 and moved > 10 and kept > 300
    assert len({edited.tobytes() for edited in made}) == 8


def test_training_hypotheses_take_turns(frozen, embedder, ids):
    """With both options: the inverter's, an edited one, a partial one, an edited one."""
    e = embed_model_ids(embedder.config, embedder.token_map(), frozen.embedder, frozen.vocab_map, jnp.asarray(ids))
    short, key = jnp.asarray(ids[:, :7]), jax.random.key(0)
    task = Task("corrector", MODEL, None, None, edited_hypotheses=True)
    found = task.hypotheses(frozen, e, short, key)
    np.testing.assert_array_equal(found[::2], greedy_hypotheses(MODEL, frozen.inverter, e)[::2])
    edited = edited_hypotheses(MODEL, frozen.inverter, e[1::2], short[1::2], key)
    np.testing.assert_array_equal(found[1::2], edited)
    both = dataclasses.replace(task, partial_hypotheses=True).hypotheses(frozen, e, short, key)
    np.testing.assert_array_equal(both[::4], greedy_hypotheses(MODEL, frozen.inverter, e)[::4])
    partial = mixed_hypotheses(MODEL, frozen.inverter, e[2::4], short[2::4], key)
    np.testing.assert_array_equal(both[2::4, :7], partial)
    for turn in (1, 3):
        edited = edited_hypotheses(MODEL, frozen.inverter, e[turn::4], short[turn::4], key)
        np.testing.assert_array_equal(both[turn::4], edited)


def test_every_other_training_hypothesis_is_partial_where_asked(frozen, embedder, ids):
    e = embed_model_ids(embedder.config, embedder.token_map(), frozen.embedder, frozen.vocab_map, jnp.asarray(ids))
    short, key = jnp.asarray(ids[:, :7]), jax.random.key(0)  # a bucket shorter than max_length
    greedy = greedy_hypotheses(MODEL, frozen.inverter, e)
    task = Task("corrector", MODEL, None, None)
    for without, given in ((task, key), (dataclasses.replace(task, partial_hypotheses=True), None)):
        np.testing.assert_array_equal(without.hypotheses(frozen, e, short, given), greedy)
    both = dataclasses.replace(task, partial_hypotheses=True).hypotheses(frozen, e, short, key)
    np.testing.assert_array_equal(both[::2], greedy[::2])
    partial = mixed_hypotheses(MODEL, frozen.inverter, e[1::2], short[1::2], key)
    np.testing.assert_array_equal(both[1::2, :7], partial)
    assert both.shape == greedy.shape and not np.asarray(both[1::2, 7:]).any()
