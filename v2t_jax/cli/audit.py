"""The command audit. The comment or docstring at an option is its help text."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from v2t_jax.cli.invert import PACKAGED_MODEL, open_embedder
from v2t_jax.config import ApiConfig
from v2t_jax.errors import InputError, check_whole


@dataclass(frozen=True)
class Audit:
    """Find out what a vector store gives away: what lies in clear, and what its embeddings alone tell.

    STORE is a file of vectors, a FAISS index, a SQLite or DuckDB file, a folder of Chroma, Qdrant, LanceDB or Milvus
    Lite, a Qdrant server's URL, or postgresql://... Writes report.html, report.json and findings.sarif; stopped, it
    goes on when it is called again. Exits with 1 above --fail-above."""

    store: tyro.conf.Positional[str]
    out: str  # folder for the report
    collection: str = ""  # of several in the store; NAME, or NAME:FIELD
    model: str = PACKAGED_MODEL  # name of a packaged model, or a model folder
    embedder: str | None = None  # the model's embedder, if it has moved: a folder, or an endpoint's base URL
    sample: int = 1000  # records to audit, drawn at random
    seed: int = 0  # of the sample
    budget: int = 2000  # calls of the embedder for a text
    num_steps: int | None = None  # correction steps, by default as for v2t invert
    text: str | None = None  # field of the texts beside the vectors, if it isn't found
    candidates: str | None = None  # file of texts, one per line, that may be in the store: the attack by comparison
    deleted: str | None = None  # file of ids or sources, one per line, that were deleted: what is left of them
    show_text: bool = False  # show texts in the report, not only their first letters
    fail_above: float | None = None  # exit with 1 if a larger share of the sample is recovered exactly, such as 0.05
    api: ApiConfig = ApiConfig()

    def run(self) -> None:
        from v2t_jax.audit import report, run
        from v2t_jax.data.dataset import resumable
        from v2t_jax.inversion.pipeline import load
        from v2t_jax.stores import open_store

        check_whole("sample", self.sample, 1)
        check_whole("seed", self.seed, 0)
        if self.fail_above is not None and not 0 <= self.fail_above <= 1:
            raise InputError(f"fail_above is {self.fail_above}; give a share from 0 to 1, such as 0.05.")
        folder = Path(self.out)
        if (folder / "report.json").exists():
            raise InputError(f"{folder} holds a finished audit; give another --out, or delete it.")
        if folder.exists() and not os.access(folder, os.W_OK):
            raise InputError(f"The folder {self.out!r} can't be written to; give another --out.")
        store = open_store(self.store, self.collection)
        names = ("sample", "seed", "budget", "num_steps", "text", "candidates", "deleted")
        settings = run.Settings(**{name: getattr(self, name) for name in names})
        with resumable(f"The audit of {store.rows.path}", folder):
            found = run.audit(store, lambda: load(self.model, open_embedder(self.embedder, self.api)), folder, settings)
            report.write(found, folder, self.show_text)
        recovered, clear = found["recovery"], found["in_clear"]
        print(f"in clear: {clear['rows']:,} of {clear['n']:,} records have text or metadata beside the vector")
        if (sure := recovered["sure"]) is not None:
            print(
                f"recovered exactly{'' if recovered['known'] == recovered['n'] else ', probably'}: {report.share(sure)}"
            )
        print(f"The report is {shlex.quote(str(folder / 'report.html'))}")
        if self.fail_above is None:
            return
        if sure is None:
            why = "compressed" if store.approximate else "no text is known, and the model isn't calibrated"
            raise InputError(f"--fail-above has nothing to judge: the share of exact texts can't be told ({why}).")
        if sure["share"] > self.fail_above:
            raise SystemExit(1)
