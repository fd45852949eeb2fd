"""The files that people have, read as they are and refused in one sentence."""

import gzip
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from v2t_jax.data.readers import open_source, read_lines
from v2t_jax.data.tfds import prepare_tfds
from v2t_jax.errors import InputError

TEXTS = [f'Passage {i} is "about" {i * 3} things, é.' for i in range(40)]


def read(source):
    return list(open_source(str(source)))


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


FILES = {
    "collection.tsv": "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS)),
    "psgs_w100.tsv": "id\ttext\ttitle\n" + "".join(f"{i}\t{quoted(t)}\tTitle {i}\n" for i, t in enumerate(TEXTS)),
    "corpus.jsonl": "".join(json.dumps({"_id": str(i), "title": "T", "text": t}) + "\n" for i, t in enumerate(TEXTS)),
    "texts.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in TEXTS),
    "texts.txt": "\ufeff" + "\n\n".join(TEXTS),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_they_are(tmp_path, name, packed):
    data = FILES[name].encode()
    file = tmp_path / (name + ".gz" * packed)
    file.write_bytes(gzip.compress(data) if packed else data)
    assert read(file) == TEXTS
    source = open_source(str(file))
    ids = [str(i) for i in range(len(TEXTS))] if name in ("collection.tsv", "psgs_w100.tsv", "corpus.jsonl") else None
    assert [*source.records()] == [*zip(ids or [None] * len(TEXTS), TEXTS, strict=True)]
    positions = [source.position for _ in source]
    assert positions == sorted(positions) and source.position == source.size == file.stat().st_size


def test_what_a_line_is(tmp_path):
    lines = ["one\rtwo", "three\x0cfour\x85five", "six\u2028seven "]
    for name, end in (("a.txt", "\n"), ("b.txt", "\r\n")):
        (tmp_path / name).write_bytes("\ufeff".encode() + "".join(f"{line}{end}" for line in lines).encode())
        assert list(read_lines(str(tmp_path / name))) == lines
        assert read(tmp_path / name) == [line.strip() for line in lines]
    (tmp_path / "c.txt").write_text("one\n\n \ntwo\n \n\n")
    assert read(tmp_path / "c.txt") == ["one", "two"]
    with pytest.raises(InputError, match=r"Line 2 of .*c\.txt is blank, but line i is text i"):
        list(read_lines(str(tmp_path / "c.txt")))
    (tmp_path / "d.txt").write_text("one\n \n\n")
    assert list(read_lines(str(tmp_path / "d.txt"))) == ["one"]
    (tmp_path / "e.tsv").write_bytes(b"id\ttext\ttitle\n0\tone\rtwo\tT\r\n")
    assert read(tmp_path / "e.tsv") == ["one two"]


@pytest.mark.parametrize("content", ["", "\n", " \r\n\n"])
def test_a_file_without_texts(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(InputError, match="is empty: give a file with a text a line"):
        list(read_lines(str(tmp_path / "a.txt")))


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    for i in (2, 0, 1):
        table = pyarrow.table({"text": TEXTS[i * 10 : i * 10 + 10], "more": list(range(10))})
        parquet.write_table(table, tmp_path / f"train-{i}.parquet")
    (tmp_path / "README.md").write_text("not text")
    assert [i for i, _ in open_source(str(tmp_path)).records()] == [None] * 30
    assert read(tmp_path) == read(tmp_path / "*.parquet") == TEXTS[:30]
    (tmp_path / "other.jsonl").write_text(FILES["texts.jsonl"])
    with pytest.raises(InputError, match=r"files of several kinds \(jsonl, parquet\): name one"):
        read(tmp_path)
    assert read(tmp_path / "train-?.parquet") == TEXTS[:30]


def test_ids_of_a_parquet_file_stay_with_their_texts(tmp_path):
    table = {"uuid": [1, 2, 3], "text": ["a", None, "c"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    assert [*open_source(str(tmp_path / "t.parquet")).records()] == [(1, "a"), (3, "c")]


def test_a_quotation_mark_of_msmarco_is_just_that(tmp_path):
    (tmp_path / "c.tsv").write_text('0\t"Open, he said\n1\tand went.\r\n', newline="")
    assert read(tmp_path / "c.tsv") == ['"Open, he said', "and went."]


def test_our_tfds_builder_needs_no_tensorflow(tmp_path):
    (tmp_path / "c.tsv").write_text(FILES["collection.tsv"])
    folder = prepare_tfds(str(tmp_path / "c.tsv"), tmp_path / "tfds", "passages")
    source = open_source(f"tfds:{folder}:text")
    assert list(source) == TEXTS and "tensorflow" not in sys.modules
    assert any("array_record" in file.name for file in source.files)
    with pytest.raises(InputError, match="passages exists: give another name, or delete it"):
        prepare_tfds(str(tmp_path / "c.tsv"), tmp_path / "tfds", "passages")
    with pytest.raises(InputError, match="no name for a TFDS data set"):
        prepare_tfds(str(tmp_path / "c.tsv"), tmp_path / "tfds", "My Passages")
    with pytest.raises(InputError, match="can't be written"):
        prepare_tfds(str(tmp_path / "c.tsv"), tmp_path / "c.tsv" / "inside", "passages")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "is empty"),
        ("a.tsv", b"0\tsome text\tA title\n", "begins with a line of 3 columns and no header"),
        ("a.tsv", b"only text\n", "begins with a line of 1 columns and no header"),
        ("a.tsv", b"id\ttext\ttext\n", "names a column twice"),
        ("a.tsv", b"0\tfine\n1\tnot\tfine\n", "Record 2 of .* has 3 columns, not 2"),
        ("a.tsv", b"id\ttext\ttitle\n0\tfine\n", "Record 1 of .* has 2 columns, not 3"),
        ("a.tsv", b'id\ttext\ttitle\n0\t"open\tT\n' + b"x" * 140_000 + b"\n", "close its quotation mark"),
        ("a.tsv", b"0\tcaf\xe9\n", "not UTF-8"),
        ("a.tsv", b"0\ta\0b\n", "zero bytes"),
        ("a.tsv.gz", gzip.compress(b"0\tfine\n" * 1000, mtime=0)[:-9], "not a complete gzip file"),
        ("a.jsonl", b'{"title": "no"}\n', "Record 1 of .* has no string field 'text'"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
        ("a.csv", b"a,b\n", "Cannot read"),
        ("made_of.json", b"{}", "is a built data set"),
        ("README", b"", "holds no file ending in"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path if name in ("made_of.json", "README") else tmp_path / name)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("source", ["tfds:no_such_data_set:text", "tfds:/:text", "/nowhere/*.jsonl"])
def test_what_is_not_there_is_refused(source):
    with pytest.raises(InputError, match=r"(TFDS cannot open|There is no file).*\.$"):
        read(source)
