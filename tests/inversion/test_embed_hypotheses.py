"""Through the host: equal to the device path, in whole batches, without a deadlock."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.toy_loop import (
    BATCH,
    LENGTH,
    VOCAB,
    WIDTH,
    assert_same,
    embed,
    hypothesize,
    make_loop,
    propose_greedy,
    toy_texts,
)
from v2t_jax.config import MeshConfig
from v2t_jax.errors import InputError
from v2t_jax.inversion.correction import CorrectionLoop, CorrectionSettings
from v2t_jax.inversion.embed_hypotheses import HostFunctions, embed_once
from v2t_jax.inversion.upstream import topk_order
from v2t_jax.parallel.mesh import batch_sharding, make_mesh


def embed_masked(params, ids, mask):
    return embed(params, jnp.where(mask > 0, ids, 0))


def test_the_host_path_equals_the_device_path_when_the_vocabularies_agree(params, targets):
    tokens = HostFunctions().tokens(lambda ids: (ids, (ids != 0).astype(np.int64)), LENGTH)
    loop = CorrectionLoop(
        hypothesize, (propose_greedy,), lambda p, ids: embed_masked(p, *tokens(ids)), CorrectionSettings()
    )
    assert_same(loop(params, targets, 6), make_loop()(params, targets, 6))


def test_another_vocabulary_and_length(params, targets):
    """The embedder numbers its tokens in reverse and reads two positions more than the model writes."""
    length = LENGTH + 2
    other = {"table": jnp.pad(params["table"][:, ::-1], ((0, 2), (0, 0), (0, 0)))}

    def to_embedder(ids):
        mask = np.pad((ids != 0).astype(np.int32), ((0, 0), (0, 2)))
        return np.pad(VOCAB - 1 - ids, ((0, 0), (0, 2))), mask

    def embed_other(p, ids):
        other_ids, mask = HostFunctions().tokens(to_embedder, length)(ids)
        vectors = jnp.take_along_axis(p["other"]["table"][None], other_ids[:, :, None, None], axis=2)[:, :, 0]
        return jnp.sum(vectors * mask[:, :, None], axis=1)

    def inner(function):
        return lambda p, *rest: function(p["model"], *rest)

    loop = CorrectionLoop(inner(hypothesize), (inner(propose_greedy),), embed_other, CorrectionSettings())
    assert_same(loop({"model": params, "other": other}, targets, 6), make_loop()(params, targets, 6))


def test_black_box_embedder_is_called_once_a_step_with_the_whole_batch(params, targets):
    table, calls = np.asarray(params["table"]), []

    def black_box(ids):
        calls.append(ids.shape)
        vectors = table[np.arange(LENGTH)[None], ids]
        return np.where((ids == 0)[:, :, None], 0, vectors).sum(axis=1).astype(np.float64)

    boxed = HostFunctions().vectors(black_box, WIDTH)
    loop = CorrectionLoop(hypothesize, (propose_greedy,), lambda p, ids: boxed(ids), CorrectionSettings())
    found = loop(params, targets, 6)
    assert_same(found, make_loop()(params, targets, 6))
    assert calls == [(BATCH * 4 * 4, LENGTH)] * (1 + found.steps_run)


def test_a_large_batch_crosses_without_a_deadlock():
    rows, length = 2048, 128
    tokens = HostFunctions().tokens(lambda ids: (ids[:, ::-1], np.ones_like(ids)), length)
    ids = jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length)

    @partial(jax.jit, static_argnums=1)
    def repeatedly(ids, times):
        return jax.lax.scan(lambda carry, _: (tokens(carry)[0], None), ids, None, length=times)[0]

    np.testing.assert_array_equal(repeatedly(ids, 20), ids)


@pytest.mark.parametrize("mode", ["best", "upstream"])
def test_what_the_host_raises_arrives_as_itself_and_at_once(params, targets, caplog, mode):
    calls, steps, failing = [], [], {}

    def on_host(ids):
        calls.append(len(ids))
        if len(calls) in failing:
            raise failing[len(calls)]
        return np.asarray(params["table"])[np.arange(LENGTH)[None], ids].sum(axis=1)

    def propose(params, given, k):
        jax.debug.callback(lambda: steps.append(1))
        return propose_greedy(params, given, k)

    host = HostFunctions()
    boxed = host.vectors(on_host, WIDTH)
    settings = CorrectionSettings(mode=mode)
    loop = CorrectionLoop(hypothesize, (propose,), lambda p, ids: boxed(ids), settings, check=host.check)
    for error in (InputError("The key is wrong; set another."), KeyboardInterrupt(), KeyError("own")):
        for at_call in (1, 3):  # at the first guess; inside the steps
            calls.clear()
            steps.clear()
            failing = {at_call: error}
            with pytest.raises(type(error)) as caught:
                loop(params, targets, 6)
            jax.effects_barrier()
            assert caught.value is error and len(calls) == at_call and len(steps) == at_call - 1
    assert not caplog.records  # JAX would log a traceback
    failing = {}
    assert loop(params, targets, 1).steps_run == 1  # nothing of it is left


def test_what_fails_has_no_embeddings(params):
    def fails(ids):
        raise InputError(f"{ids[0, 0]} is wrong; change it.")

    host, ids = HostFunctions(), jnp.full((2, 3), 7)
    assert np.isnan(jax.jit(host.vectors(fails, WIDTH))(ids)).all()
    token_ids, mask = jax.jit(host.tokens(fails, 3))(ids)
    assert (np.asarray(token_ids) == -1).all() and (np.asarray(mask) == -1).all()
    with pytest.raises(InputError, match="^7 is wrong; change it.$"):
        host.check()
    host.check()  # raised once


@pytest.mark.parametrize(
    ("rows", "devices", "run_for"),
    [
        (1, 1, [0, 1, 2, 5]),
        (2, 1, [0, 1, 2, 5]),
        (1, 2, [0, 1, 2, 4, 5, 6]),  # a device knows nothing of the other's
        (3, 1, range(8)),  # doesn't divide 8
        (1, 3, [0, 1, 2, 5]),  # the batch lies on fewer devices than there are
    ],
)
def test_each_text_is_embedded_once_on_a_device(rows, devices, run_for) -> None:
    ids = jnp.asarray(toy_texts(0, 4)[[0, 1, 2, 0, 1, 3, 2, 1]])
    first = [0, 1, 2, 0, 4, 5, 6, 4] if devices == 2 else [0, 1, 2, 0, 1, 5, 2, 1]
    seen = []

    def host(ids, mask):
        seen.extend((mask[:, 0] - 1).tolist())
        return np.concatenate([ids, mask[:, :1] - 1], axis=1).astype(np.float32)

    def run(ids, mask):
        return jax.pure_callback(host, jax.ShapeDtypeStruct((len(ids), LENGTH + 1), jnp.float32), ids, mask)

    mask = jnp.repeat(jnp.arange(1, 9)[:, None], LENGTH, axis=1)  # whole texts, which are known by it
    found = jax.jit(partial(embed_once, run, width=LENGTH + 1, rows=rows, devices=devices))(ids, mask)
    np.testing.assert_array_equal(found, np.concatenate([ids, np.array(first)[:, None]], axis=1))
    assert sorted(seen) == list(run_for)


def test_texts_that_differ_in_their_length_alone_are_two() -> None:
    ids, mask = jnp.asarray([[5, 0, 0], [5, 0, 0], [5, 7, 0], [5, 0, 0]]), jnp.asarray([[1, 0, 0], [1, 1, 0]] * 2)
    found = embed_once(lambda ids, mask: (mask * (ids + 1)).astype(jnp.float32), ids, mask, width=3, rows=1, devices=1)
    np.testing.assert_array_equal(found, mask * (ids + 1))


def test_texts_on_several_devices_stay_there() -> None:
    place = batch_sharding(make_mesh(MeshConfig(), jax.devices()))
    ids = jax.device_put(jnp.asarray(toy_texts(0, 64) % 3), place)
    run = jax.jit(partial(embed_once, lambda ids: ids.astype(jnp.float32), width=LENGTH, rows=2, devices=8))
    np.testing.assert_array_equal(run(ids), ids)
    assert "all-gather" not in run.lower(ids).compile().as_text()


@pytest.mark.parametrize("settings", [{}, {"mode": "upstream"}, {"sequence_beam_width": 1}])
def test_a_search_finds_the_same_where_texts_are_embedded_once(params, targets, settings) -> None:
    whole = make_loop(**settings)(params, targets, 6)
    for rows in (1, BATCH):
        once = CorrectionLoop(
            hypothesize,
            (propose_greedy,),
            lambda p, ids, rows=rows: embed_once(partial(embed, p), ids, width=WIDTH, rows=rows, devices=1),
            CorrectionSettings(**settings),
            rank=topk_order,
        )
        assert_same(once(params, targets, 6), whole)
