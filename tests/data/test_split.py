"""Reading, splitting and refusing bad input."""

import gzip
import json
import sys

import numpy as np
import pytest

from v2t_jax.data.readers import WORDNET
from v2t_jax.data.split import HeldOutFilter, is_held_out, normalize_for_split, read_texts, unique
from v2t_jax.errors import InputError

SENTENCES = [f"Sentence number {i} speaks of thing {i * 7}, and of nothing else." for i in range(400)]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(SENTENCES), encoding="utf-8")
    return path


def test_packaged_split_is_fixed_and_never_leaks():
    train, held_out = read_texts("wordnet", "train"), read_texts("wordnet", "held_out")
    assert len(train) > 140_000 and 0.015 < len(held_out) / len(train) < 0.025
    assert all(is_held_out(normalize_for_split(text)) for text in held_out[:100])
    sample = [normalize_for_split(text) for text in train]
    assert not HeldOutFilter([normalize_for_split(text) for text in held_out]).leaking(sample).any()
    assert "a former copper coin of Pakistan and India" in train


def test_packaged_file_is_small_and_free_of_build_time():
    data = WORDNET.read_bytes()
    assert len(data) < 3_000_000 and data[4:8] == bytes(4)
    assert (WORDNET.parent / "WORDNET-NOTICE.txt").read_text().count("Princeton University") >= 3


def test_splits_are_disjoint_exhaustive_and_independent_of_order(text_file):
    train = read_texts(str(text_file), "train", held_out_share=0.25)
    held_out = read_texts(str(text_file), "held_out", held_out_share=0.25)
    assert not set(train) & set(held_out) and set(train) | set(held_out) == set(SENTENCES)
    assert 60 < len(held_out) < 140
    text_file.write_text("\n".join(reversed(SENTENCES[:200])))
    again = read_texts(str(text_file), "held_out", held_out_share=0.25)
    assert set(again) == set(held_out) & set(SENTENCES[:200])


def test_duplicates_differ_in_letters_only():
    assert unique(["A b.", "a  B!", "?!", "c"]) == {"a b": "A b.", "c": "c"}


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("one two three four five six seven eight nine", True),  # equal
        ("zero two three four five six seven eight nine ten", True),  # eight words in a row
        ("zero two three four five six seven eight zero", False),  # seven in a row
        ("three four five", True),  # contained
        ("they say red green blue always", True),  # contains
        ("red green is blue", False),
        ("four five", False),  # too short to betray anything
        ("two four six eight", False),
    ],
)
def test_overlap(text, bad):
    held_out = ["one two three four five six seven eight nine", "red green blue"]
    assert HeldOutFilter(held_out).leaking(["nothing at all like it", text]).tolist() == [False, bad]


def test_overlap_agrees_with_plain_search():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcde"), rng.integers(1, 14))) for _ in range(300)]
    mine, held_out = texts[:200], texts[200:230]

    def grams(text, n):
        words = text.split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    def plain(text):
        size = len(text.split())
        return any(
            text == other
            or grams(text, 8) & grams(other, 8)
            or (size >= 3 and f" {text} " in f" {other} ")
            or (len(other.split()) >= 3 and f" {other} " in f" {text} ")
            for other in held_out
        )

    assert HeldOutFilter(held_out).leaking(mine).tolist() == [bool(plain(text)) for text in mine]


def test_avoided_texts_leave_training(text_file):
    kept = read_texts(str(text_file), "train", held_out_share=0, avoid=[SENTENCES[5].upper()])
    assert SENTENCES[5] not in kept and SENTENCES[6] in kept


def test_every_format_gives_the_same_texts(tmp_path, text_file):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "texts.txt.gz").write_bytes(gzip.compress("\n".join(SENTENCES).encode()))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES))
    parquet.write_table(pyarrow.table({"text": SENTENCES}), tmp_path / "texts.parquet")
    for name in ("texts.txt", "texts.txt.gz", "texts.jsonl", "texts.parquet"):
        assert read_texts(str(tmp_path / name), "train", held_out_share=0) == SENTENCES
    assert read_texts(str(text_file), "train", held_out_share=0, limit=3) == SENTENCES[:3]


def test_tfds_bytes_are_text(monkeypatch):
    class Fake:
        @staticmethod
        def data_source(name, split):
            assert (name, split) == ("c4/en:3.0.1", "train")
            return [{"title": text.encode(), "id": 1} for text in SENTENCES]

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", Fake)
    assert read_texts("tfds:c4/en:3.0.1:title", "train", held_out_share=0) == SENTENCES
    with pytest.raises(InputError, match="no field 'text'"):
        read_texts("tfds:c4/en:3.0.1:text", "train")
    with pytest.raises(InputError, match="expected"):
        read_texts("tfds:c4/en:3.0.1:id", "train")


def _bad_files(folder):
    whole = gzip.compress("\n".join(SENTENCES).encode())
    content = {
        "empty.txt": b"",
        "blank.txt": b"\n \n",
        "marks.txt": b"?!\n...\n",
        "binary.txt": b"ab\0cd\n",
        "latin.txt": "caf\xe9 au lait\n".encode("latin-1"),
        "plain.txt.gz": b"not gzip at all",
        "cut.txt.gz": whole[: len(whole) // 2],
        "flipped.txt.gz": whole[:200] + bytes(200) + whole[400:],
        "junk.jsonl": b'{"text": "fine"}\nnot json\n',
        "field.jsonl": b'{"body": "no"}\n',
        "number.jsonl": b'{"text": 3}\n',
        "junk.parquet": b"not parquet",
        "data.csv": b"a,b\n",
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    (folder / "folder.txt").mkdir()
    return [str(folder / name) for name in (*content, "folder.txt", "missing.txt")]


def test_bad_inputs_are_refused_in_one_sentence(tmp_path):
    for source in [*_bad_files(tmp_path), "tfds:name", "tfds::field", "nonsense", ""]:
        with pytest.raises(InputError) as caught:
            read_texts(source, "train")
        assert "\n" not in str(caught.value) and str(caught.value).endswith("."), source


def test_missing_column_and_empty_split(tmp_path, text_file):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": SENTENCES}), tmp_path / "body.parquet")
    with pytest.raises(InputError, match="no column 'text'"):
        read_texts(str(tmp_path / "body.parquet"), "train")
    with pytest.raises(InputError, match="held_out split .* is empty"):
        read_texts(str(text_file), "held_out", held_out_share=0)
