"""Guided edits: what an edit does to a text, how edits are ranked, and rounds of them in the compiled loop."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v2t_jax as v2t
from tests.helpers.tiny_model import MAX_LENGTH, make_model
from tests.helpers.tiny_run import make_static_embedder, make_texts
from v2t_jax.decode.state import EOS
from v2t_jax.embedders.base import JaxEmbedder
from v2t_jax.embedders.black_box import CallableEmbedder
from v2t_jax.errors import InputError
from v2t_jax.inversion.correction import CorrectionLoop, CorrectionSettings, Hypotheses
from v2t_jax.inversion.edits import (
    KEEP,
    NETWORKS_WEIGHT,
    PLACES,
    EditCounts,
    apply_edits,
    embedder_gain,
    merge_edits,
    single_edits,
    token_log_probabilities,
    word_ranks,
)
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.pool import Pool
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.encoders import encoder_network
from v2t_jax.models.inverter import Inverter
from v2t_jax.models.ranker import Ranker

TEXTS = make_texts(6)
NONE = MAX_LENGTH
OPTIONS: dict[str, Any] = {"sequence_beam_width": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InversionPipeline:
    return v2t.load(str(make_model(tmp_path_factory.mktemp("models"), stages=("inverter", "corrector", "ranker"))))


@pytest.fixture(scope="module")
def vectors(model: InversionPipeline) -> np.ndarray:
    return model.embedder.embed(TEXTS)


@pytest.fixture(scope="module")
def given(model: InversionPipeline, vectors: np.ndarray) -> Hypotheses:
    """Random texts of 1 to L - 1 tokens as hypotheses."""
    rng = np.random.default_rng(0)
    writable = np.flatnonzero(model.vocabulary.writable)
    ids = np.zeros((len(vectors), MAX_LENGTH), np.int32)
    for row, length in zip(ids, (1, 2, 3, 4, 6, 7), strict=True):
        row[:length] = rng.choice(writable, length)
        row[length] = 1
    embedding = model.correction_loop(2)._embed(model.loop_params(), jnp.asarray(ids))
    return Hypotheses(jnp.asarray(vectors), jnp.asarray(ids), embedding, jnp.zeros(len(ids)))


def edited(text: list[int], out: list[int], put: dict[int, list[int]]) -> list[int]:
    """The definition of edits, on a list: tokens `out` are taken out, and others put into gaps."""
    kept: list[int] = []
    for place, token in enumerate([*(i for i in text if i > 1), 0]):
        kept += [*put.get(place, []), 0 if place in out else token]
    return [*[i for i in kept if i > 1][: NONE - 1], 1, *[0] * NONE][:NONE]


def slots(out: list[int], put: dict[int, int], move: tuple[int, int, int] | None = None) -> list[list[int]]:
    """The same as an array; `move` has first and last token of a span, and the gap that it moves to."""
    tokens, places = [[KEEP] * (2 * NONE + 1) for _ in range(2)]
    for place in out:
        tokens[2 * place + 1] = 0
    for gap, token in put.items():
        tokens[2 * gap] = token
    if move:
        first, last, gap = move
        for slot in range(2 * first + 1, 2 * last + 2):
            places[slot] = PLACES * 2 * gap + 1 + slot - 2 * first
    return [tokens, places]


def test_edits_take_tokens_out_and_put_tokens_in() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 50, (5, NONE)).astype(np.int32)  # the last of length L, without an end
    for row, length in zip(ids[:4], (1, 3, 5, 7), strict=True):
        row[length:] = [1, *[0] * (NONE - length - 1)]
    made, expected = [], []
    for row in ids:
        n = int((row > 1).sum())
        for _ in range(40):
            out = rng.choice(n, rng.integers(min(n, 3) + 1), replace=False).tolist()
            put = {int(gap): int(rng.integers(2, 50)) for gap in rng.integers(n + 1, size=rng.integers(3))}
            into = {gap: [token] for gap, token in put.items()}
            made.append(slots(out, put))
            expected.append(edited(row.tolist(), out, into))
    found = apply_edits(jnp.asarray(ids), jnp.asarray(made).reshape(5, 40, 2, -1))
    np.testing.assert_array_equal(found.reshape(200, NONE), expected)


def words(row: Any) -> list[int]:
    return [int(i) for i in row if i > 1]


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("kind", ["substitutions", "insertions", "moves", "deletions"])
def test_edits_are_those_that_rank_first(model: InversionPipeline, given: Hypotheses, kind: str, ranked: bool) -> None:
    """Compared with a search over all edits of the kind, ranked by the scores of their definition."""
    counts = EditCounts(0, 0, 0, 0, 0)._replace(**{kind: 5})
    params, writable = dict(model.loop_params()), np.flatnonzero(model.vocabulary.writable).tolist()
    if not ranked:
        del params["ranker"]
    gain = embedder_gain(model.embedder.config, model.embedder.token_map())
    edits = single_edits(model.config, jnp.asarray(model.vocabulary.writable), counts, gain, params, given)
    found = np.asarray(apply_edits(given.ids, edits))
    log_p = np.asarray(token_log_probabilities(model.config, params, given))
    scores = word_ranks(model.config, params, given, gain(params, given)[1], jnp.asarray(log_p))
    inserted, substituted, surplus = (np.asarray(x) for x in scores)
    assert ranked == bool(np.abs(inserted - log_p).max() > 0)
    for row in range(len(found)):
        text, p, put, taken = given.ids[row].tolist(), log_p[row], inserted[row], substituted[row]
        n = len(words(text))
        all_of_them: list[tuple[float, list[int], dict[int, list[int]]]] = {
            "substitutions": [(taken[t, w], [t], {t: [w]}) for t in range(n) for w in writable if w != text[t]],
            "insertions": [(put[t, w], [], {t: [w]}) for t in range(n + 1) for w in writable if w != text[t]],
            "moves": [
                (
                    sum(p[t, text[x]] - p[x, text[x]] for t, x in ((g, i), (j + 1, g), (i, j + 1))),
                    list(range(i, j + 1)),
                    {g: text[i : j + 1]},
                )
                for i in range(n)
                for j in range(i, n)
                for g in range(n + 1)
                if g - j - 1 >= j - i + 1 or i - g > j - i + 1
            ],
            "deletions": [(surplus[row, t], [t], {}) for t in range(n) if n > 1],
        }[kind]
        if kind == "insertions" and n == NONE - 1:
            all_of_them = []  # there is no room
        all_of_them.sort(key=lambda edit: -edit[0])
        expected = [edited(text, *edit[1:]) for edit in all_of_them[:5]]
        expected += [text] * (len(found[row]) - len(expected))
        assert found[row].tolist() == expected, (row, kind)


def test_edits_are_joined_whose_changes_add_up() -> None:
    """Against a search over all pairs, and over all edits that a union may grow by, in float64."""
    rng = np.random.default_rng(0)
    edits = [slots([0], {0: 9}), slots([], {2: 8}), slots([0], {}), slots([1], {}), slots([], {3: 7}), slots([2], {})]
    n, width, counts = len(edits), 5, EditCounts(pairs=4, unions=3)
    v, changes = (rng.normal(size=(count, width)).astype(np.float32) for count in (1, n))
    one, e = v + 0.3 * changes, v + 0.5 * changes.mean(axis=0)
    similarity = np.asarray([[cosine(x, e[0]) for x in one]], np.float32)
    similarity[0, 3] = -np.inf  # is another one again
    singles = Pool(*(jnp.asarray(x) for x in (np.zeros((1, n, 1), int), one[None], similarity, np.zeros((1, n), bool))))
    given = Hypotheses(jnp.asarray(e), jnp.zeros((1, 1), jnp.int32), jnp.asarray(v), jnp.asarray([0.0]))
    found = merge_edits(jnp.asarray([edits]), given, singles, counts)[0].tolist()

    def touched(joined: list[int]) -> list[int]:
        return [slot for i in joined for slot, *written in zip(range(99), *edits[i], strict=False) if max(written) >= 0]

    def nearness(joined: list[int]) -> float:
        if 3 in joined or len(set(touched(joined))) < len(touched(joined)):
            return -1.0
        return cosine(v[0] + sum(one[i] - v[0] for i in joined), e[0])

    def joint(joined: list[int]) -> list[list[int]]:
        return np.max([edits[i] for i in joined], axis=0).tolist()

    pairs = sorted(([i, j] for i in range(n) for j in range(i)), key=nearness)[::-1]
    assert nearness(pairs[3]) > -1 and found[:4] == [joint(pair) for pair in pairs[:4]]
    union, unions = [int(similarity.argmax())], []
    for _ in range(4):
        more = max(([*union, i] for i in range(n)), key=nearness)
        union = more if nearness(more) > nearness(union) else union
        unions.append(joint(union))
    assert len(union) > 2 and found[4:] == unions[1:]


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_log_p_is_of_both_networks(model: InversionPipeline, given: Hypotheses) -> None:
    found = token_log_probabilities(model.config, model.loop_params(), given)
    e, ids, embedding, _ = given
    inverter = Inverter(model.config).apply({"params": model.params["inverter"]}, e, ids)
    corrector = Corrector(model.config).apply({"params": model.params["corrector"]}, e, ids, embedding, ids)
    np.testing.assert_allclose(found, jax.nn.log_softmax(inverter) + jax.nn.log_softmax(corrector), atol=1e-4)


def test_gain_is_the_slope_of_the_cosine(model: InversionPipeline, given: Hypotheses) -> None:
    """Against a small step of the embedding from one token towards another, in float32."""
    embedder = model.embedder
    gain, states = (
        np.asarray(x) for x in embedder_gain(embedder.config, embedder.token_map())(model.loop_params(), given)
    )
    table = np.array(embedder.params["encoder"]["word_embedding"])
    pieces = model.vocabulary.vocab_map
    row, place, new = 3, 1, int(np.flatnonzero(model.vocabulary.writable)[-1])
    old = int(given.ids[row, place])
    assert np.count_nonzero(np.asarray(given.ids[row]) == old) == 1

    def cosine_at(step: float) -> float:
        moved = table.copy()
        moved[pieces[old]] += step * (table[pieces[new]] - table[pieces[old]])
        params = {**embedder.params, "encoder": {**embedder.params["encoder"], "word_embedding": jnp.asarray(moved)}}
        weights = {**model.loop_params(), "embedder": params}
        v = np.asarray(model.correction_loop(2)._embed(weights, given.ids[row : row + 1]))[0].astype(np.float64)
        e = np.asarray(given.e[row], np.float64)
        return cosine(v, e)

    slope = (cosine_at(0.01) - cosine_at(-0.01)) / 0.02
    np.testing.assert_allclose(gain[row, place, new], slope, atol=2e-4)
    assert gain[row, place, old] == pytest.approx(0, abs=1e-6) and abs(slope) > 1e-3
    for text, here in zip(given.ids, states, strict=True):  # what the encoder says of the text alone
        n = len(words(text))
        tokens = jnp.asarray(
            [[*embedder.token_map().before, *pieces[np.asarray(text[:n])], embedder.token_map().after]]
        )
        encoder = encoder_network(embedder.config.encoder)
        alone = encoder.apply({"params": embedder.params["encoder"]}, tokens, jnp.ones_like(tokens))[0]
        np.testing.assert_allclose(here[: n + 1], alone[len(embedder.token_map().before) :], atol=1e-5)


def test_a_ranking_has_words_for_gaps_and_tokens(model: InversionPipeline, given: Hypotheses) -> None:
    """Log p of a word in its slot, and of the slot's being open, beside a part of the networks' log p."""
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(*given.ids.shape, model.config.state_width)).astype(np.float32))
    log_p = jnp.asarray(rng.normal(size=(*given.ids.shape, model.vocabulary.size)).astype(np.float32))
    inputs = model.params["inverter"]["t5"]["token_embedding"], given.e, given.ids, given.embedding, states
    ranking = Ranker(model.config).apply({"params": model.params["ranker"]}, *inputs)
    inserted, substituted, surplus = word_ranks(model.config, model.params, given, states, log_p)
    row, place, word = 4, 2, 17
    rest = NETWORKS_WEIGHT * float(log_p[row, place, word])
    for slot, logit, found in ((4, ranking.gap, inserted), (5, ranking.surplus, substituted)):
        p = np.exp(np.asarray(ranking.words[row, slot], np.float64))
        is_open = 1 / (1 + np.exp(-float(logit[row, place])))
        assert float(found[row, place, word]) == pytest.approx(np.log(p[word] / p.sum() * is_open) + rest, abs=1e-4)
    own = float(log_p[row, place, given.ids[row, place]])
    assert float(surplus[row, place]) == pytest.approx(float(ranking.surplus[row, place]) - NETWORKS_WEIGHT * own)
    blind = Ranker(model.config).apply({"params": model.params["ranker"]}, *inputs[:4], jnp.zeros_like(states))
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(blind[1:], ranking[1:], strict=True))


def test_rounds_of_edits_come_nearer_and_never_fall_back(model: InversionPipeline, vectors: np.ndarray) -> None:
    steps_only = v2t.invert_embeddings(model, vectors, num_steps=2, search="corrector", **OPTIONS)
    both = v2t.invert_embeddings(model, vectors, num_steps=2, search="both", budget=900, **OPTIONS)
    alone = v2t.invert_embeddings(model, vectors, search="edits", budget=900, **OPTIONS)
    for found, before in ((both, steps_only), (alone, [one.trace[0] for one in steps_only])):
        for one, earlier in zip(found, before, strict=True):
            cosines = [step.cosine for step in one.trace]
            assert all(np.diff(cosines) >= -1e-6)
            assert one.cosine >= earlier.cosine
        assert np.mean([one.cosine for one in found]) > np.mean([one.cosine for one in before]) + 0.02
    for one, earlier in zip(both, steps_only, strict=True):
        assert [step.text for step in one.trace[:3]] == [step.text for step in earlier.trace]


def test_calls_keep_to_the_budget(model: InversionPipeline, vectors: np.ndarray) -> None:
    loop = model.correction_loop(2, search="both")
    assert loop.calls_at(2, 2) == 12  # 4 guesses, and 4 candidates in each of 2 steps
    rounds = loop.rounds_within(700, 2)
    assert loop.calls_at(2 + rounds, 2) <= 700 < loop.calls_at(3 + rounds, 2)
    for one in v2t.invert_embeddings(model, vectors, num_steps=2, search="both", budget=700, **OPTIONS):
        solved = next((step.step for step in one.trace if step.cosine > 1 - 1e-6), len(one.trace) - 1)
        calls = [step.embedder_calls for step in one.trace]
        assert calls == [loop.calls_at(min(step, solved), 2) for step in range(len(calls))]


def test_batches_and_devices_change_nothing(model: InversionPipeline, vectors: np.ndarray) -> None:
    options: dict[str, Any] = {"search": "both", "num_steps": 2, "budget": 900, "sequence_beam_width": 2}
    whole, parts = (v2t.invert_embeddings(model, vectors, batch_size=size, **options) for size in (8, 3))
    assert [one.text for one in parts] == [one.text for one in whole]  # of batches on two devices


def test_rows_are_edited_part_by_part(
    model: InversionPipeline, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row at a time, as on one device, gives what all at once give: here the eight devices' rows make a part."""
    one = dataclasses.replace(model)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    results = [
        v2t.invert_embeddings(pipeline, vectors, search="both", num_steps=2, budget=900, **OPTIONS)
        for pipeline in (model, one)
    ]
    loops = [pipeline.correction_loop(2, search="both") for pipeline in (model, one)]
    assert [(loop.devices, loop.edit_rows) for loop in loops] == [(8, 1), (1, 1)]
    for whole, part in zip(*results, strict=True):
        assert [step.embedder_calls for step in part.trace] == [step.embedder_calls for step in whole.trace]
        assert [step.text for step in part.trace] == [step.text for step in whole.trace]


@pytest.mark.parametrize(("longest", "read"), [(0, 4), (4, 4), (5, 6), (6, 6), (7, 8), (8, 8)])
def test_the_longest_text_decides_how_much_is_read(longest: int, read: int) -> None:
    def embed(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.full((len(ids), 3), ids.shape[1])

    ids = np.zeros((2, 8), np.int32)
    ids[0, 0], ids[1, :longest] = 5, 9
    ids[1, longest : longest + 1] = EOS
    loop = CorrectionLoop(lambda p, e, k: ids, (), embed, CorrectionSettings(2))
    assert int(loop.trimmed((), jnp.asarray(ids))[0, 0]) == read


def test_an_embedder_that_is_a_black_box(model: InversionPipeline, tmp_path: Path) -> None:
    """Log p alone leads somewhere, and a round's candidates are one call."""
    asked: list[int] = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.append(len(texts))
        return model.embedder.embed(texts)

    box = InversionPipeline(
        "box",
        model.config,
        model.params,
        CallableEmbedder(embed, name="box", width=model.embedder.width),
        model.vocabulary,
        shares_vocabulary=False,
    )
    found = v2t.invert_strings(box, TEXTS[:2], search="both", num_steps=1, budget=600, **OPTIONS)
    assert all(one.cosine > one.trace[1].cosine for one in found)
    assert max(asked) > 8


def test_a_static_embedder_is_searched_as_others_are(tmp_path: Path) -> None:
    """It puts no tokens around a text, and a text of none has the zero vector."""
    make_static_embedder(tmp_path / "embedder", "Normalize")
    model = v2t.load(str(make_model(tmp_path, stages=("inverter", "corrector", "ranker"))))
    assert isinstance(model.embedder, JaxEmbedder) and model.embedder.token_map().after is None
    found = v2t.invert_strings(model, TEXTS[:2], search="both", num_steps=1, budget=600, **OPTIONS)
    assert all(one.cosine > one.trace[1].cosine for one in found)
    again = np.sum(model.embedder.embed([one.text for one in found]) * model.embedder.embed(TEXTS[:2]), axis=1)
    np.testing.assert_allclose([one.cosine for one in found], again, atol=1e-5)


def test_what_searches_by_default(model: InversionPipeline, vectors: np.ndarray, tmp_path: Path) -> None:
    assert model.default_search() == "both" and model.default_search("upstream") == "corrector"
    found = v2t.invert_embeddings(model, vectors[:2], num_steps=1, budget=400, **OPTIONS)
    assert found == v2t.invert_embeddings(model, vectors[:2], num_steps=1, budget=400, search="both", **OPTIONS)
    assert v2t.load(str(make_model(tmp_path))).default_search() == "corrector"  # which has no ranker


def test_an_inverter_alone_can_edit(tmp_path: Path) -> None:
    model = v2t.load(str(make_model(tmp_path, stages=("inverter",))))
    found = v2t.invert_strings(model, TEXTS[:2], search="edits", budget=600, **OPTIONS)
    assert all(one.cosine > one.trace[0].cosine for one in found)


def test_refusals(model: InversionPipeline, vectors: np.ndarray) -> None:
    for options, message in (
        ({"search": "greedy"}, "search is 'greedy'; choose corrector, edits, both"),
        ({"search": "both", "budget": 0}, "budget"),
        ({"search": "both", "mode": "upstream"}, 'search="corrector"'),
        (
            {"search": "both", "budget": 100, "num_steps": 2},
            f"leaves no round of edits behind 2 steps; give {48 + sum(EditCounts()) + 3} or more",
        ),
    ):
        with pytest.raises(InputError, match=message):
            v2t.invert_embeddings(model, vectors, **options)
