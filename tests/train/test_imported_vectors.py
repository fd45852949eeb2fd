"""A column of vectors that somebody else has made: found by text, by row or by id, checked, and trained on."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.helpers.tiny_run import make_embedder, make_recipe, make_texts
from v2t_jax.cli import main as cli
from v2t_jax.config import ApiConfig, BuildSettings, Config
from v2t_jax.data import columns
from v2t_jax.data import vectors as vector_files
from v2t_jax.data.build import build
from v2t_jax.data.columns import Column, ColumnWriter, open_column
from v2t_jax.data.dataset import TokenDataset
from v2t_jax.data.recipe import make_batches
from v2t_jax.embedders.base import JaxEmbedder
from v2t_jax.embedders.black_box import HttpEmbedder
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.train import precompute
from v2t_jax.train.precompute import check_column, import_column
from v2t_jax.train.setup import prepare

LENGTH = 8
# The last four have two by two the same ids. The data set keeps one of the first pair, and both of the second.
TEXTS = [*make_texts(700), "the cat", "The  Cat", "the dog", "thé dog"]


@dataclasses.dataclass
class Files:
    """What people bring."""

    folder: Path
    recipe: Config
    embedder: JaxEmbedder
    vectors: np.ndarray  # of TEXTS

    def jsonl(self, name: str, rows: list[int], **fields: Callable[[int], Any]) -> str:
        lines = [json.dumps({field: value(i) for field, value in fields.items()}) for i in rows]
        (self.folder / name).write_text("\n".join(lines) + "\n")
        return str(self.folder / name)

    def npy(self, name: str, vectors: np.ndarray) -> str:
        np.save(self.folder / name, vectors)
        return str(self.folder / name)

    def parquet(self, name: str, rows: list[int], **more: list[Any]) -> str:
        table = {"embedding": [*self.vectors[rows]], "text": [TEXTS[i] for i in rows]}
        parquet.write_table(pyarrow.table(table | more), self.folder / name)
        return str(self.folder / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("imported")
    made = make_recipe(folder)
    (folder / "source.txt").write_text("\n".join(TEXTS) + "\n")
    embedder, data = load_embedder(made.embedder), str(folder / "data")
    settings = BuildSettings(held_out_share=0.1)
    build([str(folder / "source.txt")], Path(data), embedder.tokenizer, settings)
    options = dataclasses.replace(made.data, sources=(data,), held_out=data, span_share=0.0, embeddings="mine")
    # Not the embedder's own to the last bit: what is read can't have been computed.
    vectors = embedder.embed(TEXTS) + np.random.default_rng(0).normal(0, 0.01, (len(TEXTS), 16)).astype(np.float32)
    return Files(folder, dataclasses.replace(made, data=options), embedder, vectors)


@pytest.fixture
def stored(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenDataset:
    monkeypatch.setattr(columns, "PIECE_ROWS", 64)
    return TokenDataset.open(shutil.copytree(files.folder / "data", tmp_path / "data"))


def texts_of(stored: TokenDataset) -> list[str]:
    return stored.vocabulary().decode(stored.padded(slice(0, len(stored)), 16))


def expected(files: Files, stored: TokenDataset) -> np.ndarray:
    """The first vector of each text."""
    first: dict[str, int] = {}
    for i, text in enumerate(TEXTS):
        first.setdefault(" ".join(text.lower().replace("é", "e").split()), i)
    return files.vectors[[first[text] for text in texts_of(stored)]].astype(np.float16)


def shuffled(count: int = len(TEXTS)) -> list[int]:
    """All rows in another order, but for the last four."""
    return [*np.random.default_rng(1).permutation(count - 4).tolist(), *range(count - 4, count)]


def side_by_side(files: Files) -> tuple[str, None]:
    return files.parquet("pairs.parquet", [*shuffled(), 3, 5]), None


def row_by_row(files: Files) -> tuple[str, str]:
    return files.npy("rows.npy", files.vectors), str(files.folder / "source.txt")


def ids_in_one_file_only(files: Files) -> tuple[str, str]:
    rows = [*range(len(TEXTS))]
    return files.npy("rows.npy", files.vectors), files.jsonl("texts.jsonl", rows, _id=str, text=TEXTS.__getitem__)


def by_id(files: Files) -> tuple[str, str]:
    ids, rows = (lambda i: 7 * i), [*range(len(TEXTS))]
    texts = files.jsonl("with_ids.jsonl", rows, _id=lambda i: str(ids(i)), text=TEXTS.__getitem__)
    others = [*shuffled()[::-1][:-50], *shuffled()[:50]]
    vectors = files.jsonl("vectors.jsonl", others, id=ids, v=lambda i: files.vectors[i].tolist())
    return f"{vectors}:v", texts


WAYS = [side_by_side, row_by_row, ids_in_one_file_only, by_id]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_texts_get_their_own_vectors(files: Files, stored: TokenDataset, way: Callable[[Files], Any]) -> None:
    vectors, texts = way(files)
    others = import_column(stored, "mine", vectors, files.embedder, max_length=LENGTH, texts=texts)
    np.testing.assert_array_equal(open_column(stored, "mine").values, expected(files, stored))
    assert others == len(TEXTS) + 2 * (way is side_by_side) - len(set(texts_of(stored)))
    assert [texts_of(stored).count(text) for text in ("the cat", "the dog")] == [1, 2]
    assert not list(stored.folder.glob("columns/mine/done"))


def test_the_command_and_the_recipe_that_reads_its_column(
    files: Files, stored: TokenDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors, texts = by_id(files)
    data, embedder = str(stored.folder), files.recipe.embedder
    options = dataclasses.replace(files.recipe.data, sources=(data,), held_out=data)
    recipe = dataclasses.replace(files.recipe, data=options)
    command = ["v2t", "data", "import", data, vectors, "--texts", texts, "--name", "mine", "--embedder", embedder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command, "--max-length", str(LENGTH)])
        cli.main()
        said = capsys.readouterr().out
        assert 'DataConfig(..., embeddings="mine")' in said and "are of no text in" in said
        cli.main()  # of a finished column it checks that it is the same
    for dtype in ("float32", "bfloat16"):  # what theirs was isn't known
        context = prepare(dataclasses.replace(recipe, embedder_dtype=dtype))
    values = expected(files, stored)
    rows = {tuple(row): i for i, row in enumerate(stored.padded(slice(0, len(stored)), LENGTH).tolist())}
    batches = make_batches(recipe, context.datasets, 16, [*context.columns.values()])
    for step in range(3):
        ids, read = batches(step), batches.columns(step)["mine"]
        full = [(*row, *[0] * (LENGTH - len(row))) for row in ids.tolist()]
        np.testing.assert_array_equal(read, values[[rows[row] for row in full]])


def test_an_embedder_behind_an_endpoint_is_named_and_not_asked(files: Files, stored: TokenDataset) -> None:
    endpoint = HttpEmbedder("http://127.0.0.1:9/v1", ApiConfig(model="tiny"))
    import_column(stored, "mine", side_by_side(files)[0], endpoint, max_length=LENGTH)
    column: Column = open_column(stored, "mine")
    check_column(column, "embeddings", HttpEmbedder("http://127.0.0.1:9/v1", ApiConfig(model="tiny"), 16), LENGTH)
    with pytest.raises(InputError, match="was made with an embedder whose name is 'tiny at"):
        check_column(column, "embeddings", files.embedder, LENGTH)
    with pytest.raises(InputError, match="was made for texts of 8 tokens, not 9"):
        check_column(column, "embeddings", endpoint, LENGTH + 1)


@pytest.mark.parametrize("way", [side_by_side, by_id], ids=lambda way: way.__name__)
def test_a_killed_import_goes_on_where_it_was(
    files: Files, stored: TokenDataset, monkeypatch: pytest.MonkeyPatch, way: Callable[[Files], Any]
) -> None:
    vectors, texts = way(files)
    starts: list[int] = []
    read, written = vector_files.VectorFile.batches, list[int]()

    class Stopping(ColumnWriter):
        def write(self, piece: int, values: np.ndarray, rows: np.ndarray | None = None) -> None:
            if piece == 4 and 4 not in written:
                super().write(piece, values / 2, rows)  # half a piece
                (self._done / f"{piece:06d}").unlink()
                written.append(4)
                raise KeyboardInterrupt
            written.append(piece)
            super().write(piece, values, rows)

    def batches(self: Any, size: int, start: int = 0) -> Iterator[vector_files.Rows]:
        starts.append(start)
        return read(self, size, start)

    monkeypatch.setattr(precompute, "ColumnWriter", Stopping)
    monkeypatch.setattr(vector_files.VectorFile, "batches", batches)
    again = lambda: import_column(stored, "mine", vectors, files.embedder, max_length=LENGTH, texts=texts)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        again()
    with pytest.raises(InputError, match="was never finished"):
        open_column(stored, "mine")
    again()
    assert starts[-1] == 4 * columns.PIECE_ROWS and sorted(set(written)) == [*range(written[-1] + 1)]
    assert len(written) == written[-1] + 2
    np.testing.assert_array_equal(open_column(stored, "mine").values, expected(files, stored))
    other = files.npy("other.npy", files.vectors * 2)
    with pytest.raises(InputError, match="is being made of something else .it differs in made_by"):
        import_column(stored, "mine", other, files.embedder, max_length=LENGTH, texts=str(files.folder / "source.txt"))


def refusals(files: Files, stored: TokenDataset) -> Iterator[tuple[str, str | None, str]]:
    source, every = str(files.folder / "source.txt"), [*range(len(TEXTS))]
    kept = TEXTS.index(next(text for text in TEXTS if text in texts_of(stored)[:20]))
    without = [i for i in every if TEXTS[i] not in texts_of(stored)[:3]]
    lacking = f"lacks 3 of {len(stored)} texts of .*, such as {texts_of(stored)[0]!r}: give a file with all"
    yield files.parquet("without.parquet", without), None, "without.parquet " + lacking
    few = files.jsonl("few.jsonl", without, id=int, text=TEXTS.__getitem__)
    yield files.parquet("all.parquet", every, id=every), few, "few.jsonl " + lacking
    yield (
        files.parquet("few.parquet", without, id=without),
        files.jsonl("all.jsonl", every, id=int, text=TEXTS.__getitem__),
        "few.parquet, by the ids of .*all.jsonl, " + lacking,
    )
    yield (
        files.npy("plain.npy", files.vectors),
        None,
        "no texts beside its vectors: name their source, texts=SOURCE",
    )
    yield files.npy("less.npy", files.vectors[:-1]), source, r"holds 7\d\d texts, but .* 7\d\d vectors: give a text for"
    yield (
        files.npy("more.npy", np.append(files.vectors, files.vectors)[: 16 * 720].reshape(720, 16)),
        source,
        "720 vect",
    )
    yield files.npy("none.npy", files.vectors[:0]), source, "none.npy holds no vectors"
    yield files.npy("int8.npy", (files.vectors * 127).astype(np.int8)), source, "holds int8 numbers, as quantized vect"
    yield files.npy("wide.npy", np.tile(files.vectors, 2)), source, "wide.npy are 32 wide, but the embedder's 16"
    for value in (np.nan, np.inf, 1e6, 0.0, 1e-9):
        bad = files.vectors.copy()
        bad[kept] = value
        yield files.npy(f"{value}.npy", bad), source, f"Vector {kept + 1} of .* is zero, or holds NaN or numbers beyond"
    wide = [[*vector] * (1 + (i >= 640)) for i, vector in enumerate(files.vectors.tolist())]
    changing = files.jsonl("changing.jsonl", every, text=TEXTS.__getitem__, embedding=wide.__getitem__)
    yield changing, None, "Row 641 of .* has 32 numbers, but others have 16"
    twice = files.parquet("twice.parquet", [*every, 4], id=[*every, 4])
    yield twice, str(files.folder / "all.jsonl"), "twice.parquet has several vectors of one id: give each id once"
    one_id = files.jsonl("one_id.jsonl", every, id=lambda i: i % 600, text=TEXTS.__getitem__)
    yield files.parquet("all.parquet", every, id=every), one_id, "Two texts of .* have the same id, '.*' and '.*': give"
    odd = files.jsonl("odd.jsonl", every, text=lambda i: i, embedding=lambda i: files.vectors[i].tolist())
    yield odd, None, "odd.jsonl holds int where text was expected"


def test_what_does_not_go_together_is_refused_before_anything_is_written(files: Files, stored: TokenDataset) -> None:
    for vectors, texts, message in refusals(files, stored):
        with pytest.raises(InputError, match=message):
            import_column(stored, "mine", vectors, files.embedder, max_length=LENGTH, texts=texts)
        assert not (stored.folder / "columns").exists(), vectors


def test_a_bad_vector_of_a_text_that_training_never_sees_does_no_harm(files: Files, stored: TokenDataset) -> None:
    bad, held_out = files.vectors.copy(), set(stored.held_out())
    bad[[i for i, text in enumerate(TEXTS) if text in held_out]] = 0
    vectors, texts = files.npy("held_out.npy", bad), str(files.folder / "source.txt")
    import_column(stored, "mine", vectors, files.embedder, max_length=LENGTH, texts=texts)
    np.testing.assert_array_equal(open_column(stored, "mine").values, expected(files, stored))


def test_vectors_of_another_embedder_are_warned_of(files: Files, stored: TokenDataset, tmp_path: Path) -> None:
    other = load_embedder(str(make_embedder(tmp_path / "other", seed=9)))
    vectors = files.npy("others.npy", other.embed(TEXTS))
    with pytest.warns(UserWarning, match=r"others.npy hardly come from .* .cosine -?0\.\d+ to its own"):
        import_column(
            stored, "mine", vectors, files.embedder, max_length=LENGTH, texts=str(files.folder / "source.txt")
        )


def test_longer_texts_are_told_of(files: Files, stored: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(precompute.progress, "note", said.append)
    import_column(stored, "mine", side_by_side(files)[0], files.embedder, max_length=5)
    longer = sum(len(text.split()) >= 5 for text in texts_of(stored))
    assert said[0].startswith(f"{longer} of {len(stored)} texts have more than 4 tokens")
