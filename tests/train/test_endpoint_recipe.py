"""A recipe whose embedder is behind an endpoint, from its texts to recovered ones, by the commands that people type."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.fake_endpoint import Endpoint, Reply, serve, status, vector
from tests.helpers.tiny_run import BERT, make_recipe
from v2t_jax.cli import main as cli
from v2t_jax.config import ApiConfig, Config, from_dict, to_dict
from v2t_jax.data.columns import open_column
from v2t_jax.data.dataset import TokenDataset
from v2t_jax.data.recipe import make_batches
from v2t_jax.embedders.base import JaxEmbedder
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.train.loop import train
from v2t_jax.train.setup import prepare
from v2t_jax.train.workdir import check_workdir

WIDTH = BERT.hidden_size
RECIPE = """
import json
from v2t_jax.config import Config, from_dict

def get_config():
    return from_dict(Config, json.loads({!r}), "config")
"""


class Served:
    """Answers with a real embedder's vectors while that may run: not beside the correction loop, which gets others."""

    def __init__(self, embedder: JaxEmbedder) -> None:
        self.embedder, self.may_run = embedder, True
        self.vectors: dict[str, list[float]] = {}

    def __call__(self, request: dict[str, Any]) -> Reply:
        texts = request["input"]
        if self.may_run:
            self.vectors |= dict(zip(texts, self.embedder.embed(texts).tolist(), strict=True))
        for text in texts:
            self.vectors.setdefault(text, vector(text, WIDTH))
        data = [{"index": i, "embedding": self.vectors[text]} for i, text in enumerate(texts)]
        return 200, {}, json.dumps({"data": data}).encode()


def v2t(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["v2t", *arguments])
        cli.main()


@dataclasses.dataclass
class Whole:
    """What the whole way leaves behind."""

    endpoint: Endpoint
    served: Served
    local: Config  # the same recipe, its embedder here
    inverter: Config
    corrector: Config
    data: str
    folder: Path
    asked: dict[str, int]  # texts, by what asked for them


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """Build, embed, train an inverter, hypotheses, train a corrector."""
    folder = tmp_path_factory.mktemp("endpoint")
    made = make_recipe(folder)
    data = str(folder / "data")
    stage = dataclasses.replace(made.inverter, num_steps=6)
    local = dataclasses.replace(
        made,
        stages=("inverter",),
        data=dataclasses.replace(made.data, sources=(data,), held_out=data, span_share=0.0),
        inverter=stage,
        corrector=dataclasses.replace(stage, num_steps=4),
        evaluation=dataclasses.replace(made.evaluation, num_steps=(0, 1), sequence_beam_width=(1,)),
        log_every_steps=1,
    )
    with pytest.MonkeyPatch.context() as patch, serve() as endpoint:
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            patch.delenv(name)
        endpoint.always = served = Served(load_embedder(local.embedder))
        api = ApiConfig(model="tiny", cache=str(folder / "cache"), backoff=0.01)
        options = ["--embedder", endpoint.url, "--api.model", "tiny", "--api.cache", str(folder / "cache")]
        asked = {}

        def count(name: str) -> None:
            asked[name] = endpoint.paid.total() - sum(asked.values())

        v2t("data", "build", *made.data.sources, "--output", data, "--embedder", local.embedder, "--processes", "1",
            "--held-out-share", "0.1")  # fmt: skip
        v2t("data", "embed", data, "--name", "vectors", "--max-length", "8", *options)
        count("embed")
        inverter = dataclasses.replace(
            local, embedder=endpoint.url, api=api, data=dataclasses.replace(local.data, embeddings="vectors")
        )
        (folder / "recipe.py").write_text(RECIPE.format(json.dumps(to_dict(inverter))))
        prepare(inverter)  # asks for the held-out texts
        served.may_run = False
        v2t("train", str(folder / "recipe.py"), "--workdir", str(folder / "inverter"))
        count("inverter")
        served.may_run = True
        model = str(folder / "inverter" / "model")
        v2t("data", "hypotheses", data, "--name", "guesses", "--embeddings", "vectors", "--model", model, *options)
        count("hypotheses")
        corrector = dataclasses.replace(
            inverter,
            stages=("corrector",),
            initial_inverter=model,
            data=dataclasses.replace(inverter.data, hypotheses="guesses"),
        )
        served.may_run = False
        train(corrector, folder / "corrector")
        count("corrector")
        yield Whole(endpoint, served, local, inverter, corrector, data, folder, asked)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_each_text_is_asked_for_once_and_none_by_a_step(done: Whole) -> None:
    stored = TokenDataset.open(Path(done.data))
    held_out = len(prepare(done.inverter).held_out)
    assert done.asked["embed"] == stored.manifest["counts"]["rows"] + 1  # the width, first
    assert held_out <= done.asked["inverter"] <= held_out + 2 * done.inverter.evaluation.num_examples
    assert done.asked["hypotheses"] > 0
    assert done.asked["corrector"] < 10 * done.corrector.evaluation.num_examples
    assert set(done.endpoint.paid.values()) == {1}


def test_training_is_that_of_an_embedder_that_runs_here(done: Whole, tmp_path: Path) -> None:
    """The columns' rounding to float16 is all the difference."""
    train(done.local, tmp_path)
    found, expected = losses(done.folder / "inverter" / "inverter"), losses(tmp_path / "inverter")
    assert len(found) == done.local.inverter.num_steps
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_batches_hold_what_the_endpoint_said_of_their_texts(done: Whole) -> None:
    setup = prepare(done.corrector)
    batches = make_batches(done.corrector, setup.datasets, 16, [*setup.columns.values()])
    for step in range(3):
        ids, read = batches(step), batches.columns(step)
        for rows, name in ((ids, "vectors"), (read["guesses"], "guesses.embedding")):
            texts = setup.vocabulary.decode(rows)
            expected = np.array([done.served.vectors[text] if text.strip() else np.zeros(WIDTH) for text in texts])
            np.testing.assert_allclose(read[name], expected, atol=1e-3)
    assert (read["guesses"][:, :1] > 1).any()


def test_the_corrector_learns_and_is_scored(done: Whole) -> None:
    found = losses(done.folder / "corrector" / "corrector")
    assert len(found) == done.corrector.corrector.num_steps and np.isfinite(found).all()
    last = json.loads((done.folder / "corrector" / "corrector" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["held_out_bleu"] <= 100
    assert len((done.folder / "corrector" / "corrector" / "samples.jsonl").read_text().splitlines()) == 4
    report = json.loads((done.folder / "corrector" / "evaluation.json").read_text())
    assert [row["num_steps"] for row in report["rows"]] == [0, 1]


def test_the_model_names_its_endpoint_and_is_used_with_it(done: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    model = done.folder / "corrector" / "model"
    record = json.loads((model / "config.json").read_text())
    assert record["embedder"] == {"name": f"tiny at {done.endpoint.url}", "weights_sha256": "", "width": 16}
    assert "tokenizer.json" in record["files"] and f"tiny at {done.endpoint.url}" in (model / "README.md").read_text()
    options = ["--embedder", done.endpoint.url, "--api.model", "tiny", "--api.cache", str(done.folder / "cache")]
    texts = prepare(done.inverter).held_out[:4]  # by others' vectors than the column's it would warn of them
    given = [argument for text in texts for argument in ("--text", text)]
    v2t("invert", "--model", str(model), *given, "--num-steps", "1", "--json", *options)
    found = json.loads(capsys.readouterr().out)
    assert [one["reference"] for one in found] == texts and {len(one["trace"]) for one in found} == {2}
    with pytest.raises(SystemExit):
        v2t("invert", "--model", str(model), "--text", "the red dog")
    assert "whose weights aren't known: pass that embedder" in capsys.readouterr().err


def test_a_run_goes_on_with_other_limits_but_no_other_embedder(done: Whole) -> None:
    workdir = done.folder / "inverter"
    check_workdir(dataclasses.replace(done.inverter, api=dataclasses.replace(done.inverter.api, retries=1)), workdir)
    other = dataclasses.replace(done.inverter, api=dataclasses.replace(done.inverter.api, model="other"))
    with pytest.raises(InputError, match="holds a run of another config, with api.model='tiny', not 'other'"):
        check_workdir(other, workdir)
    with pytest.raises(InputError, match="The column vectors was made with an embedder whose name is 'tiny at http"):
        prepare(other)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"data": {"embeddings": ""}}, "isn't asked while training: make the texts' vectors with 'v2t data embed'"),
    ({"data": {"hypotheses": ""}}, "make the corrector's hypotheses and their vectors with 'v2t data hypotheses'"),
    ({"data": {"span_share": 0.5}}, "vectors belongs to whole texts, not to spans: set data.span_share to 0"),
    ({"partial_hypotheses": True, "data": {"hypotheses": ""}}, "with 'v2t data hypotheses'"),
    ({"partial_hypotheses": True}, "partial_hypotheses and edited_hypotheses are made on the fly"),
    ({"initial_embedding": "embedder"}, "initial_embedding=embedder needs the tokenizer and the weights of"),
    ({"embedder": "all-MiniLM-L6-v2"}, "api is for an embedder behind an endpoint"),
    ({"api": {"model": ""}}, "No model is named for http.*: set api.model"),
    ({"api": {"model": "tiny", "cache": 5}}, "api.cache is 5; it must be a string or None"),
    ({"data": {"embeddings": "guesses"}}, "The column guesses holds hypotheses, not embeddings"),
    ({"data": {"embeddings": "none"}}, "columns/none/manifest.json is missing"),
    ({"data": {"sources": ("wordnet",), "held_out": "wordnet"}}, "need a built data set in data.sources"),
    ({"model": {"max_length": 7}}, "was made for texts of 8 tokens, not 7"),
    ({"initial_inverter": "minilm-wordnet"}, "minilm-wordnet writes another vocabulary than this recipe's texts"),
]


@pytest.mark.parametrize(
    ("changes", "message"), CHANGES, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_what_an_endpoint_cannot_give_is_refused(
    done: Whole, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    asked = len(done.endpoint.requests)
    values = json.loads(json.dumps(to_dict(done.corrector)))
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    with pytest.raises(InputError, match=message):
        train(from_dict(Config, values), tmp_path)
    assert len(done.endpoint.requests) == asked


def test_an_endpoint_that_refuses_ends_the_run_before_it_begins(done: Whole, tmp_path: Path) -> None:
    api = dataclasses.replace(done.inverter.api, cache=str(tmp_path / "cache"))
    done.endpoint.then(status(401, "no such key"))
    with pytest.raises(InputError, match="refused .status 401: no such key"):
        train(dataclasses.replace(done.inverter, api=api), tmp_path / "run")
    assert not (tmp_path / "run" / "inputs.json").exists()


def test_a_killed_embed_goes_on_and_asks_for_nothing_twice(done: Whole, tmp_path: Path) -> None:
    held, go_on = threading.Event(), threading.Event()
    answer, before = done.endpoint.always, done.endpoint.paid.copy()

    def hold_the_sixth(request: dict[str, Any]) -> Reply | None:
        if done.endpoint.paid.total() - before.total() < 5 * 16:
            return None if answer is None else answer(request)
        held.set()
        go_on.wait(60)
        return 500, {}, b"{}"

    command = ["data", "embed", done.data, "--name", "again", "--max-length", "8", "--batch-size", "16"]
    command += ["--embedder", done.endpoint.url, "--api.model", "again", "--api.cache", str(tmp_path)]
    command += ["--api.concurrency", "1"]
    done.endpoint.always = hold_the_sixth
    try:
        code = "from v2t_jax.cli.main import main; main()"
        with subprocess.Popen([sys.executable, "-c", code, *command], stderr=subprocess.DEVNULL) as process:
            assert held.wait(60)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    finally:
        go_on.set()
        done.endpoint.always = answer
    v2t(*command)
    paid = done.endpoint.paid - before
    assert set(paid.values()) == {1} and len(paid) == done.asked["embed"]
    stored = TokenDataset.open(Path(done.data))
    np.testing.assert_array_equal(open_column(stored, "again").values, open_column(stored, "vectors").values)


@pytest.mark.slow
@pytest.mark.multihost
def test_two_processes_ask_for_each_text_once(done: Whole, tmp_path: Path) -> None:
    """Each with a cache of its own, as hosts have: held-out texts and hypotheses are all requested by process 0."""
    recipe = dataclasses.replace(done.inverter, api=ApiConfig(model="tiny", backoff=0.01))
    (tmp_path / "recipe.py").write_text(RECIPE.format(json.dumps(to_dict(recipe))))
    code = "import os, sys; os.environ['XDG_CACHE_HOME'] = sys.argv.pop() + os.environ['V2T_PROCESS_ID']; "
    code += "from v2t_jax.cli.main import main; main()"
    command = [sys.executable, "launch/local.py", "--processes", "2", "--devices", "2", "--"]
    command += [
        sys.executable,
        "-c",
        code,
        "train",
        str(tmp_path / "recipe.py"),
        "--workdir",
        str(tmp_path / "run"),
        str(tmp_path / "cache"),
    ]
    before = done.endpoint.paid.copy()
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr
    paid = done.endpoint.paid - before
    assert set(paid.values()) == {1} and len(paid) >= len(prepare(done.inverter).held_out)
    assert not list(tmp_path.glob("cache1/**/*.sqlite"))
    assert (tmp_path / "run" / "evaluation.json").is_file()
