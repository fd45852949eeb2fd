"""Greedy, sampling and beam search on a toy model whose logits depend on all the history in its cache.

The expected results come from slow loops written from the definitions, and from enumeration.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v2t_jax.decode.beam import CHUNK, beam_search, top_k
from v2t_jax.decode.sample import first_argmax, greedy, keep_top_k, keep_top_p, sample
from v2t_jax.decode.state import EOS, PAD, START, TokensToLogits, count_tokens, truncate_after_eos
from v2t_jax.errors import InputError

BUCKETS = 11  # histories are hashed to so many rows of a table of logits
Prefix = tuple[int, ...]
StopRule = Literal["running", "any"]


def make_tables(seed: int, items: int, length: int, vocab: int, eos_bias: float = 0.5) -> np.ndarray:
    """Random logits [items, length, vocab of the previous token, BUCKETS, vocab]."""
    tables = np.random.default_rng(seed).normal(size=(items, length, vocab, BUCKETS, vocab)) * 1.5
    tables[..., EOS] += eos_bias
    return tables.astype(np.float32)


def make_cache(items: int, beams: int, length: int) -> dict[str, jax.Array]:
    """Which item a row belongs to, and the tokens it was fed so far."""
    item = jnp.repeat(jnp.arange(items, dtype=jnp.int32), beams)
    return {"history": jnp.zeros((items * beams, length), jnp.int32), "item": item}


def toy(tables: jax.Array) -> TokensToLogits:
    length = tables.shape[1]

    def tokens_to_logits(ids: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, Any]:
        history = cache["history"].at[:, index].set(ids)
        bucket = (history * (jnp.arange(length)[None, :] + 1) ** 2).sum(axis=1) % BUCKETS
        return tables[cache["item"], index, ids, bucket], {**cache, "history": history}

    return tokens_to_logits


def log_p(table: np.ndarray, prefix: Prefix) -> np.ndarray:
    """log p [vocab] of the token after `prefix` (generated tokens), in float64."""
    history = (START, *prefix)
    bucket = sum(token * (i + 1) ** 2 for i, token in enumerate(history)) % BUCKETS
    logits = table[len(prefix), history[-1], bucket].astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def reference_beam(table: np.ndarray, beams: int, stop_rule: str) -> list[tuple[float, float, Prefix]]:
    """[(score, log p, tokens)], best first, for one item."""
    length, vocab = table.shape[0], table.shape[-1]
    running: list[tuple[float, Prefix]] = [(0.0, ())]
    done: list[tuple[float, float, Prefix]] = []
    for step in range(1, length + 1):
        grown = [
            (total + log_p(table, prefix)[token], (*prefix, token))
            for total, prefix in running
            for token in range(vocab)
        ]
        grown = sorted(grown, key=lambda entry: -entry[0])[: 2 * beams]
        ended = [tokens[-1] == EOS or step == length for _, tokens in grown]
        done += [
            (total / step, total, tokens)
            for (total, tokens), end in zip(grown[:beams], ended[:beams], strict=True)
            if end
        ]
        done = sorted(done, reverse=True)[:beams]
        running = [entry for entry, end in zip(grown, ended, strict=True) if not end][:beams]
        if step == length:
            break
        best = grown[0][0] if stop_rule == "any" else running[0][0]
        if len(done) == beams and best / step <= done[-1][0]:
            break
    return done


def padded(tokens: Prefix, length: int) -> list[int]:
    return [*tokens, *[PAD] * (length - len(tokens))]


@partial(jax.jit, static_argnames=("beams", "num_return", "stop_rule", "chunk"))
def run_beam(
    tables: jax.Array, *, beams: int, num_return: int, stop_rule: StopRule = "running", chunk: int = CHUNK
) -> tuple[jax.Array, jax.Array, jax.Array]:
    items, length = tables.shape[:2]
    with mock.patch("v2t_jax.decode.beam.CHUNK", chunk):
        decoded, scores = beam_search(
            toy(tables),
            make_cache(items, beams, length),
            batch_size=items,
            num_beams=beams,
            num_return=num_return,
            max_length=length,
            stop_rule=stop_rule,
        )
    return decoded.ids, decoded.log_probs, scores


@jax.jit
def run_greedy(tables: jax.Array) -> tuple[jax.Array, jax.Array]:
    items, length = tables.shape[:2]
    return greedy(toy(tables), make_cache(items, 1, length), batch_size=items, max_length=length)


def test_greedy_is_the_loop_of_its_definition() -> None:
    tables = make_tables(0, items=16, length=7, vocab=9)
    ids, log_probs = run_greedy(tables)
    lengths = count_tokens(ids)
    for item, table in enumerate(tables):
        prefix: Prefix = ()
        total = 0.0
        while len(prefix) < 7 and EOS not in prefix:
            scores = log_p(table, prefix)
            token = int(np.argmax(scores))
            total += scores[token]
            prefix = (*prefix, token)
        assert ids[item].tolist() == padded(prefix, 7)
        assert lengths[item] == len(prefix)
        assert log_probs[item] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(("beams", "stop_rule"), [(2, "running"), (3, "running"), (4, "running"), (3, "any")])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), eos_bias=st.sampled_from([-1.0, 0.5, 2.0]), chunk=st.sampled_from([1, CHUNK]))
def test_beam_search_is_the_loop_of_its_definition(
    beams: int, stop_rule: StopRule, seed: int, eos_bias: float, chunk: int
) -> None:
    tables = make_tables(seed, items=4, length=7, vocab=12, eos_bias=eos_bias)
    ids, log_probs, scores = run_beam(tables, beams=beams, num_return=beams, stop_rule=stop_rule, chunk=chunk)
    for item, table in enumerate(tables):
        expected = reference_beam(table, beams, stop_rule)
        assert ids[item].tolist() == [padded(tokens, 7) for _, _, tokens in expected]
        np.testing.assert_allclose(scores[item], [score for score, _, _ in expected], rtol=1e-4)
        np.testing.assert_allclose(log_probs[item], [total for _, total, _ in expected], rtol=1e-4)


def test_with_a_beam_for_every_sequence_it_finds_the_best_of_all() -> None:
    length, vocab = 3, 4
    sequences = [
        tokens
        for size in range(1, length + 1)
        for tokens in itertools.product(range(vocab), repeat=size)
        if EOS not in tokens[:-1] and (tokens[-1] == EOS or size == length)
    ]
    tables = make_tables(5, items=3, length=length, vocab=vocab)
    ids, _, scores = run_beam(tables, beams=len(sequences), num_return=10)
    for item, table in enumerate(tables):
        totals = {
            tokens: sum(log_p(table, tokens[:i])[token] for i, token in enumerate(tokens)) / len(tokens)
            for tokens in sequences
        }
        best = sorted(sequences, key=lambda tokens: -totals[tokens])[:10]
        assert ids[item].tolist() == [padded(tokens, length) for tokens in best]
        np.testing.assert_allclose(scores[item], [totals[tokens] for tokens in best], rtol=1e-4)


def test_one_beam_is_greedy() -> None:
    tables = make_tables(1, items=16, length=6, vocab=9)
    ids, log_probs, scores = run_beam(tables, beams=1, num_return=1)
    greedy_ids, greedy_log_probs = run_greedy(tables)
    assert (ids[:, 0] == greedy_ids).all()
    assert (log_probs[:, 0] == greedy_log_probs).all()
    lengths = count_tokens(greedy_ids)
    np.testing.assert_allclose(scores[:, 0], greedy_log_probs / lengths, rtol=1e-5)


def test_an_item_does_not_depend_on_its_batch() -> None:
    tables = make_tables(2, items=5, length=7, vocab=12, eos_bias=1.5)
    together = run_beam(tables, beams=3, num_return=2)
    for item in range(5):
        alone = run_beam(tables[item : item + 1], beams=3, num_return=2)
        assert (alone[0][0] == together[0][item]).all()
        for one, many in zip(alone[1:], together[1:], strict=True):  # sums may be vectorised differently
            np.testing.assert_allclose(one[0], many[item], rtol=1e-5)


def counted(model: TokensToLogits, calls: list[int]) -> TokensToLogits:
    def tokens_to_logits(ids: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda i: calls.append(int(i)), index)
        return model(ids, cache, index)

    return tokens_to_logits


def test_it_stops_when_every_row_has_finished() -> None:
    tables = make_tables(4, items=3, length=20, vocab=9)
    tables[..., EOS] = -50.0
    tables[:, 2, ..., EOS] = 50.0
    calls: list[int] = []
    model = counted(toy(jnp.asarray(tables)), calls)
    limits: dict[str, Any] = {"batch_size": 3, "max_length": 20}
    jax.block_until_ready(jax.jit(lambda cache: greedy(model, cache, **limits))(make_cache(3, 1, 20)))
    jax.effects_barrier()
    assert sorted(calls) == [0, 1, 2]
    calls.clear()
    search = partial(beam_search, num_beams=2, num_return=2)
    jax.block_until_ready(jax.jit(lambda cache: search(model, cache, **limits))(make_cache(3, 2, 20)))
    jax.effects_barrier()
    assert sorted(calls) == [0, 1, 2]


@pytest.mark.parametrize("beams", [1, 4])
def test_memory_does_not_grow_with_the_logits_of_all_steps(beams: int) -> None:
    items, length, vocab = 4, 64, 20_000
    row = jnp.zeros((1, vocab))

    def model(ids: jax.Array, cache: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(row * index + ids[:, None]), cache

    def search(cache: jax.Array) -> Any:
        return beam_search(
            model,
            cache,
            batch_size=items,
            num_beams=beams,
            num_return=beams,
            max_length=length,
        )

    compiled = jax.jit(search).lower(jnp.zeros(items * beams)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 5 * items * beams * vocab * 4


def draw_first_tokens(logits: np.ndarray, rows: int, **options: Any) -> np.ndarray:
    def model(ids: jax.Array, cache: None, index: jax.Array) -> tuple[jax.Array, None]:
        return jnp.broadcast_to(jnp.asarray(logits)[None, :], (rows, len(logits))), cache

    draw = jax.jit(lambda key: sample(model, None, batch_size=rows, max_length=1, key=key, **options))
    ids, log_probs = draw(jax.random.key(7))
    log_p_all = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(log_probs, log_p_all[np.asarray(ids[:, 0])], rtol=1e-4)
    return np.bincount(np.asarray(ids[:, 0]), minlength=len(logits)) / rows


@pytest.mark.parametrize(
    ("options", "support"),
    [
        ({}, 6),
        ({"temperature": 0.5}, 6),
        ({"temperature": 2.0, "top_k": 3}, 3),
        ({"top_p": 0.7}, 2),  # masses .5 + .25 reach .7; with temperature 1
        ({"temperature": 2.0, "top_p": 0.7}, 3),  # flatter: it takes .36 + .26 + .18
        ({"top_k": 2, "top_p": 0.5}, 1),  # top-p acts on what top-k left, .67 and .33
    ],
)
def test_samples_follow_the_sharpened_truncated_distribution(options: dict[str, Any], support: int) -> None:
    probabilities = np.array([0.05, 0.5, 0.02, 0.25, 0.06, 0.12])
    frequencies = draw_first_tokens(np.log(probabilities).astype(np.float32), 4000, **options)
    kept = (-probabilities).argsort()[:support]
    expected = np.zeros(6)
    expected[kept] = probabilities[kept] ** (1 / options.get("temperature", 1.0))
    expected /= expected.sum()
    assert (frequencies[expected == 0] == 0).all()
    np.testing.assert_allclose(frequencies, expected, atol=0.03)  # four standard errors


def sampled(tables: np.ndarray, seed: int, **options: Any) -> tuple[jax.Array, jax.Array]:
    items, length = tables.shape[:2]
    return jax.jit(
        lambda tables, key: sample(
            toy(tables),
            make_cache(items, 1, length),
            batch_size=items,
            max_length=length,
            key=key,
            **options,
        )
    )(tables, jax.random.key(seed))


def test_sampling_keeps_the_rules_and_depends_on_key_and_row_only() -> None:
    tables = make_tables(6, items=8, length=7, vocab=9)
    ids, log_probs = sampled(tables, 0)
    for row, log_prob, table in zip(ids.tolist(), log_probs.tolist(), tables, strict=True):
        tokens = tuple(row[: row.index(EOS) + 1] if EOS in row else row)
        assert row == padded(tokens, 7)
        total = sum(log_p(table, tokens[:i])[token] for i, token in enumerate(tokens))
        assert log_prob == pytest.approx(total, abs=1e-4)
    assert (sampled(tables[:3], 0)[0] == ids[:3]).all()
    assert (sampled(tables, 1)[0] != ids).any()
    assert (sampled(tables, 1, top_k=1)[0] == run_greedy(tables)[0]).all()


def call(decoder: Callable[..., Any], **changes: Any) -> Any:
    arguments = {"batch_size": 2, "max_length": 4, **changes}
    tables = jnp.asarray(make_tables(0, items=2, length=4, vocab=9))
    return decoder(toy(tables), make_cache(2, 1, 4), **arguments)


@pytest.mark.parametrize(
    ("decoder", "changes", "message"),
    [
        (greedy, {"max_length": 0}, "max_length is 0"),
        (beam_search, {"num_beams": 2, "num_return": 3}, "3 results were asked of 2 beams"),
        (sample, {"key": None, "temperature": 0.0}, "temperature is 0.0"),
        (sample, {"key": None, "top_k": -1}, "top_k is -1"),
        (sample, {"key": None, "top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_limits_out_of_range_are_refused(decoder: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(decoder, **changes)


def test_a_cache_without_a_row_a_beam_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leading axis must be 6 rows"):
        call(beam_search, num_beams=3, num_return=1)


def test_truncation_after_the_end_of_sequence() -> None:
    ids = jnp.asarray([[5, EOS, 7, EOS], [5, 6, 7, 8], [EOS, 2, 3, 4]])
    assert truncate_after_eos(ids).tolist() == [[5, EOS, PAD, PAD], [5, 6, 7, 8], [EOS, PAD, PAD, PAD]]
    assert count_tokens(ids).tolist() == [2, 4, 1]


@pytest.mark.parametrize("k", [1, 3, 5, 100])
def test_top_k_keeps_the_k_best(k: int) -> None:
    logits = np.random.default_rng(k).normal(size=(7, 5)).astype(np.float32)
    kept = np.isfinite(keep_top_k(jnp.asarray(logits), k))
    rank = (-logits).argsort(axis=-1).argsort(axis=-1)
    assert (kept == (rank < k)).all()


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.8, 0.999999])
def test_top_p_keeps_the_smallest_set_with_that_mass(p: float) -> None:
    logits = np.random.default_rng(3).normal(size=(20, 5)).astype(np.float32) * 2
    kept = np.isfinite(keep_top_p(jnp.asarray(logits), p))
    for row, mask in zip(logits.astype(np.float64), kept, strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        expected, mass = set(), 0.0
        for token in (-row).argsort():
            expected.add(int(token))
            mass += probabilities[token]
            if mass >= p:
                break
        assert set(mask.nonzero()[0].tolist()) == expected


def test_first_argmax_is_argmax_and_takes_the_first_of_equals() -> None:
    logits = jnp.asarray(np.random.default_rng(0).integers(-3, 3, (50, 9)).astype(np.float32))
    assert (first_argmax(logits) == jnp.argmax(logits, axis=-1)).all()
    assert (first_argmax(jnp.full((2, 4), -jnp.inf)) == 0).all()
    assert (first_argmax(jnp.full((2, 4), jnp.nan)) < 4).all()


@pytest.mark.parametrize("size", [5, CHUNK * 9, CHUNK * 40 + 3])
@pytest.mark.parametrize("levels", [2, 1000])
def test_top_k_by_chunks_is_a_stable_sort(size: int, levels: int) -> None:
    rng = np.random.default_rng(size)
    logits = rng.integers(0, levels, (6, size)).astype(np.float32)
    logits[1, rng.permutation(size)[3:]] = -np.inf  # fewer than k are left
    k = min(8, size)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    best, ids = top_k(jnp.asarray(logits), k)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(best, np.take_along_axis(logits, order, axis=1))
