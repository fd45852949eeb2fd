"""The correction loop: what it selects, when it stops, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.toy_loop import (
    BATCH,
    LENGTH,
    WIDTH,
    assert_same,
    cosine,
    embed,
    hypothesize,
    make_loop,
    propose_greedy,
    propose_hashed,
    propose_same,
    toy_params,
    toy_texts,
)
from v2t_jax.errors import InputError
from v2t_jax.inversion.correction import CorrectionLoop, CorrectionSettings, Hypotheses


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("propose", [propose_greedy, propose_hashed])
def test_best_cosine_never_falls_and_is_the_answer(params, targets, propose, width):
    found = make_loop(propose, sequence_beam_width=width)(params, targets, 9)
    assert (np.diff(found.trace_similarity, axis=1) >= 0).all()
    np.testing.assert_array_equal(found.similarity, found.trace_similarity.max(axis=1))
    # `step` is the first at which the answer was seen.
    np.testing.assert_array_equal(found.step, found.trace_similarity.argmax(axis=1))
    again = np.asarray(cosine(embed(params, jnp.asarray(found.ids)), jnp.asarray(targets)))
    np.testing.assert_allclose(found.similarity, again, atol=1e-6)
    rows = np.arange(BATCH)
    np.testing.assert_array_equal(found.trace_ids[rows, found.step], found.ids)
    assert found.trace_ids.shape == (BATCH, 10, LENGTH) and found.ids.dtype == np.int32


def test_recovers_the_toy_texts(params, targets):
    found = make_loop()(params, targets, 12)
    assert (found.ids == toy_texts(1, BATCH)).all(axis=1).mean() >= 0.8
    assert found.trace_similarity[:, -1].mean() > found.trace_similarity[:, 0].mean() + 0.1


@pytest.mark.parametrize("settings", [{"sequence_beam_width": 1}, {"mode": "upstream"}])
def test_no_steps_returns_the_inverters_greedy_guess(params, targets, settings):
    found = make_loop(**settings)(params, targets, 0)
    np.testing.assert_array_equal(found.ids, hypothesize(params, jnp.asarray(targets), 1)[:, 0])
    assert found.steps_run == 0 and found.trace_ids.shape == (BATCH, 1, LENGTH) and not found.step.any()


def test_no_steps_with_a_beam_returns_the_closest_first_guess(params, targets):
    found = make_loop()(params, targets, 0)
    ids = hypothesize(params, jnp.asarray(targets), 4 * 4)  # as many as a step's candidates
    emb = embed(params, ids.reshape(-1, LENGTH)).reshape(BATCH, 16, WIDTH)
    closest = np.asarray(cosine(emb, jnp.asarray(targets)[:, None])).argmax(axis=1)
    np.testing.assert_array_equal(found.ids, np.asarray(ids)[np.arange(BATCH), closest])


def test_frozen_rows_do_not_change(params):
    ids = toy_texts(2, 6)
    first = np.asarray(hypothesize(params, embed(params, ids), 1)[:, 0])
    # Half the targets are embeddings whose first guess is right: frozen at step 0, while the rest wander.
    fixed = np.asarray(embed(params, first))
    right = (np.asarray(hypothesize(params, jnp.asarray(fixed), 1)[:, 0]) == first).all(axis=1)
    assert right.any()
    e = np.concatenate([fixed[right], np.asarray(embed(params, ids))])
    found = make_loop(propose_hashed)(params, e, 6)
    frozen = slice(0, right.sum())
    assert found.step[right.sum() :].any()
    assert (found.trace_ids[frozen] == found.trace_ids[frozen, :1]).all()
    assert not found.step[frozen].any() and (found.similarity[frozen] >= 1 - 1e-5).all()


def test_a_frozen_beam_is_left_alone_by_the_step(params, targets):
    loop = make_loop(propose_hashed)
    beam = jax.jit(loop.first_beam)(params, jnp.asarray(targets), len(targets), 1)
    beam = beam._replace(done=jnp.arange(BATCH) % 2 == 0)
    moved = jax.jit(loop.step)(params, jnp.asarray(targets), beam, jnp.int32(1), jnp.int32(1))
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[::2], new[::2]), beam, moved)
    assert not np.array_equal(beam.pool.ids[1::2], moved.pool.ids[1::2])


def counted(host_calls):
    """The toy embedder, counting in the running program."""

    def run(params, ids):
        jax.debug.callback(lambda: host_calls.append(1))
        return embed(params, ids)

    return run


@pytest.mark.parametrize("watched", [False, True])
def test_early_exit_saves_steps(params, targets, watched):
    calls, reports = [], []
    loop = CorrectionLoop(hypothesize, (propose_greedy,), counted(calls), CorrectionSettings())
    found = loop(params, targets, 40, (lambda *report: reports.append(report)) if watched else None)
    jax.effects_barrier()
    assert found.steps_run < 40 and len(calls) == found.steps_run + 1
    assert found.trace_ids.shape == (BATCH, 41, LENGTH)
    assert (found.trace_ids[:, found.steps_run :] == found.ids[:, None]).all()
    if watched:
        assert [step for step, _ in reports] == list(range(found.steps_run + 1))
        assert reports[-1] == (found.steps_run, pytest.approx(found.similarity.mean(), abs=1e-6))


@pytest.mark.parametrize("settings", [{}, {"patience": 1}, {"mode": "upstream"}, {"sequence_beam_width": 1}])
def test_watched_steps_are_those_of_the_one_program(params, targets, settings):
    loop = make_loop(propose_hashed, **settings)
    for num_steps in (0, 1, 5):
        whole, watched = (loop(params, targets, num_steps, on_step) for on_step in (None, lambda *_: None))
        assert_same(watched, whole)


def test_a_batch_is_one_dispatch_of_one_program_whatever_its_steps(params, targets, monkeypatch):
    loop = CorrectionLoop(hypothesize, (propose_hashed,), embed, CorrectionSettings(sequence_beam_width=2))
    dispatched = []
    for name in ("run", "start", "advance"):
        program = getattr(loop, name)
        monkeypatch.setattr(loop, name, lambda *a, p=program, n=name, **k: dispatched.append(n) or p(*a, **k))
    for num_steps in (0, 1, 7, 32):
        loop(params, targets, num_steps)
    assert dispatched == [
        "start",
        "run",
        "run",
        "run",
    ]  # without steps no corrector is needed, and a model may lack one
    monkeypatch.undo()
    assert loop.run._cache_size() == 1
    lowered = loop.run.lower(
        params, jnp.asarray(targets), np.int32(len(targets)), np.int32(7), np.int32(7), room=32
    ).as_text()
    assert lowered.count("stablehlo.while") == 1


@pytest.mark.parametrize("proposers", [(propose_hashed,), ()])
def test_rounds_of_edits_follow_the_steps_in_the_same_program(params, targets, proposers):
    options = {"edit": lambda params, given, look: look(propose_greedy(params, given, 1)), "edit_calls": 1}
    loop = CorrectionLoop(hypothesize, proposers, embed, CorrectionSettings(sequence_beam_width=2), **options)
    steps = 3 if proposers else 0
    guesses = CorrectionLoop(hypothesize, proposers, embed, CorrectionSettings(sequence_beam_width=2))
    before = guesses(params, targets, steps)
    for rounds in (1, 2, 9):
        found = loop(params, targets, steps, None, rounds)
        watched = loop(params, targets, steps, lambda *_: None, rounds)
        assert_same(watched, found)
        assert found.trace_ids.shape[1] == steps + rounds + 1
        np.testing.assert_array_equal(found.trace_ids[:, : steps + 1], before.trace_ids)
        assert np.all(np.diff(found.trace_similarity) >= 0)
    assert loop.run._cache_size() == 1
    assert np.mean(found.similarity >= 1 - 1e-5) > np.mean(before.similarity >= 1 - 1e-5)


def test_what_the_steps_have_exhausted_is_edited(params, targets):
    """A proposer without anything new ends its rows; the rounds take them up again."""
    options = {"edit": lambda params, given, look: look(propose_greedy(params, given, 1)), "edit_calls": 1}
    loop = CorrectionLoop(hypothesize, (propose_same,), embed, CorrectionSettings(sequence_beam_width=1), **options)
    for on_step in (None, lambda *_: None):
        assert loop(params, targets, 6, on_step).steps_run < 6  # without rounds, exhausted rows end the run
        found = loop(params, targets, 6, on_step, 6)
        assert found.similarity.mean() > found.trace_similarity[:, 6].mean() + 0.01


def test_the_trace_has_room_for_any_number_of_steps(params, targets):
    found = make_loop(propose_hashed, mode="upstream", sequence_beam_width=1)(params, targets, 70)
    assert found.trace_ids.shape == (BATCH, 71, LENGTH) and found.steps_run == 70
    short = make_loop(propose_hashed, mode="upstream", sequence_beam_width=1)(params, targets, 30)
    np.testing.assert_array_equal(found.trace_ids[:, :31], short.trace_ids)


def test_every_hypothesis_is_expanded_once_and_the_nearest_first(params, targets):
    """Against best-first search in plain Python, which remembers everything."""
    expanded = []

    def watched(params, given, k):
        jax.debug.callback(lambda ids: expanded.append(np.asarray(ids)), given.ids)
        return propose_hashed(params, given, k)

    width, steps, target = 2, 4, targets[:1]
    CorrectionLoop(hypothesize, (watched,), embed, CorrectionSettings(sequence_beam_width=width))(params, target, steps)
    jax.effects_barrier()

    def nearness(text):
        emb = np.asarray(embed(params, jnp.asarray([text])))[0]
        return float(emb @ target[0] / np.linalg.norm(emb) / np.linalg.norm(target[0]))

    known = {tuple(ids): None for ids in np.asarray(hypothesize(params, jnp.asarray(target), width**2))[0].tolist()}
    known, done = {text: nearness(text) for text in known}, set()
    for step in range(steps):
        chosen = sorted(known.keys() - done, key=known.get, reverse=True)[:width]
        assert chosen == [tuple(row) for row in expanded[step].tolist()]
        done.update(chosen)
        for parent in chosen:
            row = jnp.asarray([parent])
            children = propose_hashed(params, Hypotheses(jnp.asarray(target), row, embed(params, row), None), width)
            for child in np.asarray(children)[0].tolist():
                end = child.index(1) if 1 in child else LENGTH
                text = tuple(child[: end + 1] + [0] * (LENGTH - end - 1))
                known.setdefault(text, nearness(text))


def test_a_loop_that_finds_nothing_new_is_done(params, targets):
    found = make_loop(propose_same, sequence_beam_width=2)(params, targets, 20)
    assert found.steps_run == 2  # four first guesses, two looked at in a step
    assert (found.trace_ids == found.ids[:, None]).all()


def test_patience_stops_rows_without_improvement(params, targets):
    patient = make_loop(propose_hashed)(params, targets, 30)
    hasty = make_loop(propose_hashed, patience=1)(params, targets, 30)
    assert hasty.steps_run < patient.steps_run
    assert (hasty.step < patient.step).any() and (hasty.step == patient.step).any()
    # A row does what it would have done until its first step without improvement, and keeps that answer.
    for row in range(BATCH):
        last = 0
        while patient.trace_similarity[row, last + 1] > patient.trace_similarity[row, last]:
            last += 1
        assert hasty.step[row] == last
        np.testing.assert_array_equal(hasty.ids[row], patient.trace_ids[row, last])


def test_the_beam_holds_distinct_texts_and_marks_fillers(params, targets):
    e = jnp.asarray(targets)

    def with_junk_after_eos(params, given, k):
        """k copies of one new text (ends at position 2), written differently behind its eos."""
        new = jnp.repeat(given.ids[:, None, :], k, axis=1).at[:, :, 2].set(1)
        return new.at[:, :, 3:].set(2 + jnp.arange(k)[None, :, None])

    def one_guess(params, e, k):
        return jnp.repeat(hypothesize(params, e, 1), k, axis=1)

    loop = CorrectionLoop(one_guess, (with_junk_after_eos,), embed, CorrectionSettings(sequence_beam_width=3))
    beam = jax.jit(loop.first_beam)(params, e, len(e), 1)
    first = beam.pool
    np.testing.assert_array_equal(np.isfinite(first.similarity), [[True] + [False] * 11] * BATCH)  # MEMORY * W slots
    assert (first.ids == first.ids[:, :1]).all()
    second = jax.jit(loop.step)(params, e, beam, jnp.int32(1), jnp.int32(1)).pool
    np.testing.assert_array_equal(np.isfinite(second.similarity), [[True, True] + [False] * 10] * BATCH)
    assert not (second.ids[:, 0] == second.ids[:, 1]).all(axis=1).any()
    np.testing.assert_array_equal(second.ids[:, 2], second.ids[:, 0])  # a filler repeats the best

    full = make_loop(propose_hashed)
    beam, step = jax.jit(full.first_beam)(params, e, len(e), 1), jax.jit(full.step)
    for number in range(1, 4):
        beam = step(params, e, beam, jnp.int32(number), jnp.int32(3))
        for ids, here in zip(np.asarray(beam.pool.ids), np.isfinite(beam.pool.similarity), strict=True):
            assert len({tuple(text) for text in ids[here].tolist()}) == here.sum() >= 4
        assert (np.diff(np.maximum(beam.pool.similarity, -2), axis=1) <= 0).all()  # fillers come last


def test_candidates_that_are_not_numbers_never_win(params, targets):
    def sometimes_nan(params, ids):
        return jnp.where((ids[:, :1] % 2) == 0, jnp.nan, embed(params, ids))

    loop = CorrectionLoop(hypothesize, (propose_hashed,), sometimes_nan, CorrectionSettings())
    found = loop(params, targets, 6)
    assert np.isfinite(found.similarity).all() and (found.ids[:, 0] % 2 == 1).all()


def upstream_in_plain_python(propose, params, e, steps, width):
    """The original's generation, one item at a time; returns the ids selected at each step, guess first."""
    propose, embed_one = jax.jit(propose, static_argnums=2), jax.jit(embed)

    def similarity(a, b):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    selected = []
    for target in np.asarray(e):
        hypotheses = [np.asarray(hypothesize(params, jnp.asarray(target)[None], 1))[0, 0]]
        trace = [hypotheses[0]]
        for t in range(steps):
            pool = []
            for ids in hypotheses:
                emb = embed_one(params, jnp.asarray(ids)[None])
                given = Hypotheses(jnp.asarray(target)[None], jnp.asarray(ids)[None], emb, None)
                for child in np.asarray(propose(params, given, width))[0]:
                    emb_child = np.asarray(embed_one(params, jnp.asarray(child)[None]))[0]
                    pool.append((similarity(emb_child, target), child))
            assert len(pool) == (width if t == 0 else width * width)
            pool.sort(key=lambda scored: -scored[0])
            trace.append(pool[0][1])
            hypotheses, seen = [], set()
            for _, child in pool:
                if tuple(child) not in seen and len(hypotheses) < width:
                    seen.add(tuple(child))
                    hypotheses.append(child)
            assert len(hypotheses) == width
        selected.append(np.stack(trace))
    return np.stack(selected)


@pytest.mark.parametrize("propose", [propose_hashed, propose_greedy])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_upstream_mode_is_the_originals_selection(params, targets, propose, width):
    e, steps = targets[:4], 5
    loop = make_loop(propose, mode="upstream", sequence_beam_width=width)
    found = loop(params, e, steps)
    expected = upstream_in_plain_python(propose, params, e, steps, width)
    np.testing.assert_array_equal(found.trace_ids, expected)
    np.testing.assert_array_equal(found.ids, expected[:, -1])
    assert found.steps_run == steps and (found.step == steps).all()
    again = cosine(embed(params, jnp.asarray(found.ids)), jnp.asarray(e))
    np.testing.assert_allclose(found.similarity, np.asarray(again), atol=1e-6)


def test_first_pool_of_upstream_mode_is_the_children_of_one_hypothesis(params, targets):
    rows = []

    def propose_by_row(params, given, k):
        """As if rounding decided: copies of one hypothesis would get other children."""
        rows.append(len(given.ids))
        copy = jnp.arange(len(given.ids)) % (len(given.ids) // BATCH)
        token = 2 + copy[:, None] * 3 + jnp.arange(k)[None]
        return jnp.repeat(given.ids[:, None], k, axis=1).at[:, :, 0].set(token)

    loop = make_loop(propose_by_row, mode="upstream", sequence_beam_width=3)
    e = jnp.asarray(targets)
    beam = jax.jit(loop.first_beam)(params, e, len(e), 1)
    beam = jax.jit(loop.step)(params, e, beam, jnp.int32(1), jnp.int32(1))
    np.testing.assert_array_equal(np.sort(beam.pool.ids[:, :, 0], axis=1), [[2, 3, 4]] * BATCH)
    assert set(rows) == {BATCH, 3 * BATCH}  # of the first step, in which copies aren't decoded, and of others


def test_candidates_of_all_proposers_compete(params, targets):
    """One proposer finds the texts, the other, which knows nothing of them, takes nothing away."""
    both = (propose_hashed, propose_greedy)
    loop = CorrectionLoop(hypothesize, both, embed, CorrectionSettings(sequence_beam_width=2))
    found = loop(params, targets, 12)
    alone = make_loop(propose_hashed, sequence_beam_width=2)(params, targets, 12)
    assert found.similarity.mean() > alone.similarity.mean() + 0.1
    seen = []

    def nothing_new(params, given, k):
        jax.debug.callback(lambda *arrays: seen.append(arrays), *given)
        return propose_same(params, given, 3)  # its own number of candidates

    loop = CorrectionLoop(hypothesize, (propose_greedy, nothing_new), embed, CorrectionSettings(sequence_beam_width=2))
    assert_same(loop(params, targets, 5), make_loop(sequence_beam_width=2)(params, targets, 5))
    jax.effects_barrier()
    e, ids, embedding, similarity = seen[0]
    np.testing.assert_array_equal(e, np.repeat(targets, 2, axis=0))
    np.testing.assert_allclose(embedding, embed(params, ids), atol=1e-6)
    np.testing.assert_allclose(similarity, cosine(embedding, e), atol=1e-6)


def test_similarity_and_what_is_solved_are_the_callers(params, targets):
    def nearness(a, b):
        return -jnp.sum((a - b) ** 2, axis=-1)

    loop = CorrectionLoop(
        *(hypothesize, (propose_greedy,), embed, CorrectionSettings()),
        similarity=nearness,
        solved=lambda similarity: similarity > -1e-6,
    )
    found = loop(params, targets, 12)
    expected = np.asarray(nearness(embed(params, jnp.asarray(found.ids)), jnp.asarray(targets)))
    np.testing.assert_allclose(found.similarity, expected, atol=1e-3)
    assert (np.diff(found.trace_similarity, axis=1) >= 0).all() and found.steps_run < 12


def test_upstream_mode_can_get_worse_and_best_mode_does_not(params, targets):
    upstream = make_loop(propose_hashed, mode="upstream")(params, targets, 8)
    assert (np.diff(upstream.trace_similarity, axis=1) < 0).any()
    best = make_loop(propose_hashed)(params, targets, 8)
    assert best.similarity.mean() > upstream.similarity.mean()


def test_one_compile_serves_every_batch_weight_and_number_of_steps(params, targets):
    traces = {"hypothesize": 0, "propose": 0, "embed": 0}

    def count(name, function):
        def wrapped(*args):
            traces[name] += 1
            return function(*args)

        return wrapped

    loop = CorrectionLoop(
        count("hypothesize", hypothesize),
        (count("propose", propose_hashed),),
        count("embed", embed),
        CorrectionSettings(sequence_beam_width=2),
    )
    loop(params, targets, 3)
    first = dict(traces)
    assert first["hypothesize"] == 1
    for seed, steps in [(0, 3), (3, 1), (4, 8), (5, 2)]:
        other = toy_params(seed)
        loop(other, np.asarray(embed(other, toy_texts(seed, BATCH))), steps)
    assert traces == first and loop.run._cache_size() == 1


def test_a_rows_result_does_not_depend_on_the_others(params, targets):
    loop = make_loop()
    whole, halves = loop(params, targets, 7), [loop(params, half, 7) for half in np.split(targets, 2)]
    *arrays, steps_run = zip(*halves, strict=True)
    assert_same(whole, [*(np.concatenate(parts) for parts in arrays), max(steps_run)])


def test_an_embedder_without_vectors_ends_the_loop(params, targets):
    calls = []

    def broken_later(params, ids):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.where(len(ids) > BATCH, jnp.nan, embed(params, ids))

    for mode, steps_run in (("best", 0), ("upstream", 1)):  # upstream: the first guess alone has an embedding
        loop = CorrectionLoop(hypothesize, (propose_hashed,), broken_later, CorrectionSettings(mode=mode))
        assert loop(params, targets, 9).steps_run == steps_run


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "last"),
        ("sequence_beam_width", 0),
        ("sequence_beam_width", 65),
        ("patience", -1),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=field):
        CorrectionSettings(**{field: value})


def test_a_first_guess_is_cut_where_it_is_to_be_corrected(params, targets):
    loop = make_loop(propose_hashed, mode="upstream", sequence_beam_width=2, guess_length=3)
    whole = loop(params, targets, 0)
    np.testing.assert_array_equal(whole.ids, hypothesize(params, jnp.asarray(targets), 1)[:, 0])
    guess = loop(params, targets, 2).trace_ids[:, 0]
    np.testing.assert_array_equal(guess, np.where(np.arange(LENGTH) < 3, whole.ids, 0))


def test_patience_in_upstream_mode_is_refused():
    with pytest.raises(InputError, match="patience"):
        CorrectionSettings(mode="upstream", patience=2)
