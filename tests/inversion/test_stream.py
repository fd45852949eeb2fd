"""Files of vectors recovered into files of results: what is written stays, and a stopped job goes on."""

import dataclasses
import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet

import v2t_jax as v2t
from tests.helpers.tiny_model import WIDTH, make_model
from tests.helpers.tiny_run import make_texts
from v2t_jax.data.vector_file import VectorFile
from v2t_jax.data.vectors import open_vectors
from v2t_jax.embedders.base import dequantize, quantize, ranges_of
from v2t_jax.errors import InputError
from v2t_jax.inversion import stream
from v2t_jax.inversion.api import InversionResult, TraceStep
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.stream import recover_file, recover_rows, texts_as_vectors
from v2t_jax.inversion.vectors import check_vectors, read_ranges, warn_of_long_texts

TEXTS = make_texts(21)
OPTIONS: dict[str, Any] = {"num_steps": 1, "sequence_beam_width": 2, "batch_size": 1}  # 8 at a time, on 8 devices


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InversionPipeline:
    return v2t.load(str(make_model(tmp_path_factory.mktemp("models"))))


@pytest.fixture(scope="module")
def vectors(model: InversionPipeline) -> np.ndarray:
    return model.embedder.embed(TEXTS)


@pytest.fixture
def source(vectors: np.ndarray, tmp_path: Path) -> VectorFile:
    rows = zip(vectors.tolist(), TEXTS, strict=True)
    lines = [json.dumps({"id": f"r{i}", "embedding": e, "text": t}) for i, (e, t) in enumerate(rows)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return open_vectors(str(tmp_path / "in.jsonl"))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_results_is_what_the_list_would_be(
    model: InversionPipeline, vectors: np.ndarray, source: VectorFile, tmp_path: Path
) -> None:
    assert recover_file(model, source, tmp_path / "out.jsonl", **OPTIONS) == 21
    rows = read(tmp_path / "out.jsonl")
    found = v2t.invert_embeddings(model, vectors, **OPTIONS)
    assert [row["row"] for row in rows] == list(range(21))
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(21)]
    assert [row["text"] for row in rows] == [one.text for one in found]
    np.testing.assert_allclose([row["cosine"] for row in rows], [one.cosine for one in found], atol=1e-6)
    references = model.vocabulary.normalize(TEXTS, 99)
    assert [row["original"] for row in rows] == TEXTS
    assert [row["reference"] for row in rows] == references
    assert [row["exact_match"] for row in rows] == [one.text == r for one, r in zip(found, references, strict=True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_the_same_as_a_table(model: InversionPipeline, source: VectorFile, tmp_path: Path) -> None:
    recover_file(model, source, tmp_path / "out.jsonl", **OPTIONS)
    recover_file(model, source, tmp_path / "out.parquet", **OPTIONS)
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    rows = [{k: v for k, v in row.items() if v is not None} for row in table]
    assert rows == read(tmp_path / "out.jsonl")
    assert not (tmp_path / "out.parquet.jsonl").exists()


def test_a_stopped_job_goes_on_without_doubles(
    model: InversionPipeline, source: VectorFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    recover_file(model, source, whole, **OPTIONS)
    batches, recovered = stream.invert_batches, 0

    def stopping(*arguments: Any, **options: Any) -> Iterator[Any]:
        nonlocal recovered
        for found in batches(*arguments, **options):
            yield found
            recovered += len(found)
            raise KeyboardInterrupt

    monkeypatch.setattr(stream, "invert_batches", stopping)
    for stops in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            recover_file(model, source, out, **OPTIONS)
        assert len(read(out)) == recovered == 8 * stops
        with out.open("a") as file:  # as a kill in the middle of a line leaves it
            file.write('{"row": 8, "te')
    monkeypatch.undo()
    with pytest.raises(InputError, match="is being made of something else .see .*out.jsonl.job."):
        recover_file(model, source, out, **OPTIONS | {"num_steps": 0})
    assert recover_file(model, source, out, **OPTIONS | {"batch_size": 2}) == 21
    for one, other in zip(read(out), read(whole), strict=True):
        for number in ("cosine", "runner_up"):  # batches of other sizes round otherwise
            assert one.pop(number) == pytest.approx(other.pop(number), abs=1e-6)
        assert one == other
    with pytest.raises(InputError, match="out.jsonl exists; give another name, or delete it"):
        recover_file(model, source, out, **OPTIONS)


def test_a_job_goes_on_with_nothing_else(model: InversionPipeline, source: VectorFile, tmp_path: Path) -> None:
    """Another input, field, text, model or setting is refused once a row is there; and a second process, always."""
    out, part = tmp_path / "out.jsonl", itertools.islice(recover_rows(model, source, **OPTIONS), 3)
    for _ in range(2):
        with pytest.raises(InputError, match="sequence_beam_width is 0"):  # which leaves no row
            recover_file(model, source, out, **OPTIONS | {"sequence_beam_width": 0})
    recover_file(model, source, out, **OPTIONS)
    lines = out.read_text().splitlines(keepends=True)[:3]
    assert len(list(part)) == 3

    def stopped(of: VectorFile, by: InversionPipeline, **options: Any) -> None:
        """As after a kill: the job's record is there, and three rows."""
        out.unlink()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stream, "recover_rows", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            recover_file(by, of, out, **options)
        out.write_text("".join(lines))

    np.savez(tmp_path / "two.npz", a=model.embedder.embed(TEXTS), b=model.embedder.embed(TEXTS[::-1]))
    one, other = (open_vectors(f"{tmp_path}/two.npz:{field}") for field in "ab")
    texts = [texts_as_vectors(model, part) for part in (TEXTS, TEXTS[::-1])]
    retrained = dataclasses.replace(model, sha256=("other",))
    for first, then, by in ((one, other, model), (texts[0], texts[1], model), (one, one, retrained)):
        stopped(first, model, **OPTIONS)
        with pytest.raises(InputError, match="something else"):
            recover_file(by, then, out, **OPTIONS)
    stopped(one, model, **OPTIONS)
    os.utime(one.path, (1, 1))  # another file of the same name
    with pytest.raises(InputError, match="something else"):
        recover_file(model, one, out, **OPTIONS)
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another process is writing .*out.jsonl; wait"):
            recover_file(model, one, out, **OPTIONS)


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    """Twice, at any moment: in the end every row is there once."""
    count = 3000
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(count, WIDTH)))
    make_model(tmp_path)
    program = "import sys; from v2t_jax.cli.main import main; main()"
    command = [sys.executable, "-c", program, "invert", "--model", "tiny", "--embeddings", "e.npy"]
    command += ["--output", "out.parquet", "--num-steps", "0", "--sequence-beam-width", "1", "--batch-size", "8"]
    lines = tmp_path / "out.parquet.jsonl"
    for rows in (200, 1200):
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while not lines.exists() or len(lines.read_bytes().splitlines()) < rows:
                assert process.poll() is None
                time.sleep(0.02)
            process.kill()
        assert not (tmp_path / "out.parquet").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "3,000 rows -> out.parquet\n") and "are there already" in done.stderr
    assert parquet.read_table(tmp_path / "out.parquet")["row"].to_pylist() == list(range(count))
    assert not lines.exists() and not list(tmp_path.glob("*.job"))


def test_vectors_that_no_text_has_are_named_and_passed_over(
    model: InversionPipeline, vectors: np.ndarray, tmp_path: Path
) -> None:
    bad = vectors.copy()
    bad[[3, 20]], bad[8:16] = np.nan, 0  # a whole batch too
    np.save(tmp_path / "bad.npy", bad)
    rows = list(recover_rows(model, open_vectors(str(tmp_path / "bad.npy")), **OPTIONS))
    assert [record["row"] for record, _ in rows] == list(range(21))
    assert [i for i, (record, one) in enumerate(rows) if one is None and "error" in record] == [3, *range(8, 16), 20]
    assert "NaN" in rows[3][0]["error"] and "zero" in rows[8][0]["error"]
    good = [i for i, (_, one) in enumerate(rows) if one is not None]
    found = v2t.invert_embeddings(model, vectors[good], **OPTIONS)
    assert [one.text for _, one in rows if one is not None] == [one.text for one in found]
    recover_file(model, open_vectors(str(tmp_path / "bad.npy")), tmp_path / "out.parquet", **OPTIONS)
    assert parquet.read_table(tmp_path / "out.parquet")["error"].null_count == 11
    np.save(tmp_path / "none.npy", np.zeros((3, WIDTH)))
    assert [one for _, one in recover_rows(model, open_vectors(str(tmp_path / "none.npy")), **OPTIONS)] == [None] * 3


def test_a_share_keeps_the_rows_numbers(model: InversionPipeline, source: VectorFile, tmp_path: Path) -> None:
    recover_file(model, source.share(1, 2), tmp_path / "out.jsonl", **OPTIONS)
    rows = read(tmp_path / "out.jsonl")
    assert [(row["row"], row["id"]) for row in rows] == [(i, f"r{i}") for i in range(10, 21)]


def test_texts_are_streamed_as_vectors_are(model: InversionPipeline, tmp_path: Path) -> None:
    references = model.vocabulary.normalize(TEXTS, model.config.max_length)
    recover_file(model, texts_as_vectors(model, references), tmp_path / "out.jsonl", **OPTIONS)
    found = v2t.invert_strings(model, TEXTS, **OPTIONS)
    assert [row["text"] for row in read(tmp_path / "out.jsonl")] == [one.text for one in found]
    with pytest.raises(InputError, match="give a name that ends in .jsonl or .parquet"):
        recover_file(model, texts_as_vectors(model, references), tmp_path / "out.csv", **OPTIONS)


def test_int8_vectors_are_as_good_as_their_ranges(
    model: InversionPipeline, vectors: np.ndarray, tmp_path: Path
) -> None:
    """Each number is within half a step of the range; without ranges the warning names what they are."""
    ranges = ranges_of(vectors)
    for dtype in (np.int8, np.uint8):
        packed = quantize(vectors, "int8").astype(np.int16) + (128 if dtype == np.uint8 else 0)
        error = np.abs(dequantize(packed.astype(dtype), ranges) - vectors)
        assert (error <= (ranges[1] - ranges[0]) / 255 * 0.51).all()
        as_text = packed.astype(np.float64)  # what a CSV file's numbers may become
        np.testing.assert_array_equal(dequantize(as_text, ranges), dequantize(packed.astype(dtype), ranges))
    for wrong in (vectors, packed * 10, packed[:, :3]):
        with pytest.raises(InputError, match="The ranges are of int8 vectors 16 wide, but these are"):
            dequantize(wrong, ranges)
    np.testing.assert_array_equal(dequantize(packed.tolist(), ranges, signed=False), dequantize(packed, ranges))
    np.save(tmp_path / "ranges.npy", ranges)
    np.testing.assert_array_equal(read_ranges(str(tmp_path / "ranges.npy"), WIDTH), ranges)
    for wrong in (ranges[:1], ranges[::-1], ranges[:, :3]):
        np.save(tmp_path / "wrong.npy", wrong)
        with pytest.raises(InputError, match=r"smallest and the largest value of each dimension, \[2, 16\]"):
            read_ranges(str(tmp_path / "wrong.npy"), WIDTH)
    np.save(tmp_path / "int8.npy", quantize(vectors, "int8"))
    file = open_vectors(str(tmp_path / "int8.npy"))
    found = [one for _, one in recover_rows(model, file, ranges, **OPTIONS) if one]
    assert [one.text for one in found] == [one.text for one in v2t.invert_embeddings(model, vectors, **OPTIONS)]
    with pytest.warns(UserWarning, match="whole numbers, as quantized vectors are; give the ranges"):
        list(recover_rows(model, file, **OPTIONS))


def test_packed_signs_are_vectors(model: InversionPipeline, vectors: np.ndarray) -> None:
    """As int8 of sentence-transformers, as uint8, and as numbers of a JSON file."""
    centered = vectors - vectors.mean(axis=0)  # or all of these first bits were set
    expected, packed = np.where(centered > 0, 0.25, -0.25), quantize(centered, "binary")
    for given in (packed, (packed.astype(np.int16) + 128).astype(np.uint8), packed.tolist(), packed.astype(np.float64)):
        np.testing.assert_array_equal(check_vectors(given, WIDTH), expected)
    found = v2t.invert_embeddings(model, packed, **OPTIONS)  # without a warning
    assert [one.text for one in found] == [one.text for one in v2t.invert_embeddings(model, expected, **OPTIONS)]


@pytest.mark.parametrize("kind", ["list of arrays", "list of JAX arrays", "objects", "table of objects", "frame"])
def test_vectors_as_python_has_them(vectors: np.ndarray, kind: str) -> None:
    column = np.empty(len(vectors), object)  # as a column of pandas
    column[:] = list(vectors)

    class Frame:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return column[:, None]

    given = {"list of arrays": list(vectors), "list of JAX arrays": [jnp.asarray(row) for row in vectors]}
    given |= {"objects": column, "table of objects": vectors.astype(object), "frame": Frame()}
    np.testing.assert_array_equal(check_vectors(given[kind], WIDTH), vectors)


def test_long_texts_are_suspected_by_the_results(model: InversionPipeline) -> None:
    def results(cosine: float, confidence: float | None, calls: int = 900, count: int = 8) -> list[InversionResult]:
        steps = (TraceStep(0, "a", cosine, calls),)
        return [InversionResult("a", cosine, 0, steps, confidence=confidence)] * count

    calibrated = dataclasses.replace(model, calibration=(0.0, 0.0, 0.0))
    with pytest.warns(UserWarning, match="None of 8 .* cosine of 0.85: theirs are probably longer than the 7 tokens"):
        warn_of_long_texts(calibrated, results(0.85, 0.01))
    with pytest.warns(UserWarning, match="theirs may be longer than the 7 tokens .*, or it is too weak"):
        warn_of_long_texts(model, results(0.85, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for quiet in (
            results(0.97, 0.01),
            results(0.85, None) + results(1.0, None),
            results(0.85, 0.01, 40),
            results(0.85, 0.01, count=7),
        ):
            warn_of_long_texts(model, quiet)
        warn_of_long_texts(model, results(0.85, 0.01) + results(1.0, 0.99))
