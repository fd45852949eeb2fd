"""Embeddings and guesses as columns of a built data set: what they hold, and that a kill costs a piece at most."""

import dataclasses
import functools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.helpers.plain_folder import plain
from tests.helpers.tiny_model import MAX_LENGTH, make_model
from tests.helpers.tiny_run import make_texts, make_tokenizer
from v2t_jax import load
from v2t_jax.config import BuildSettings
from v2t_jax.data import columns
from v2t_jax.data.build import build
from v2t_jax.data.columns import ColumnWriter, open_column
from v2t_jax.data.dataset import BLOCK_ROWS, TokenDataset
from v2t_jax.embedders.base import JaxEmbedder
from v2t_jax.embedders.black_box import CallableEmbedder
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.parallel.processes import Share
from v2t_jax.train import precompute
from v2t_jax.train.precompute import check_column, embed_column, hypothesis_columns
from v2t_jax.train.step import greedy_hypotheses


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of several pieces, and two models that share its vocabulary."""
    root = tmp_path_factory.mktemp("columns")
    (root / "texts.txt").write_text("\n".join(make_texts(2500)) + "\n")
    model = load(str(make_model(root)))
    other = {**model.params["inverter"], "projection": model.params["corrector"]["projection_target"]}
    for fold, inverter in enumerate([model.params["inverter"], other]):
        data = {"folds": 2, "fold": fold}
        half = dataclasses.replace(model, params={"inverter": inverter})
        half.save(root / f"fold{fold}", record={"recipe": {"data": data}})
    build([str(root / "texts.txt")], root / "data", model.vocabulary.tokenizer, BuildSettings(held_out_share=0.05))
    return root


@pytest.fixture
def stored(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenDataset:
    monkeypatch.setattr(columns, "PIECE_ROWS", 200)
    return TokenDataset.open(shutil.copytree(root / "data", tmp_path / "data"))


@pytest.fixture(scope="module")
def model(root: Path) -> InversionPipeline:
    return load(str(root / "tiny"))


def all_ids(stored: TokenDataset, length: int) -> np.ndarray:
    return stored.padded(slice(0, len(stored)), length)


def all_rows(stored: TokenDataset, name: str) -> np.ndarray:
    return open_column(stored, name).values


def files(stored: TokenDataset) -> dict[str, bytes]:
    folder = stored.folder / "columns"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_embeddings_are_those_of_the_texts_beginnings(stored: TokenDataset, model: InversionPipeline) -> None:
    assert len(stored) > 5 * columns.PIECE_ROWS
    settings = {"max_length": 6, "batch_size": 100}
    assert embed_column(stored, "by-ids", model.embedder, **settings)
    texts = model.vocabulary.decode(all_ids(stored, 6))
    expected = model.embedder.embed(texts)
    np.testing.assert_allclose(all_rows(stored, "by-ids"), expected, atol=1e-3)
    asked: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return model.embedder.embed(texts)

    assert embed_column(stored, "by-text", CallableEmbedder(embed, "box"), **settings)
    np.testing.assert_allclose(all_rows(stored, "by-text"), expected, atol=1e-3)
    assert set(texts) <= set(asked)


@pytest.mark.parametrize("embeddings", [None, "mine"])
def test_guesses_out_of_fold(
    stored: TokenDataset, root: Path, model: InversionPipeline, embeddings: str | None
) -> None:
    if embeddings:
        embed_column(stored, "mine", model.embedder, max_length=MAX_LENGTH)
    models = [str(root / f"fold{fold}") for fold in range(2)]
    assert hypothesis_columns(stored, "guesses", models, embeddings=embeddings)
    guesses, vectors = all_rows(stored, "guesses"), all_rows(stored, "guesses.embedding")
    ids = all_ids(stored, MAX_LENGTH)
    e = model.embedder.embed(model.vocabulary.decode(ids))
    folds = np.arange(len(stored)) // BLOCK_ROWS % 2  # a block is in one fold
    for fold, name in enumerate(models):
        own = load(name)
        expected = np.asarray(greedy_hypotheses(own.config, own.params["inverter"], jnp.asarray(e[folds == fold])))
        same = (guesses[folds == fold] == expected).all(axis=1)
        # Embeddings by ids and by text differ by rounding, which may turn a near tie between two tokens.
        assert same.mean() > 0.99
        assert not (guesses[folds != fold][: len(same)] == expected[: (folds != fold).sum()]).all()
    full = [i for i, text in enumerate(model.vocabulary.decode(guesses)) if text.strip()]
    spelt = [text for text in model.vocabulary.decode(guesses) if text.strip()]
    again = all_ids(TokenDataset.from_texts(spelt, model.vocabulary), MAX_LENGTH)
    canonical = (again == guesses[full]).all(axis=1)  # a guess can be spelt otherwise than its text would be
    np.testing.assert_allclose(
        vectors[full][canonical],
        model.embedder.embed([t for t, ok in zip(spelt, canonical, strict=True) if ok]),
        atol=2e-3,
    )


def test_hosts_share_the_work_and_the_bytes_are_the_same(stored: TokenDataset, root: Path, tmp_path: Path) -> None:
    models = [str(root / f"fold{fold}") for fold in range(2)]
    together = TokenDataset.open(shutil.copytree(stored.folder, tmp_path / "together"))
    hypothesis_columns(stored, "guesses", models, batch_size=64)
    done = [hypothesis_columns(together, "guesses", models, batch_size=64, share=Share(i, 3)) for i in (2, 0, 1)]
    assert done == [False, False, True]
    assert files(together) == files(stored)
    assert not [name for name in files(stored) if "done" in name]


def test_an_interruption_costs_the_piece_in_hand(
    stored: TokenDataset, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [str(root / "tiny")]
    whole = TokenDataset.open(shutil.copytree(stored.folder, tmp_path / "whole"))
    hypothesis_columns(whole, "guesses", models)
    pieces: list[int] = []

    class Stopping(ColumnWriter):
        def write(self, piece: int, values: np.ndarray) -> None:
            pieces.append(piece)
            if len(pieces) % 5 == 0:
                raise KeyboardInterrupt
            super().write(piece, values)

    monkeypatch.setattr(precompute, "ColumnWriter", Stopping)
    interruptions = 0
    while True:
        try:
            hypothesis_columns(stored, "guesses", models)
            break
        except KeyboardInterrupt:
            interruptions += 1
    # Both columns of each piece were made once, and once or twice more for each interruption.
    total = 2 * -(-len(stored) // columns.PIECE_ROWS)
    assert total + interruptions <= len(pieces) <= total + 2 * interruptions and interruptions > 1
    assert files(stored) == files(whole)


SLOWLY = """
import sys, time
from pathlib import Path
from v2t_jax.parallel.compile_cache import enable_compilation_cache
from v2t_jax.data import columns
from v2t_jax.data.dataset import TokenDataset
from v2t_jax.train import precompute

class Slow(columns.ColumnWriter):
    def write(self, piece, values):
        time.sleep(0.3)  # so that there are moments to be killed at
        super().write(piece, values)

enable_compilation_cache()
columns.PIECE_ROWS, precompute.ColumnWriter = 200, Slow
precompute.hypothesis_columns(TokenDataset.open(Path(sys.argv[1])), "guesses", sys.argv[2:])
"""


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_nothing(stored: TokenDataset, root: Path, tmp_path: Path) -> None:
    models = [str(root / f"fold{fold}") for fold in range(2)]
    whole = TokenDataset.open(shutil.copytree(stored.folder, tmp_path / "whole"))
    hypothesis_columns(whole, "guesses", models)
    command = [sys.executable, "-c", SLOWLY, str(stored.folder), *models]
    folder, rng, kills = stored.folder / "columns", random.Random(0), 0
    finished = folder / "guesses.embedding" / "manifest.json"
    while kills < 30 and not (finished.is_file() and json.loads(finished.read_text())["file"]):
        before = set(folder.rglob("*"))
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and set(folder.rglob("*")) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.8))  # something is being written, or was just now
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        kills += process.wait() != 0
    subprocess.run(command, check=True)
    assert kills > 3
    np.testing.assert_array_equal(all_rows(stored, "guesses"), all_rows(whole, "guesses"))
    assert sorted(files(stored)) == sorted(files(whole))


def test_what_does_not_go_together(stored: TokenDataset, root: Path, model: InversionPipeline, tmp_path: Path) -> None:
    folds = [str(root / f"fold{fold}") for fold in range(2)]
    embed_column(stored, "short", model.embedder, max_length=4)
    refused = functools.partial(pytest.raises, InputError)
    with refused(match="is being made of something else .it differs in made_by"):
        embed_column(stored, "short", model.embedder, max_length=5)
    with refused(match="max_length is 40, but .* reads texts of 31 at most"):
        embed_column(stored, "long", model.embedder, max_length=40)
    with refused(match="max_length is 1; give at least 2"):
        embed_column(stored, "long", model.embedder, max_length=1)
    with refused(match="batch_size is 0"):
        embed_column(stored, "long", model.embedder, max_length=8, batch_size=0)
    with refused(match="There is no host 2 of 2"):
        Share(2, 2)
    with refused(match="was trained without fold 1 of 2 and is model 0 of 2 here"):
        hypothesis_columns(stored, "guesses", folds[::-1])
    with refused(match="was trained without fold 0 of 2 and is model 0 of 1 here"):
        hypothesis_columns(stored, "guesses", folds[:1])
    with refused(match="tiny was trained on all texts and is model 0 of 2 here"):
        hypothesis_columns(stored, "guesses", [str(root / "tiny")] * 2)
    with refused(match="The column short was made for texts of 4 tokens, not 8"):
        hypothesis_columns(stored, "guesses", [str(root / "tiny")], embeddings="short")
    with refused(match="manifest.json is missing"):
        hypothesis_columns(stored, "guesses", [str(root / "tiny")], embeddings="none")


@pytest.mark.parametrize(("name", "end"), [("qwen3", "<|endoftext|>"), ("mistral", ""), ("clip", "<|endoftext|>")])
def test_embedders_whose_tokenizers_have_no_pad_and_end_pair(
    stored: TokenDataset, model: InversionPipeline, tmp_path: Path, name: str, end: str
) -> None:
    tokenizer = json.loads(make_tokenizer().to_str().replace("[PAD]", "<|pad|>").replace("[SEP]", end or "<|none|>"))
    if not end:  # Llama's kind puts a token before a text and none after it
        tokenizer["post_processor"]["single"].pop()
    embedder = load_embedder(f"last@{plain(tmp_path / name, name, Tokenizer.from_str(json.dumps(tokenizer)))}")
    assert embed_column(stored, name, embedder, max_length=6)
    texts = model.vocabulary.decode(all_ids(stored, 6))
    np.testing.assert_allclose(all_rows(stored, name), embedder.embed(texts), atol=2e-2, rtol=1e-3)


def test_a_column_names_what_differs_of_its_embedder(stored: TokenDataset, model: InversionPipeline) -> None:
    assert isinstance(model.embedder, JaxEmbedder)
    settings = {"max_length": 4}
    embed_column(stored, "vectors", model.embedder, **settings)
    column = open_column(stored, "vectors")
    check_column(column, "embeddings", dataclasses.replace(model.embedder, name="moved"), **settings)
    for field, value in (("pooling", "cls"), ("normalize", False), ("prefix", "the "), ("dense", ("tanh",))):
        config = dataclasses.replace(model.embedder.config, **{field: value})
        with pytest.raises(InputError, match=f"The column vectors was made with an embedder whose {field} is"):
            check_column(column, "embeddings", dataclasses.replace(model.embedder, config=config), **settings)
