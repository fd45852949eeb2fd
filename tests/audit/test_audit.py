"""v2t audit: what is found, refused, hidden and gone on with; its report, and SARIF by the standard's schema."""

import dataclasses
import gzip
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.helpers.command_line import status_of
from tests.helpers.tiny_model import make_model
from v2t_jax.audit import report, run
from v2t_jax.audit.run import Settings, audit
from v2t_jax.data.vector_file import Rows, VectorFile
from v2t_jax.errors import InputError
from v2t_jax.inversion import pipeline, stream
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.stores.base import Store

SCHEMA = json.loads(gzip.decompress((Path(__file__).parent / "sarif-2.1.0.json.gz").read_bytes()))
TEXTS = [f"{a} {b} sees the {c}" for a in ("old", "red") for b in ("cat", "dog", "fish") for c in ("boat", "hill")]
HOSTILE = "<script>alert(1)</script>\u202eevil\x07"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InversionPipeline:
    return pipeline.load(str(make_model(tmp_path_factory.mktemp("audit"))))


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model recovers nothing."""
    monkeypatch.setattr(run, "self_test", lambda *_: {"n": 8, "exact": 8})


def store_of(vectors: np.ndarray, texts: list[Any] | None, metadata: list[dict[str, Any]] | None) -> Store:
    ids = [f"r{i}" for i in range(len(vectors))]
    whole = Rows(vectors, ids, texts, metadata)

    def read(start: int) -> Iterator[Rows]:
        yield whole.part(slice(start, None))

    return Store("toy", VectorFile("/data/toy", len(vectors), read), vectors.shape[1], "cosine", collection="notes")


@pytest.fixture
def store(model: InversionPipeline) -> Store:
    vectors = model.embedder.embed(TEXTS)
    vectors[3] = np.nan
    beside = [
        {"source": f"/home/anna/{i}.txt", "mail": "anna@example.com" if i % 2 else None} for i in range(len(TEXTS))
    ]
    beside[0]["note"] = HOSTILE
    return store_of(vectors, list(TEXTS), beside)


def test_all_is_counted(store: Store, model: InversionPipeline, trusted: None, tmp_path: Path) -> None:
    lines = ["a red horse", *TEXTS[:6], "the old man"]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    (tmp_path / "gone.txt").write_text("r2\n/home/anna/5.txt\nr99\n")
    settings = Settings(num_steps=0, candidates=str(tmp_path / "lines.txt"), deleted=str(tmp_path / "gone.txt"))
    found = audit(store, lambda: model, tmp_path / "out", settings)
    clear = found["in_clear"]
    assert (clear["n"], clear["rows"], clear["personal_data"]) == (12, 12, {"email": 6})
    assert {name: field["rows"] for name, field in clear["fields"].items()} == {
        **{"source": 12, "text": 12, "mail": 6, "note": 1}
    }
    assert found["fit"]["known_texts"] == 11 and found["fit"]["cosine"] == pytest.approx(1, abs=1e-5)
    recovered = found["recovery"]
    assert (recovered["n"], recovered["skipped"], recovered["known"]) == (11, 1, 11)
    rows = [json.loads(line) for line in (tmp_path / "out" / "recovered.jsonl").read_text().splitlines()]
    assert recovered["exact"]["hits"] == sum(row.get("exact_match", False) for row in rows)
    assert sum(part["n"] for part in recovered["by_length"]) == 11 and recovered["too_long"] == 0
    compared = found["candidates"]
    # Six lines are texts of the store; one of them belongs to the vector that is NaN, which is left out.
    assert compared["top_1"]["hits"] == compared["near"]["hits"] == 5 and compared["top_10"]["n"] == 11
    assert {"bleu", "token_f1"} < set(recovered["by_length"][0])
    deleted = found["deleted"]
    assert (deleted["asked"], deleted["left"], deleted["recovered"]["n"]) == (3, 2, 2)
    assert (deleted["found_by"], deleted["records"]) == ({"id": 1, "source": 1}, ["r2", "r5"])


def test_deleted_records_are_found_outside_of_the_sample(
    store: Store, model: InversionPipeline, trusted: None, tmp_path: Path
) -> None:
    (tmp_path / "gone.txt").write_text("".join(f"r{i}\n" for i in range(6, 12)))
    settings = Settings(sample=2, num_steps=0, deleted=str(tmp_path / "gone.txt"))
    found = audit(store, lambda: model, tmp_path / "out", settings)
    assert found["deleted"]["left"] == 6
    # They are recovered beside the sample, and not among its figures.
    assert found["sample"]["n"] == found["in_clear"]["n"] == found["recovery"]["n"] + found["recovery"]["skipped"] == 2
    assert 6 <= len((tmp_path / "out" / "recovered.jsonl").read_text().splitlines()) <= 8


def test_the_report_escapes_and_hides(store: Store, model: InversionPipeline, trusted: None, tmp_path: Path) -> None:
    found = audit(store, lambda: model, tmp_path, Settings(num_steps=0))
    report.write(found, tmp_path, show_text=False)
    files = ("report.html", "report.json", "findings.sarif")
    hidden, _, _ = shown = [(tmp_path / name).read_text("utf-8") for name in files]
    assert not [text for text in shown if "anna@example.com" in text or "old cat sees" in text]
    assert "a***@e******.c**" in hidden and "<script" not in hidden and "\u202e" not in hidden
    report.write(found, tmp_path, show_text=True)
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "anna@example.com" in html and "old cat sees" in html
    assert "<script" not in html and "&lt;script&gt;" in html and "\u202e" not in html and "\x07" not in html
    assert not re.search(r"src\s*=|@import|url\((?!#)|href\s*=\s*.(?!#)", html)  # nothing is loaded


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("anna@example.com", "a***@e******.c**"),
        ("Jose\u0301 M\u00fcller", "J**** M*****"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947", "\u0928*****"),
        ("s\xadm\xadi\xadth 8.8.8.8, pin 4 1 7", "s******* *.*.*.*, p** * * *"),
    ],
)
def test_no_more_than_first_letters_are_shown(text: str, hidden: str) -> None:
    assert report.mask(text) == hidden


def test_sarif_keeps_to_its_schema_and_its_fingerprints(
    store: Store, model: InversionPipeline, trusted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = audit(store, lambda: model, tmp_path, Settings(num_steps=0))
    rows = [json.loads(line) for line in (tmp_path / "recovered.jsonl").read_text().splitlines()]
    rows[0] |= {"exact_match": True}
    del rows[1]["exact_match"], rows[1]["original"]
    rows[1]["confidence"] = 0.7
    (tmp_path / "recovered.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first, again = (report.sarif(found, tmp_path / "recovered.jsonl", show_text=False) for _ in range(2))
    jsonschema.validate(first, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(first | {"version": "1"}, SCHEMA)
    results = first["runs"][0]["results"]
    states = [(one["ruleId"], one["properties"]["ai/exploitability"]) for one in results]
    assert states[0] == (report.CLEARTEXT, "demonstrated")
    assert (report.INVERSION, "demonstrated") in states and states[2] == (report.INVERSION, "poc")
    prints = [one["partialFingerprints"]["record/v1"] for one in results]
    assert len(set(prints)) == len(prints)
    assert prints == [one["partialFingerprints"]["record/v1"] for one in again["runs"][0]["results"]]
    assert rows[0]["text"] not in json.dumps(first) and first["runs"][0]["properties"]["results_left_out"] == 0
    monkeypatch.setattr(report, "MOST_RESULTS", 1)
    fewer = report.sarif(found, tmp_path / "recovered.jsonl", show_text=False)["runs"][0]
    assert len(fewer["results"]) == 2 and fewer["properties"]["results_left_out"] == len(results) - 2 > 0


def test_where_exactness_cannot_be_told_nothing_is_claimed(
    model: InversionPipeline, trusted: None, tmp_path: Path
) -> None:
    """Neither without a calibration nor for compressed vectors; texts that are known tell."""
    e = model.embedder.embed(TEXTS)
    calibrated = dataclasses.replace(model, calibration=(9.0, 0.0, 0.0))  # sure of everything
    cases = [
        (model, "", "isn&#39;t calibrated"),
        (calibrated, "int8", "aren&#39;t compressed"),
        (calibrated, "", "12 of 12"),
    ]
    for i, (one, approximate, words) in enumerate(cases):
        store = dataclasses.replace(store_of(e, None, None), approximate=approximate)
        (folder := tmp_path / str(i)).mkdir()
        found = audit(store, lambda one=one: one, folder, Settings(num_steps=0))
        report.write(found, folder, show_text=False)
        html = (folder / "report.html").read_text("utf-8")
        assert words.replace("&#39;", "'") in html and "0 correction steps" in html
        inverted = [one for one in json.loads((folder / "findings.sarif").read_text())["runs"][0]["results"]]
        assert (found["recovery"]["sure"] is None) == (i < 2) == (not inverted) == ("can't be told" in html)
    assert "with a probability of 1.000" in inverted[0]["message"]["text"]
    some: list[Any] = [*TEXTS[:1], *[" "] * 11]
    found = audit(store_of(e, some, None), lambda: calibrated, tmp_path / "some", Settings(num_steps=0))
    assert found["recovery"]["known"] == 1 and found["recovery"]["sure"]["n"] == 12


def test_ids_and_lists_are_looked_at(model: InversionPipeline, trusted: None, tmp_path: Path) -> None:
    rows = [{"id": f"doc{i}", "sources": [f"s{i}", "all"], "talk": "a" * i} for i in range(len(TEXTS))]
    store = store_of(model.embedder.embed(TEXTS), None, rows)
    whole = next(store.rows.read(0))
    ids = ["anna@example.com", *(whole.ids or [])[1:]]
    named = dataclasses.replace(store.rows, read=lambda start: iter([whole._replace(ids=ids).part(slice(start, None))]))
    (tmp_path / "gone.txt").write_text("r2\ns5\ndoc7\nanna@example.com\n")
    settings = Settings(num_steps=0, deleted=str(tmp_path / "gone.txt"), text="talk")
    with pytest.raises(InputError, match="or they are of another text"):
        audit(dataclasses.replace(store, rows=named), lambda: model, tmp_path, settings)
    with pytest.raises(InputError, match="has no field 'tok' beside its vectors; give one of id, sources, talk"):
        audit(
            dataclasses.replace(store, rows=named), lambda: model, tmp_path, dataclasses.replace(settings, text="tok")
        )
    settings = dataclasses.replace(settings, text=None)
    found = audit(dataclasses.replace(store, rows=named), lambda: model, tmp_path, settings)
    assert found["deleted"]["left"] == 4 and found["deleted"]["found_by"] == {"id": 3, "sources": 1}
    assert found["in_clear"]["fields"]["id"]["rows"] == 12 and found["in_clear"]["personal_data"] == {"email": 1}
    report.write(found, tmp_path, show_text=False)
    for name in ("report.html", "report.json", "findings.sarif"):
        assert "anna@example" not in (tmp_path / name).read_text("utf-8")


def test_one_record_does_not_end_an_audit(model: InversionPipeline, tmp_path: Path) -> None:
    texts = [text for text in TEXTS[:4] for _ in range(16)]
    e = model.embedder.embed(texts)
    e += np.random.default_rng(0).normal(size=e.shape).astype(np.float32) * 1e-6  # as other batches give them
    e[5] *= 1.5
    texts[2] = "  "
    found = run.fit(model, store_of(e, texts, None).rows)
    assert found["known_texts"] == 63 and found["norm_to"] == pytest.approx(1.5, abs=1e-3)


def test_what_does_not_fit_is_refused(store: Store, model: InversionPipeline, tmp_path: Path) -> None:
    def refused(store: Store, match: str, known: list[str]) -> None:
        with pytest.raises(InputError, match=match):
            audit(store, lambda: model, tmp_path, Settings(num_steps=0, budget=1), known)

    vectors = model.embedder.embed(TEXTS)
    refused(store_of(vectors[:0], None, None), "holds no vectors", ["cat"])
    refused(store_of(vectors[:, :9], None, None), "9 wide", ["cat"])
    refused(store_of(3 * vectors, None, None), r"don't look like .*'s: 11 of 11 have lengths of 3", ["cat"])
    refused(store_of(vectors * np.nan, None, None), "None of the first 12 vectors", ["cat"])
    refused(store_of(vectors[::-1].copy(), list(TEXTS), None), "another embedder made those", ["cat"])
    refused(store, "recovers none of 2 known texts exactly", ["the big house", "a red horse"])
    assert not (tmp_path / "recovered.jsonl").exists()


def test_an_audit_goes_on(store: Store, model: InversionPipeline, trusted: None, tmp_path: Path) -> None:
    whole = audit(store, lambda: model, tmp_path / "whole", Settings(num_steps=0))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    lines = (tmp_path / "cut" / "recovered.jsonl").read_text().splitlines(keepends=True)
    assert audit(store, lambda: model, tmp_path / "cut", Settings(num_steps=0)) == whole  # it was recovered already

    def begun(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    shutil.rmtree(tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("v2t_jax.inversion.stream._whole_lines", begun)
        audit(store, lambda: model, tmp_path / "cut", Settings(num_steps=0))
    assert not (tmp_path / "cut" / "report.json").exists()
    assert audit(store, lambda: model, tmp_path / "cut", Settings(num_steps=0)) == whole
    assert (tmp_path / "cut" / "recovered.jsonl").read_text() == "".join(lines)
    with pytest.raises(InputError, match="holds an audit of something else"):
        audit(store, lambda: model, tmp_path / "cut", Settings(num_steps=0, seed=1))
    other = dataclasses.replace(model, sha256=("0" * 64,))
    with pytest.raises(InputError, match="holds an audit of something else"):
        audit(store, lambda: other, tmp_path / "cut", Settings(num_steps=0))


def test_an_audit_killed_in_the_middle_of_a_row_goes_on(
    store: Store, model: InversionPipeline, trusted: None, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.txt"
    gone.write_text("r1\n")
    settings = Settings(num_steps=0, deleted=str(gone))
    whole, cut, file = tmp_path / "whole", tmp_path / "cut", "recovered.jsonl"
    audit(store, lambda: model, whole, settings)
    rows, write = itertools.count(), stream.as_json

    def killed(*row: Any) -> str:
        if next(rows) == 5:
            raise KeyboardInterrupt
        return write(*row)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "as_json", killed)
        audit(store, lambda: model, cut, settings)
    with (cut / file).open("a") as lines:
        lines.write('{"row": 5, "te')
    audit(store, lambda: model, cut, settings)
    ours, theirs = ([*map(json.loads, (folder / file).read_text().splitlines())] for folder in (cut, whole))
    # In other batches the last digit of a cosine may differ.
    assert [one | {"cosine": 0, "runner_up": 0} for one in ours] == [
        one | {"cosine": 0, "runner_up": 0} for one in theirs
    ]
    assert [one.get("cosine") for one in ours] == pytest.approx([one.get("cosine") for one in theirs], abs=1e-6)
    gone.write_text("r1\nr2\n")  # of other rows than those that were recovered
    settings = Settings(sample=2, num_steps=0, deleted=str(gone))
    audit(store, lambda: model, tmp_path / "some", settings)
    gone.write_text("r7\nr8\n")
    with pytest.raises(InputError, match="holds an audit of something else"):
        audit(store, lambda: model, tmp_path / "some", settings)


def test_the_command_and_its_status(
    model: InversionPipeline, trusted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model(tmp_path)
    e = model.embedder.embed(TEXTS)
    rows = ({"id": i, "embedding": e[i].tolist(), "text": text} for i, text in enumerate(TEXTS))
    (tmp_path / "store.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def status(*options: str) -> int:
        given = [str(tmp_path / "store.jsonl"), "--model", str(tmp_path / "tiny"), "--num-steps", "0", *options]
        return status_of("audit", *given)

    out = str(tmp_path / "out")
    assert status("--out", out, "--fail-above", "2") == 2
    assert status("--out", out, "--seed", "-1") == 2
    assert status("--out", out, "--fail-above", "0.9") == 0
    assert "12 of 12 records have text" in capsys.readouterr().out
    assert status("--out", out) == 2 and "holds a finished audit" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "is_sure", lambda _: True)
        assert status("--out", f"{out}2", "--fail-above", "0.9") == 1
    rows = ({"embedding": e[i].tolist(), "note": "half a smile \ud83d"} for i in range(len(TEXTS)))
    (tmp_path / "store.jsonl").write_text("\n".join(map(json.dumps, rows)))
    capsys.readouterr()
    assert status("--out", f"{out}3", "--fail-above", "0.9") == 2  # which can't be judged, and the report is there
    shown = capsys.readouterr()
    assert "12 of 12 records have text" in shown.out and "nothing to judge" in shown.err
    assert "h*** * s**** ?" in (tmp_path / "out3" / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_a_store_without_texts_by_the_packaged_model(tmp_path: Path) -> None:
    """The calibration says how many are exact, without a text to compare with."""
    from v2t_jax.embedders.load import load_embedder
    from v2t_jax.eval.evaluate import evaluation_texts

    packaged = pipeline.load()
    texts = evaluation_texts(packaged, limit=24)
    np.save(tmp_path / "v.npy", load_embedder("all-MiniLM-L6-v2").embed(texts))
    command = [sys.executable, "-c", "from v2t_jax.cli.main import main; main()", "audit", str(tmp_path / "v.npy")]
    done = subprocess.run([*command, "--budget", "600", "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "recovered.jsonl").read_text("utf-8").splitlines()]
    exact = sum(row["text"] == text for row, text in zip(rows, texts, strict=True))
    found = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert exact >= 4 and found["recovery"]["exact"] is None
    assert abs(found["recovery"]["sure"]["hits"] - exact) <= 2
    assert abs(found["recovery"]["expected_exact"] - exact) <= 2
