"""The command line: what it prints, where, and how every mistake ends in one sentence and exit status 2."""

import gzip
import inspect
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from tests.helpers.command_line import status_of
from tests.helpers.tiny_model import WIDTH, make_model
from tests.helpers.tiny_run import make_texts
from v2t_jax.cli import invert
from v2t_jax.cli import main as cli
from v2t_jax.embedders.base import quantize
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.inversion import pipeline

BEAM = ("--sequence-beam-width", "2", "--batch-size", "1")  # one shape, compiled once, for nearly all tests
V2T = [sys.executable, "-c", "from v2t_jax.cli.main import main; main()"]
RECIPE = str(Path(__file__).parent.parent.parent / "configs" / "tiny.py")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder)
    vectors = np.random.default_rng(0).normal(size=(3, WIDTH))
    np.save(folder / "foreign.npy", vectors)
    np.save(folder / "good.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    (folder / "texts.txt").write_text("\n".join(make_texts(300)) + "\n")
    return folder


@pytest.fixture
def run(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `v2t ARGUMENTS` in this process; `M/` in an argument is the folder of models, `T/` the test's own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        real = [a.replace("M/", f"{models}/").replace("T/", f"{tmp_path}/") for a in arguments]
        return status_of(*real), *capsys.readouterr()

    return run


def test_invert_vectors(run: Run) -> None:
    status, out, _ = run(
        *("invert", "--embeddings", "M/good.npy", "--model", "M/tiny", "--num-steps", "2"),
        *("--sequence-beam-width", "2", "--batch-size", "1", "--json"),
    )
    found = json.loads(out)
    assert status == 0 and len(found) == 3
    for one in found:
        assert set(one) == {"text", "cosine", "step", "trace", "runner_up"}
        assert [set(step) for step in one["trace"]] == [{"step", "text", "cosine", "embedder_calls"}] * 3


def test_foreign_vectors_are_warned_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda *said_of: said.append(warnings.formatwarning(*said_of[:4])))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, *_ = run("invert", "--embeddings", "M/foreign.npy", "--model", "M/tiny", "--num-steps", "0", *BEAM)
    assert status == 0 and len(said) == 1
    assert said[0].startswith("v2t: warning: The vectors don't look like") and said[0].count("\n") == 1


def test_invert_texts_given_one_by_one(run: Run) -> None:
    texts = ("--text", "the red cat", "--text=-- a dog", "--text", "the cat " * 9)
    status, out, err = run("invert", *texts, "--model", "M/tiny", "--num-steps", "1", *BEAM, "--json")
    found = json.loads(out)
    assert status == 0
    assert [one["reference"] for one in found] == ["the red cat", "a dog", "the cat the cat the cat the"]
    assert all(isinstance(one["exact_match"], bool) for one in found)
    assert "Text 3 is cut to the 7 tokens" in err


def test_what_the_tokenizer_does_not_know_is_told(run: Run) -> None:
    texts = ("--text", "the red cat", "--text", "the 日本 cat 🙂 é", "--text", "the cat " * 4 + "🙂")
    status, out, err = run("invert", *texts, "--model", "M/tiny", "--num-steps", "0", *BEAM, "--json")
    assert status == 0 and [one["reference"] for one in json.loads(out)][1] == "the cat e"
    assert "Text 2 is taken without what the tokenizer doesn't know: '日 本 🙂'" in err
    assert err.count("is taken without") == 1 and "Text 3 is cut to the 7 tokens" in err


def test_a_model_without_corrector_takes_no_steps_and_says_so(run: Run, models: Path, tmp_path: Path) -> None:
    alone = str(make_model(tmp_path, ("inverter",), "alone"))
    status, out, err = run("invert", "--embeddings", "M/good.npy", "--model", alone, *BEAM, "--json")
    assert status == 0 and {len(one["trace"]) for one in json.loads(out)} == {1}
    assert err.count("The model alone has no corrector, so it takes 0 correction steps") == 1
    status, _, err = run("invert", "--embeddings", "M/good.npy", "--model", alone, *BEAM, "--num-steps", "1")
    assert status == 2 and "has no corrector; use --num-steps 0, or train one" in err
    assert run("invert", "--embeddings", "M/good.npy", "--model", alone, *BEAM, "--num-steps", "0")[0] == 0


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("x; use num_steps=0, or train one.", "x; use --num-steps 0, or train one."),
        ('It knows no edits; use search="corrector".', "It knows no edits; use --search corrector."),
        ("search is 'x'; choose y.", "--search is 'x'; choose y."),
        ("give embedder=HttpEmbedder(...).", "give --embedder https://HOST/v1 --api.model NAME."),
        ("give embedder='pooler@DIR'.", "give --embedder 'pooler@DIR'."),
        ("api.timeout is 0, so the model is lost.", "--api.timeout is 0, so the model is lost."),
        ("There is no 'batch_size' in /a/batch_size/num_steps.py: text.", ""),
        ("The search is over and steps=3.", ""),
    ],
)
def test_advice_is_in_options(said: str, typed: str) -> None:
    with pytest.raises(InputError) as caught, cli.naming_options(cli.option_names(invert.Invert())):
        raise InputError(said)
    assert str(caught.value) == (typed or said)


def test_warnings_are_in_options_too() -> None:
    with cli.naming_options(cli.option_names(invert.Invert)):
        said = warnings.formatwarning(UserWarning("see budget=20; dequantize(vectors, ranges)."), UserWarning, "", 0)
    assert said == "v2t: warning: see --budget 20; --ranges FILE.\n"
    assert "v2t" not in warnings.formatwarning(UserWarning("a"), UserWarning, "", 0)


def test_options_are_named_that_were_not_typed(run: Run) -> None:
    status, _, err = run("invert", "--text", "a", "--api.max-cost", "3")
    assert (status, err) == (2, "v2t: --api.max-cost needs --api.price: give both.\n")
    status, _, err = run("data", "build", "-", "--output", "T/x", "--embedder", "M/embedder")
    assert status == 2 and "not from stdin: save them as a .txt file" in err


def test_invert_for_people_shows_the_trace(run: Run) -> None:
    status, out, _ = run(
        "invert", "--text", "the red cat", "--model", "M/tiny", "--num-steps", "2", "--sequence-beam-width", "2"
    )
    assert status == 0
    assert "1 of 1" in out and "step  0  cosine" in out and "true text" in out and "the red cat" in out


def test_one_vector_of_one_dimension(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.full(WIDTH, 0.25, np.float16))
    status, out, _ = run(
        "invert", "--embeddings", "T/one.npy", "--model", "M/tiny", "--num-steps", "0", *BEAM, "--json"
    )
    assert status == 0 and len(json.loads(out)) == 1


def test_vectors_texts_and_results_by_files(run: Run, models: Path, tmp_path: Path) -> None:
    """int8 vectors with ids and texts beside them, and lines; results as a list, as lines on stdout, and in files."""
    (tmp_path / "lines.txt").write_text("the cat\na red dog\n")
    arguments = "embed", "--embedder", "M/embedder", "--input", "T/lines.txt", "--output", "T/made.npy"
    status, _, err = run(*arguments, "--precision", "int8")
    assert status == 0 and "ranges, which v2t invert --ranges needs, are in" in err
    rows = zip("ab", np.load(tmp_path / "made.npy").tolist(), ("the cat", "A red dog"), strict=True)
    lines = [json.dumps({"id": i, "note": [1], "vector": e, "document": text}) for i, e, text in rows]
    (tmp_path / "made.jsonl").write_text("\n".join(lines))
    options = ("--model", "M/tiny", "--num-steps", "0", *BEAM)
    given = ("invert", "--embeddings", "T/made.jsonl:vector", "--ranges", "T/made.ranges.npy", *options)
    status, out, err = run(*given, "--json")
    listed = json.loads(out)
    assert status == 0 and "tiny recovers texts of up to 7 tokens" in err
    assert [(one["id"], one["reference"]) for one in listed] == [("a", "the cat"), ("b", "a red dog")]
    status, out, _ = run(*given, "--output", "-")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [one["text"] for one in listed]
    status, out, _ = run("invert", "--input", "T/lines.txt", "--output", "T/out.jsonl", *options)
    assert (status, out.strip().endswith("out.jsonl"), out[:6]) == (0, True, "2 rows")
    rows = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [row["reference"] for row in rows] == ["the cat", "a red dog"]
    status, out, _ = run("invert", "--embeddings", "T/made.jsonl", "--ranges", "T/made.ranges.npy", *options)
    assert status == 0 and "1 of 2: a" in out and "true text" in out


def test_embed(run: Run, models: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_bytes("\ufeffthe cat\r\na dog\x0csees\r\n".encode() + b"the cat " * 40 + b"\n")
    status, out, err = run("embed", "--embedder", "M/embedder", "--input", "T/lines.txt", "--output", "T/made.npy")
    assert (status, out.count("\n")) == (0, 1) and "1 of 3 texts are cut to 32 tokens" in err
    made = np.load(tmp_path / "made.npy")
    assert made.shape == (3, WIDTH) and made.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert not (tmp_path / "made.npy.part").exists()


def test_embed_from_stdin_to_stdout_and_from_a_pipe(run: Run, models: Path, tmp_path: Path) -> None:
    """A lone CR ends no line, and blank lines at the end are nothing: what `v2t data build` takes for lines, too."""
    content = "the cat\ra dog\u2028sees\r\na\x0cbird\n \n\n".encode()
    command = [*V2T, "embed", "--embedder", str(models / "embedder"), "--output"]
    piped = subprocess.run([*command, "-", "--input", "-"], input=content, capture_output=True, check=True)
    assert b"2 vectors of width 16 -> stdout" in piped.stderr
    shell = 'f=$1; shift; exec "$@" --input <(zcat "$f")'
    (tmp_path / "x.gz").write_bytes(gzip.compress(content))
    packed = ["bash", "-c", shell, "bash", str(tmp_path / "x.gz"), *command, str(tmp_path / "made.npy")]
    done = subprocess.run(packed, capture_output=True, text=True, check=True)
    assert done.stdout == f"2 vectors of width 16 -> {tmp_path}/made.npy\n"
    made = np.load(io.BytesIO(piped.stdout))
    np.testing.assert_array_equal(made, np.load(tmp_path / "made.npy"))
    np.testing.assert_allclose(made[1:], load_embedder(str(models / "embedder")).embed(["a\x0cbird"]), atol=1e-6)
    assert run("embed", "--embedder", "M/embedder", "--input", "T/x.gz", "--output", "T/same.npy")[0] == 0
    np.testing.assert_array_equal(made, np.load(tmp_path / "same.npy"))
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", *command, "-", "--input", "-"]
    done = subprocess.run(closed, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "stdin is empty" in done.stderr.splitlines()[-1]


def test_embed_as_vector_stores_keep_them(run: Run, models: Path, tmp_path: Path) -> None:
    arguments = ("embed", "--embedder", "M/embedder", "--input", "M/texts.txt", "--output", "T/made.npy")

    def made(*options: str) -> np.ndarray:
        status, out, err = run(*arguments, *options)
        assert status == 0 and "->" in out and "hardly show" not in err
        return np.load(tmp_path / "made.npy")

    whole = made()
    part = whole[:, :12] / np.linalg.norm(whole[:, :12], axis=1, keepdims=True)
    np.testing.assert_allclose(made("--dimensions", "12"), part, atol=1e-6)
    small = made("--dimensions", "12", "--precision", "int8")
    assert small.dtype == np.int8 and (small.min(axis=0) == -128).all() and (small.max(axis=0) >= 126).all()
    signs = made("--dimensions", "12", "--precision", "binary")
    assert (signs.dtype, signs.shape) == (np.int8, (300, 2))
    bits = np.unpackbits((signs.astype(np.int16) + 128).astype(np.uint8), axis=1)[:, :12]
    np.testing.assert_array_equal(bits, part > 0)
    with pytest.raises(InputError, match="precision is 'ubinary'; choose float32, int8, binary"):
        inspect.unwrap(quantize)(whole, "ubinary")  # without the types that tests check
    prefixed = made("--prefix", "the cat ")
    assert np.abs(prefixed - whole).max() > 1e-3
    shutil.copytree(models / "embedder", tmp_path / "prompted")
    prompts = {"prompts": {"query": "the cat ", "document": ""}}
    (tmp_path / "prompted" / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    arguments = (*arguments[:2], "T/prompted", *arguments[3:])
    np.testing.assert_array_equal(made("--prompt", "query"), prefixed)
    np.testing.assert_array_equal(made("--prompt", "document"), whole)
    (tmp_path / "few.txt").write_text("a dog\nthe cat\n")
    few = ("embed", "--embedder", "M/embedder", "--input", "T/few.txt", "--output", "T/few.npy", "--precision", "int8")
    assert "which 2 texts hardly show" in run(*few)[2]


def test_embedders(run: Run) -> None:
    status, out, _ = run("embedders", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0 and rows["gtr-base"]["hub"] == rows["gtr-base-st"]["hub"]
    assert (rows["gtr-base"]["normalize"], rows["gtr-base-st"]["normalize"]) == (False, True)
    assert rows["e5-base-v2"]["document_prefix"] == "passage: "
    fields = {"name", "hub", "width", "max_length", "pooling", "normalize", "licence", "document_prefix"}
    assert all(set(row) == fields | {"query_prefix", "dense", "sha256"} for row in rows.values())
    status, out, _ = run("embedders")
    assert status == 0 and all(name in out for name in rows)


def test_eval(run: Run, tmp_path: Path) -> None:
    arguments = ("eval", "--model", "M/tiny", "--source", "M/texts.txt", "--limit", "3", "--num-steps", "0", "1")
    arguments += ("--sequence-beam-width", "2")
    status, out, _ = run(*arguments, "--json", "--plot", "T/plot.png")
    report = json.loads(out)
    assert status == 0 and set(report) == {"model", "split", "n", "rows"}
    assert (report["model"], report["split"], report["n"]) == ("tiny", "held_out", 3)
    assert len(report["rows"]) == 2
    for row in report["rows"]:
        assert set(row) == {
            *("num_steps", "sequence_beam_width", "bleu", "bleu_sem", "token_f1", "exact_match", "exact_match_sem"),
            *("cosine", "texts_per_second", "embedder_calls", "edit_rounds"),
        }
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    status, out, _ = run(*arguments)
    assert status == 0 and "BLEU" in out and "tiny" in out
    (row,) = json.loads(run(*arguments[:6], "1", "--num-steps", "0", *arguments[-2:], "--json")[1])["rows"]
    assert row["bleu_sem"] is None and row["exact_match_sem"] is None


def test_demo(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "packaged").mkdir()
    shutil.copytree(models / "tiny", tmp_path / "packaged" / "minilm-wordnet")
    monkeypatch.setattr(invert, "DEMO_BEAM", 2)
    monkeypatch.setattr(pipeline, "PACKAGED", tmp_path / "packaged")
    status, out, _ = run("demo", "--plot", "T/demo.png")
    assert status == 0 and "of 24" in out
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")
    status, out, _ = run("demo", "--text=the 🙂 cat, é!")
    assert status == 0 and "your own" in out
    assert run("demo", "--text=🙂")[0] == 2


def test_env(run: Run) -> None:
    status, out, _ = run("env")
    assert status == 0
    for word in ("python", "jax ", "devices: cpu", "packaged models", "wordnet", "all-MiniLM-L6-v2"):
        assert word in out


@pytest.mark.parametrize("arguments", [["--help"], ["invert", "-h"], ["train", "--help"], ["train", RECIPE, "--help"]])
def test_help(run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert status == 0 and "usage" in out and not err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_the_parser_refuses_goes_to_stderr_in_any_encoding(encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*V2T, "invert", "--txt", "a"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Unrecognized options: --txt, a" in done.stderr and "--text STR" in done.stderr


@pytest.fixture
def bad(models: Path, tmp_path: Path) -> Path:
    """Files that are wrong, each in its own way."""
    good = np.ones((2, WIDTH), np.float32)
    arrays: dict[str, Any] = {
        "wide": np.ones((2, WIDTH + 1)),
        "nan": np.where(np.eye(2, WIDTH), np.nan, 1.0),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "object.npy", np.full((2, WIDTH), None), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(good))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "junk.npy").write_bytes(b"junk" * 99)
    (tmp_path / "short.npy").write_bytes((models / "good.npy").read_bytes()[:-9])
    np.savez(tmp_path / "many.npz", good)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "gap.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    for name, file in (("cut", "inverter.safetensors"), ("changed", "corrector.safetensors"), ("bent", "config.json")):
        shutil.copytree(models / "tiny", tmp_path / name)
        content = bytearray((tmp_path / name / file).read_bytes())
        content[len(content) // 2] ^= 255
        (tmp_path / name / file).write_bytes(content if name == "changed" else content[: len(content) // 2])
    shutil.copytree(models / "tiny", tmp_path / "lacking")
    (tmp_path / "lacking" / "pieces.safetensors").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"name": "another"}')
    (tmp_path / "recipe.py").write_text("def get_config(): return 1\n")
    return tmp_path


TINY = ("--model", "M/tiny")
VECTORS = {
    "wide": "17 wide",
    "nan": "Vector 1 of 2 holds NaN",
    "object": "holds Python objects where vectors are meant",
    "pickle": "it doesn't begin as .npy files do",
    "empty": "is empty",
    "junk": "it doesn't begin as .npy files do",
    "short": "truncated",
    "missing": "No such file or directory; fix that",
}
MISTAKES = [
    *((("invert", "--embeddings", f"T/{name}.npy", *TINY), said) for name, said in VECTORS.items()),
    (("invert", "--embeddings", "T/many.npz:title", *TINY), "no vectors named 'title'"),
    (("invert", "--embeddings", "M/good.npy", "--output", "T/out.txt", *TINY), "ends in .jsonl or .parquet"),
    (("invert", "--embeddings", "M/good.npy", "--ranges", "M/good.npy", *TINY), "smallest and the largest value"),
    (("invert", "--text", "a", "--json", "--output", "T/out.jsonl", *TINY), "--json prints, and --output writes"),
    (("invert", "--text", "a", "--ranges", "M/good.npy", *TINY), "--ranges belongs to the int8 vectors"),
    (("invert", "--embeddings", "T/folder", *TINY), "is a folder, but none of Chroma"),
    (("invert", *TINY), "one of --text TEXT, --input FILE and --embeddings"),
    (
        ("invert", "--text", "a", "--embeddings", "M/good.npy", *TINY),
        "one of --text TEXT, --input FILE and --embeddings",
    ),
    (("invert", "--text", "a cat", "--text", " ", *TINY), "Text 2 of 2 is empty"),
    (("invert", "--text", "🙂", *TINY), "nothing that the embedder's tokenizer knows"),
    (("invert", "--text", "cat", "--model", "nonsense"), "no model 'nonsense'"),
    (("invert", "--text", "cat", "--model", "T/folder"), "config.json is missing"),
    (("invert", "--text", "cat", "--model", "T/cut"), "truncated or altered"),
    (("invert", "--text", "cat", "--model", "T/changed"), "truncated or altered"),
    (("invert", "--text", "cat", "--model", "T/bent"), "is not readable JSON"),
    (("invert", "--text", "cat", "--model", "T/lacking"), "missing"),
    (("invert", "--text", "cat", *TINY, "--num-steps", "-1"), "--num-steps is -1"),
    (("invert", "--text", "cat", *TINY, "--num-steps", "many"), "--num-steps"),
    (("invert", "--text", "cat", *TINY, "--sequence-beam-width", "0"), "--sequence-beam-width is 0"),
    (("invert", "--text", "cat", *TINY, "--batch-size", "0"), "--batch-size is 0"),
    (("invert", "--text", "cat", *TINY, "--mode", "worst"), "'worst'"),
    (("invert", "--txt", "cat"), "Perhaps you meant: --text"),
    (
        ("embed", "--input", "T/missing.txt", "--output", "T/o.npy", "--embedder", "M/embedder"),
        "missing.txt cannot be read: No such file",
    ),
    (("embed", "--input", "T/latin.txt", "--output", "T/o.npy", "--embedder", "M/embedder"), "not UTF-8"),
    (("embed", "--input", "T/empty.txt", "--output", "T/o.npy", "--embedder", "M/embedder"), "is empty"),
    (("embed", "--input", "T/gap.txt", "--output", "T/o.npy", "--embedder", "M/embedder"), "gap.txt is blank"),
    (
        ("embed", "--input", "M/texts.txt", "--output", "T/no/o.npy", "--embedder", "M/embedder"),
        "o.npy.part: No such file",
    ),
    (("embed", "--input", "M/texts.txt", "--output", "T/o.npy", "--embedder", "nonsense"), "no embedder 'nonsense'"),
    (
        ("embed", "--input", "M/texts.txt", "--output", "T/o.npy", "--embedder", "M/embedder", "--prompt", "query"),
        "has no prompt 'query'; it has none",
    ),
    (
        ("embed", "--input", "M/texts.txt", "--output", "T/o.npy", "--prompt", "query", "--prefix", "a "),
        "Both a prompt's name and a prefix were given",
    ),
    (
        ("embed", "--input", "M/texts.txt", "--output", "T/o.npy", "--embedder", "http://h/v1", "--prompt", "query")
        + ("--api.model", "m"),
        "--prompt are for embedders that run here",
    ),
    (("embed", "--input", "M/texts.txt", "--output", "T/o.npy", "--embedder", "T/folder"), "holds no weights"),
    (("embed", "--input", "M/texts.txt"), "--output"),
    (
        ("embed", "--input", "M/texts.txt", "--output", "T/o.npy", "--embedder", "M/embedder", "--dimensions", "99"),
        "16 dimensions; 99 of them can't be kept",
    ),
    (("embed", "--input", "M/texts.txt", "--output", "T/o.npy", "--precision", "int4"), "int4"),
    (("calibrate", "nowhere"), "no model folder 'nowhere'"),
    (("calibrate", "M/tiny", "--source", "M/texts.txt", "--limit", "4"), "give 8 or more"),
    (("calibrate", "M/tiny", "--source", "M/texts.txt", "--noise", "-1"), "levels of at least 0"),
    (("eval", *TINY, "--split", "test"), "no split 'test'"),
    (("eval", *TINY, "--limit", "0"), "--limit is 0"),
    (("eval", *TINY, "--num-steps", "0", "-2"), "--num-steps is -2; give a number from 0"),
    (("eval", *TINY, "--sequence-beam-width", "0"), "give a number from 1 to 64"),
    (("eval", *TINY, "--plot", "T/folder.png"), "plot can't be written"),
    (("eval", "--model", "no model yet", "--plot", "T/plot.jpg"), "no format for a plot; let it end in .png"),
    (("calibrate", "M/tiny", "--plot", "T/plot"), "no format for a plot; let it end in .png"),
    (("demo", "--plot", "T/plot.jpeg"), "no format for a plot; let it end in .png"),
    (("eval", *TINY, "--source", "T/nothing.txt"), "no file"),
    (("train",), "The recipe is missing; put it first"),
    (("train", "--workdir", "T/w", RECIPE), "The recipe is missing; put it first"),
    (("train", "T/nothing.py", "--workdir", "T/w"), "no recipe"),
    (("train", "T/recipe.py", "--workdir", "T/w"), "must define get_config"),
    (("train", RECIPE), "--workdir"),
    (("train", RECIPE, "--workdir", "T/w", "--inverter.num-step", "5"), "Perhaps you meant: --inverter.num-steps"),
    (("train", RECIPE, "--workdir", "T/w", "--inverter.num-steps", "five"), "--inverter.num-steps"),
    (
        ("train", RECIPE, "--workdir", "T/w", "--inverter.num-steps", "0"),
        "num_steps is 0; it must be",
    ),
    (("train", RECIPE, "--workdir", "T/w", "--stages", "mapper"), "mapper"),
    (("train", RECIPE, "--workdir", "T/other"), "another config"),
    (
        ("train", RECIPE, "--workdir", "T/w", "--distributed.coordinator", "host"),
        "with coordinator host, num_processes None",
    ),
    (("nonsense",), "nonsense"),
    ((), "invert, audit, defend, study, embed, embedders, eval"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(arguments)[:70] for arguments, _ in MISTAKES])
def test_a_mistake_ends_in_one_sentence_or_the_parsers_box(
    run: Run, bad: Path, arguments: tuple[str, ...], said: str
) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    # A slow machine may first name what takes long.
    before = ("loading", "starting", "reading", "embedding")
    lines = [line for line in err.splitlines() if not line.startswith(before)]
    if lines[0].startswith("v2t: "):
        (sentence,) = lines
        assert sentence.endswith((".", ").")) and said in sentence
    else:
        assert said in " ".join(re.sub("[╭╮╰╯│─|]", " ", err).split())
    assert not list(bad.glob("*.part"))


def test_typed_overrides_reach_the_training_run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from v2t_jax.train import loop

    seen: list[Any] = []

    def train(config: Any, workdir: Path) -> Path:
        seen.extend([config, workdir])
        workdir.mkdir()
        (workdir / "evaluation.json").write_text('{"model": "mine", "split": "held_out", "n": 1, "rows": []}')
        return workdir / "model"

    monkeypatch.setattr(loop, "train", train)
    overrides = ("--inverter.num-steps", "5", "--model.t5.d-model", "32", "--data.sources", "a.txt", "b.txt")
    overrides += ("--inverter.optimizer.learning-rate", "1e-4", "--stages", "inverter", "--name", "mine")
    overrides += ("--model.no-standardize", "--data.bucket-lengths", "8", "17")
    status, out, _ = run("train", RECIPE, "--workdir", "T/w", *overrides)
    config, workdir = seen
    assert status == 0 and "mine: 1 texts" in out and f"{workdir}/model" in out and workdir == tmp_path / "w"
    assert (config.inverter.num_steps, config.model.t5.d_model, config.corrector.num_steps) == (5, 32, 60)
    assert (config.data.sources, config.data.bucket_lengths) == (("a.txt", "b.txt"), (8, 17))
    assert config.inverter.optimizer.learning_rate == 1e-4 and not config.model.standardize
    assert (config.stages, config.name) == (("inverter",), "mine")

    for preempted, status in ((True, 0), (False, 130)):  # by SIGTERM, or by Ctrl-C

        def stop(*_: Any, preempted: bool = preempted) -> Path:
            raise loop.TrainingStopped("stopped at step 3; run the same command to resume", preempted)

        monkeypatch.setattr(loop, "train", stop)
        assert run("train", RECIPE, "--workdir", "T/w")[::2] == (
            status,
            "v2t: stopped at step 3; run the same command to resume\n",
        )


def test_a_fresh_process_keeps_stdout_and_stderr_apart(models: Path) -> None:
    command = [*V2T, "invert", "--embeddings", "good.npy", "--model", "tiny", "--num-steps", "1", *BEAM, "--json"]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 3 and "Traceback" not in done.stderr
    done = subprocess.run([*V2T, "invert", "--model", "tiny", "--embeddings", "x"], cwd=models, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"") and b"Traceback" not in done.stderr


def test_a_reader_who_leaves_is_no_error(models: Path) -> None:
    process = subprocess.Popen([*V2T, "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as said:
        assert b"Error" not in said.read()
    assert process.wait() == 0


def test_control_c_ends_in_one_line(models: Path) -> None:
    command = [*V2T, "invert", "--embeddings", "good.npy", "--model", "tiny"]
    command += ["--num-steps", "100000", "--mode", "upstream"]
    with subprocess.Popen(command, cwd=models, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = ""
        while "recovering" not in line:  # it says what it is doing; nobody waits in the dark
            line = process.stderr.readline()
            assert line, "ended too early"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "v2t: interrupted" and "Traceback" not in err


def test_a_device_without_room_ends_in_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any) -> None:
        np.asarray(jax.numpy.zeros(2**44))

    monkeypatch.setattr(invert.Invert, "run", too_large)
    code, _, err = run("invert", "--text", "cat")
    assert code == 2 and "A device's memory is too small (RESOURCE_EXHAUSTED: Out of memory allocating" in err
    monkeypatch.setattr(invert.Invert, "run", lambda _: jax.jit(lambda: 1 / 0)())
    with pytest.raises(ZeroDivisionError):
        run("invert", "--text", "cat")


def test_control_c_that_jax_swallows_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    left = threading.Event()
    monkeypatch.setattr(cli, "leave", left.set)
    monkeypatch.setattr(cli, "UNWINDING_SECONDS", 0.01)
    with pytest.raises(KeyboardInterrupt):
        cli.interrupt()
    assert left.wait(timeout=60)
    left.clear()
    cli.lost(SimpleNamespace(exc_type=KeyboardInterrupt))
    assert left.is_set()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("invert", "--text", "cat", "--num-steps", "99999999999"), "--num-steps is 99999999999; give a number from 0"),
        (("invert", "--text", "cat", "--model", "M/tiny", "--sequence-beam-width", "65"), "give a number from 1 to 64"),
        (("invert", "--text", "cat", "--model", ""), "There is no model ''"),
        (("invert", "--embeddings", "T/pipe"), "is a folder, a pipe or a device"),
        (("embed", "--input", "M/texts.txt", "--output", "T/pipe"), "is a folder or a device"),
        (("train", RECIPE, "--workdir", ""), "The work directory is empty"),
        (("train", RECIPE, "--workdir", "T/w", "--seed", "-1"), "--seed is -1"),
        (("train", RECIPE, "--workdir", "T/w", "--stages", "corrector"), "put inverter before them in stages"),
        (("train", "T/leaves.py", "--workdir", "T/w"), "failed to load (SystemExit: 3)"),
        (("train", "T/untyped.py", "--workdir", "T/w"), "embedder is None; it must be a string"),
    ],
)
def test_more_bad_input(run: Run, tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    (tmp_path / "untyped.py").write_text(
        "from v2t_jax.config import Config\n\n\ndef get_config():\n    return Config(embedder=None)\n"
    )
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and complaint in err and err.count("v2t: ") == 1
    assert (tmp_path / "pipe").is_fifo() and not (tmp_path / "w").exists()


def test_output_through_a_link_replaces_what_it_points_to(run: Run, tmp_path: Path) -> None:
    (tmp_path / "real.npy").write_bytes(b"")
    (tmp_path / "link.npy").symlink_to("real.npy")
    (tmp_path / "lines.txt").write_text("the cat\n")
    assert run("embed", "--embedder", "M/embedder", "--input", "T/lines.txt", "--output", "T/link.npy")[0] == 0
    assert (tmp_path / "link.npy").is_symlink() and np.load(tmp_path / "real.npy").shape == (1, WIDTH)


def test_vectors_are_not_written_over_their_texts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("the cat\n")
    (tmp_path / "link.npy").symlink_to("lines.txt")
    for output in ("T/lines.txt", "T/link.npy"):
        status, _, err = run("embed", "--embedder", "M/embedder", "--input", "T/lines.txt", "--output", output)
        assert status == 2 and "is the input itself, which would be lost; give another name" in err
    assert (tmp_path / "lines.txt").read_text() == "the cat\n"


@pytest.mark.parametrize("close", ["exec >&-", "exec 2>&-", "exec >/dev/full"])
def test_closed_and_full_outputs(close: str) -> None:
    ended = subprocess.run(["sh", "-c", f'{close}; exec "$@"', "sh", *V2T, "env"], capture_output=True, check=False)
    assert ended.returncode == (2 if "full" in close else 0)
    assert b"Traceback" not in ended.stderr and (b"No space left" in ended.stderr) == ("full" in close)


def test_no_such_device(models: Path) -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    command = [*V2T, "invert", "--model", str(models / "tiny"), "--text", "cat"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2 and "v2t: JAX finds no device for JAX_PLATFORMS='cuda'" in ended.stderr
