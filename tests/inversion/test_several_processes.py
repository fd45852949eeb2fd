"""Commands that several processes run as one: each does its share, process 0 prints what one alone would."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny_model import make_model
from tests.helpers.tiny_run import make_texts
from v2t_jax import invert_embeddings, load
from v2t_jax.eval.evaluate import evaluate, evaluation_texts

ROOT = Path(__file__).parents[2]
COUNT = 7  # not a multiple of the processes

pytestmark = [pytest.mark.multihost, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    make_model(folder)
    (folder / "texts.txt").write_text("\n".join(make_texts(60)) + "\n")
    return folder


def processes(*command, status=0):
    """What two processes with two devices each print, by process."""
    launcher = [sys.executable, ROOT / "launch" / "local.py", "--processes", "2", "--devices", "2", "--"]
    command = [sys.executable, "-c", "from v2t_jax.cli.main import main; main()", *map(str, command)]
    done = subprocess.run([*launcher, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return [[line[4:] for line in lines if line.startswith(f"[{i}] ")] for i in range(2)]


def document(lines):
    """The JSON among them: notes and progress stand before it."""
    return json.loads("\n".join(lines[next(i for i, line in enumerate(lines) if line in ("[", "{")) :]))


def test_invert(folder):
    model = load(str(folder / "tiny"))
    vectors = model.embedder.embed(make_texts(COUNT, seed=5))
    np.save(folder / "vectors.npy", vectors)
    options = ("--embeddings", folder / "vectors.npy", "--num-steps", 2, "--sequence-beam-width", 2, "--json")
    first, second = processes("invert", "--model", folder / "tiny", *options)
    expected = [one.to_dict() for one in invert_embeddings(model, vectors, num_steps=2, sequence_beam_width=2)]
    found = document(first)
    assert [one["text"] for one in found] == [one["text"] for one in expected]
    assert [[step["text"] for step in one["trace"]] for one in found] == [
        [step["text"] for step in one["trace"]] for one in expected
    ]
    np.testing.assert_allclose([one["cosine"] for one in found], [one["cosine"] for one in expected], atol=1e-5)
    assert not any("{" in line for line in second)


def test_a_mistake_in_one_share_ends_all_with_its_sentence(folder):
    vectors = np.ones((4, 16), np.float32)
    vectors[3] = 0  # process 1's
    np.save(folder / "zero.npy", vectors)
    for lines in processes("invert", "--model", folder / "tiny", "--embeddings", folder / "zero.npy", status=2):
        assert "v2t: Vector 4 of 4 is (almost) zero" in lines[-1]


def test_eval(folder):
    model = load(str(folder / "tiny"))
    source = str(folder / "texts.txt")
    texts = evaluation_texts(model, "train", COUNT, source)
    expected = evaluate(model, texts, (0, 1), (1, 2), "train")
    grid = ("--num-steps", 0, 1, "--sequence-beam-width", 1, 2)
    options = ("--source", source, "--split", "train", "--limit", COUNT, "--plot", folder / "scores.png", "--json")
    first, second = processes("eval", "--model", folder / "tiny", *grid, *options)
    found = document(first)
    assert found["n"] == expected["n"] == COUNT and (folder / "scores.png").is_file()
    for row, one in zip(found["rows"], expected["rows"], strict=True):
        shared = row.keys() - {"texts_per_second"}
        assert {name: row[name] for name in shared} == pytest.approx({name: one[name] for name in shared}, abs=1e-4)
    assert not any("{" in line for line in second)


def test_columns_are_made_in_shares(folder):
    tokenizer = ("--tokenizer", folder / "embedder" / "tokenizer.json", "--held-out-share", 0.1, "--processes", 1)
    build = ("data", "build", folder / "texts.txt", *tokenizer, "--output", folder / "data")
    command = [sys.executable, "-c", "from v2t_jax.cli.main import main; main()", *map(str, build)]
    subprocess.run(command, cwd=ROOT, check=True)
    embed = ("data", "embed", folder / "data", "--name", "e", "--max-length", 8, "--embedder", folder / "embedder")
    ends = [lines[-1] for lines in processes(*embed)]
    assert any(line.startswith("The column is finished") for line in ends)
