"""Vectors and texts in, texts out: the public functions, and what they refuse."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v2t_jax as v2t
import v2t_jax.vec2text as vec2text
from tests.helpers.tiny_model import MAX_LENGTH, WIDTH, make_model
from tests.helpers.tiny_run import make_texts
from v2t_jax import progress
from v2t_jax.bench.roofline import collectives
from v2t_jax.config import MeshConfig
from v2t_jax.embedders import load
from v2t_jax.errors import InputError
from v2t_jax.inversion.api import invert_batches
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.vectors import check_vectors, cosines, warn_of_foreign_vectors
from v2t_jax.parallel.mesh import batch_sharding, make_mesh, replicated

TEXTS = make_texts(9)
# One shape for nearly all tests: a program is compiled once.
recover = functools.partial(v2t.invert_embeddings, **{"sequence_beam_width": 2, "batch_size": 8})
recover_texts = functools.partial(v2t.invert_strings, **{"sequence_beam_width": 2, "batch_size": 8})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder: Path) -> InversionPipeline:
    return v2t.load(str(make_model(folder)))


@pytest.fixture(scope="module")
def vectors(model: InversionPipeline) -> np.ndarray:
    return model.embedder.embed(TEXTS)


def test_result_does_not_depend_on_the_batch_size(model: InversionPipeline, vectors: np.ndarray) -> None:
    whole = recover(model, vectors, num_steps=2)
    assert len(whole) == len(vectors)
    for count, size in ((1, 1), (9, 3)):  # the second on three devices
        found = recover(model, vectors[:count], num_steps=2, batch_size=size)
        assert [one.text for one in found] == [one.text for one in whole][:count]


def test_each_device_has_its_share_of_the_vectors(model: InversionPipeline, vectors: np.ndarray) -> None:
    """16 vectors, 2 a device: each decodes its own. (A CPU can not cut its top_k, whose scores are sent.)"""
    mesh = make_mesh(MeshConfig())
    e = jax.device_put(np.resize(vectors, (16, WIDTH)), batch_sharding(mesh))
    weights = jax.device_put(model.loop_params(), replicated(mesh))
    program = model.correction_loop(2).run
    state = program(weights, e, np.int32(16), np.int32(1), np.int32(1), room=1)
    assert {shard.data.shape[0] for shard in state.trace_ids.addressable_shards} == {2}
    hlo = program.lower(weights, e, np.int32(16), np.int32(1), np.int32(1), room=1).compile().as_text()
    scores = re.findall(r'(?:custom-call|sort)\(%([\w.-]+)\b.*/top_k"', hlo)
    others = "\n".join(line for line in hlo.splitlines() if line.split("=")[0].strip(" %") not in scores)
    assert not collectives(others)  # which leaves out the conditions of loops: whether all are done
    assert {*re.findall(r"= (\S+) all-reduce\(", hlo)} == {"pred[]"}


def test_few_texts_share_a_compiled_shape(model: InversionPipeline, vectors: np.ndarray) -> None:
    loop = model.correction_loop(1, "best")
    for count in (5, 8, 6):
        recover(model, vectors[:count], num_steps=1, sequence_beam_width=1, batch_size=None)
    assert loop.run._cache_size() == 1
    recover(model, vectors[:3], num_steps=1, sequence_beam_width=1, batch_size=None)  # few enough to be worth another
    assert loop.run._cache_size() == 2


def test_weights_are_prepared_once(folder: Path, vectors: np.ndarray) -> None:
    model = v2t.load(str(folder / "tiny"))
    with pytest.MonkeyPatch.context() as patch:
        prepared = []
        prepare = InversionPipeline._prepared
        patch.setattr(InversionPipeline, "_prepared", lambda self: prepared.append(1) or prepare(self))
        for mode in ("best", "upstream"):
            recover(model, vectors[:2], num_steps=1, mode=mode)
        assert len(prepared) == 1
        first, second = model.loop_params(), model.loop_params()
        assert all(a is b for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
        model.params = dict(model.params)
        assert model.loop_params() is not first and len(prepared) == 2  # of other parameters


def test_batches_come_one_by_one(model: InversionPipeline, vectors: np.ndarray, tmp_path: Path) -> None:
    """From a file, too, of which no more is read than a batch."""
    np.save(tmp_path / "e.npy", vectors)
    e = np.load(tmp_path / "e.npy", mmap_mode="r")
    batches = invert_batches(
        model, lambda size: (e[i : i + size] for i in range(0, len(e), size)), len(e), 1, 2, batch_size=3
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        first = next(batches)
        assert len(first) == 3
        found = [first, *batches]
    assert [len(batch) for batch in found] == [3, 3, 3]
    assert [one.text for batch in found for one in batch] == [one.text for one in recover(model, vectors, num_steps=1)]


def test_progress_on_a_terminal_changes_nothing(model: InversionPipeline, vectors: np.ndarray) -> None:
    expected = recover(model, vectors, num_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "on_terminal", lambda: True)
        assert recover(model, vectors, num_steps=2) == expected


def test_the_trace_ends_in_the_answer(model: InversionPipeline, vectors: np.ndarray) -> None:
    for one in recover(model, vectors[:3], num_steps=3):
        assert [step.step for step in one.trace] == [0, 1, 2, 3]
        assert (one.trace[-1].text, one.trace[-1].cosine) == (one.text, one.cosine)
        assert one.trace[one.step].text == one.text
        values = [step.cosine for step in one.trace]
        assert values == sorted(values)
        assert set(one.to_dict()) == {"text", "cosine", "step", "trace", "runner_up"}


def test_cosines_are_of_the_texts_embedded_again(model: InversionPipeline, vectors: np.ndarray) -> None:
    for one, target in zip(recover(model, vectors[:3], num_steps=1), vectors, strict=False):
        assert one.cosine == pytest.approx(float(model.embedder.embed([one.text])[0] @ target), abs=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", jnp.bfloat16])
def test_vectors_of_any_float_type(model: InversionPipeline, vectors: np.ndarray, dtype: str) -> None:
    rounded = vectors[:2].astype(dtype)
    found = recover(model, rounded, num_steps=1)
    expected = recover(model, rounded.astype(np.float32), num_steps=1)
    assert [one.text for one in found] == [one.text for one in expected]


def test_length_and_integers_make_no_difference_where_the_embedder_normalizes(
    model: InversionPipeline, vectors: np.ndarray
) -> None:
    assert model.embedder.normalized
    quantized = np.round(127 * vectors[:2]).astype(np.int8)
    with pytest.warns(UserWarning, match="2 of 2 have lengths of"):
        found = recover(model, quantized, num_steps=1)
    expected = recover(model, quantized / 127, num_steps=1)
    assert [one.text for one in found] == [one.text for one in expected]
    np.testing.assert_allclose([one.cosine for one in found], [one.cosine for one in expected], atol=1e-6)


def test_foreign_vectors_are_warned_of(model: InversionPipeline) -> None:
    known = model.embedder.embed(make_texts(200))
    statistics = {"mean": known.mean(axis=0), "std": known.std(axis=0)}
    params = {"inverter": model.params["inverter"] | {"statistics": statistics}}
    standardized = dataclasses.replace(model, params=params)
    e = known[::2]
    warn_of_foreign_vectors(standardized, e)
    warn_of_foreign_vectors(standardized, 1.01 * e)
    warn_of_foreign_vectors(standardized, np.where(e > 0, 0.25, -0.25))  # packed signs
    with pytest.warns(UserWarning, match="don't look like .* their variance is .* texts mean nothing"):
        warn_of_foreign_vectors(standardized, np.roll(e, 1, axis=1))
    with pytest.warns(UserWarning, match="100 of 100 have lengths of 2 to 2, where 1 is expected"):
        warn_of_foreign_vectors(standardized, 2 * e)


def test_lengths_are_known_of_embedders_that_do_not_normalize(model: InversionPipeline) -> None:
    raw = dataclasses.replace(model.embedder, config=dataclasses.replace(model.embedder.config, normalize=False))
    trained = dataclasses.replace(model, embedder=raw, embedding_norm=(3.0, 0.1))
    e = 3 * model.embedder.embed(TEXTS)
    warn_of_foreign_vectors(trained, e)
    with pytest.warns(UserWarning, match="9 of 9 have lengths of 4.5 to 4.5, where 3 ± 0.1 is expected"):
        warn_of_foreign_vectors(trained, 1.5 * e)
    warn_of_foreign_vectors(dataclasses.replace(trained, embedding_norm=None), 1.5 * e)


def test_one_vector_may_be_one_dimensional(model: InversionPipeline, vectors: np.ndarray) -> None:
    assert recover(model, vectors[0], num_steps=0) == recover(model, vectors[:1], num_steps=0)
    assert len(recover(model, vectors[0].tolist(), num_steps=0)) == 1


def test_upstream_mode_reports_the_last_step(model: InversionPipeline, vectors: np.ndarray) -> None:
    for one in recover(model, vectors[:2], num_steps=2, mode="upstream"):
        assert one.step == 2


def test_known_texts_come_with_their_reference(model: InversionPipeline) -> None:
    (one,) = recover_texts(model, ["The RED  Cats"], num_steps=0)
    assert one.reference == "the red cats"
    assert one.exact_match == (one.text == "the red cats")
    assert set(one.to_dict()) == {"text", "cosine", "step", "trace", "reference", "exact_match", "runner_up"}


@pytest.mark.parametrize(
    "text", ["the cat 🙂", "the\ncat\t", "cat [SEP] dog", "the cat é", "the 日本 cat", "the \0cat"]
)
def test_odd_texts_are_recovered_from_what_the_tokenizer_knows(model: InversionPipeline, text: str) -> None:
    (one,) = recover_texts(model, [text], num_steps=0)
    assert one.reference and one.text is not None


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no texts"),
        (["the cat", " \n"], "Text 2 of 2 is empty"),
        (["🙂"], "nothing that the embedder's tokenizer knows"),
        (["cat \udcff"], "not valid Unicode"),
        ("cat", "A single string was given where a list of texts is meant"),
        (["cat", 3], "Text 2 of 2 is of type int; give a str"),
    ],
)
def test_texts_that_are_refused(model: InversionPipeline, texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        v2t.invert_strings(model, texts)
    if "tokenizer" not in message:  # there texts are embedded as they are
        with pytest.raises(InputError, match=message):
            vec2text.invert_strings(texts, model, mode="upstream")


def test_long_texts_are_cut(model: InversionPipeline) -> None:
    (one,) = recover_texts(model, ["the cat " * 9], num_steps=0)
    assert one.reference == ("the cat " * 9)[: 4 * (MAX_LENGTH - 1)].strip()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((2, WIDTH + 1)), "17 wide, but this model inverts embeddings of width 16"),
        (np.ones(3), "3 wide"),
        (np.ones((1, 1, WIDTH)), "3 dimensions"),
        (np.float32(1), "0 dimensions"),
        (np.ones((0, WIDTH)), "no vectors"),
        (np.ones(0), "no vectors"),
        ([], "no vectors"),
        ([[1.0] * WIDTH, [np.nan] * WIDTH], "Vector 2 of 2 holds NaN"),
        (np.full((1, WIDTH), -np.inf), "infinite"),
        (np.full((1, WIDTH), 1e300), "infinite"),  # more than float32 holds
        (np.zeros((1, WIDTH)), r"Vector 1 of 1 is \(almost\) zero; no text embeds to it"),
        (np.full((1, WIDTH), "a"), "not numbers"),
        (np.full((1, WIDTH), None), "holds NaN"),
        (np.ones((1, WIDTH), bool), "not numbers"),
        (np.ones((1, WIDTH), complex), "not numbers"),
        ([[1.0], [1.0, 2.0]], "not a regular array"),
    ],
)
def test_vectors_that_are_refused(bad: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_vectors(bad, WIDTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps is -1"),
        ({"sequence_beam_width": 0}, "sequence_beam_width is 0"),
        ({"num_steps": 1.5}, "num_steps is 1.5; give a whole number"),
        ({"sequence_beam_width": True}, "sequence_beam_width is True; give a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0; give a whole number"),
        ({"patience": -1}, "patience is -1"),
        ({"mode": "worst"}, "mode is 'worst'"),
    ],
)
def test_settings_that_are_refused(model: InversionPipeline, vectors: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recover(model, vectors[:1], **options)


def test_a_model_without_corrector_takes_no_steps(folder: Path, model: InversionPipeline, vectors: np.ndarray) -> None:
    alone = v2t.load(str(make_model(folder, ("inverter",), "alone")))
    with pytest.raises(InputError, match="has no corrector"):
        recover(alone, vectors[:1], num_steps=1)
    assert len(recover(alone, vectors[:1], num_steps=0)) == 1


def test_cosines_by_hand() -> None:
    found = cosines(np.array([[3.0, 4.0], [0, 0], [1, 0]]), np.array([[4.0, 3.0], [1, 0], [-2, 0]]))
    np.testing.assert_allclose(found, [0.96, 0, -1])


def test_embedding_by_folder(folder: Path, model: InversionPipeline, vectors: np.ndarray) -> None:
    for embedder in (str(folder / "embedder"), folder / "embedder", model.embedder):
        np.testing.assert_allclose(v2t.embed(TEXTS, embedder), vectors, atol=1e-6)
    with pytest.raises(InputError, match="of type function; give a name, .*CallableEmbedder.function."):
        v2t.embed(TEXTS, lambda texts: texts)  # type: ignore[arg-type]
    for batch_size in (0, -1):
        with pytest.raises(InputError, match=f"batch_size is {batch_size}"):
            model.embedder.embed(TEXTS, batch_size)


def test_an_embedder_named_again_is_not_loaded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(load, "load_embedder", lambda name, of=load.load_embedder: loaded.append(name) or of(name))
    name = str(folder / "embedder" / ".." / "embedder")
    np.testing.assert_array_equal(v2t.embed(TEXTS, name), v2t.embed(TEXTS, name))
    assert loaded == [name]
