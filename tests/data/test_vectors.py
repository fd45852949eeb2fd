"""Files of vectors in every container: read alike, in batches, from any row on; damage ends in one sentence."""

import gzip
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, feather, parquet
from safetensors.numpy import save_file

from v2t_jax.data.vector_file import Rows, VectorFile, plain
from v2t_jax.data.vectors import open_vectors
from v2t_jax.errors import InputError
from v2t_jax.stores import open_store

ROWS, WIDTH = 2500, 6  # more rows than are read at a time
E = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
IDS, TEXTS = [f"r{i}" for i in range(ROWS)], [f'the text, "{i}"' for i in range(ROWS)]
DIMENSIONS = {f"dim_{i}": E[:, i] for i in range(WIDTH)}
TABLE = pa.table({"id": IDS, "embedding": pa.array(list(E)), "text": TEXTS})
TENSOR = pa.FixedShapeTensorArray.from_numpy_ndarray(E.astype(np.float16))
FIXED = pa.FixedSizeListArray.from_arrays(pa.array(E.astype(np.float16).ravel()), WIDTH)


def records(file: Path) -> None:
    rows = zip(IDS, E.tolist(), TEXTS, strict=True)
    file.write_text("\n".join(json.dumps({"id": i, "embedding": e, "text": text}) for i, e, text in rows))


def write_ipc(file: Path, new: object, table: pa.Table = TABLE) -> None:
    with pa.OSFile(str(file), "wb") as sink, new(sink, table.schema) as writer:  # type: ignore[operator]
        writer.write_table(table, max_chunksize=300)


def write_csv(file: Path, show: object, sep: str = ",") -> None:
    """With the vectors as text, quoted as CSV asks for."""
    columns = {"id": IDS, "embedding": [show(e) for e in E], "text": TEXTS}  # type: ignore[operator]
    csv.write_csv(pa.table(columns), file, csv.WriteOptions(delimiter=sep))


# name -> how it is written, whether ids and texts are beside the vectors, and the largest difference.
KINDS = {
    "one.npy": (lambda f: np.save(f, E), "", 0),
    "column_order.npy": (lambda f: np.save(f, np.asfortranarray(E)), "", 0),
    "half.npy": (lambda f: np.save(f, E.astype(np.float16)), "", 2e-3),
    "some.npz": (lambda f: np.savez(f, embeddings=E, ids=np.array(IDS), text=np.array(TEXTS)), "it", 0),
    "packed.npz": (lambda f: np.savez_compressed(f, E), "", 0),
    "objects.npz": (lambda f: np.savez(f, vectors=E, ids=np.array(IDS, object)), "", 0),
    "some.safetensors": (lambda f: save_file({"emb": E, "id": np.arange(ROWS)}, f), "n", 0),
    "bfloat16.safetensors": (lambda f: save_file({"emb": E.astype(ml_dtypes.bfloat16)}, f), "", 2e-2),
    "lists.parquet": (lambda f: parquet.write_table(TABLE, f, row_group_size=700), "it", 0),
    "fixed.parquet": (lambda f: parquet.write_table(pa.table({"id": IDS, "vector": FIXED}), f), "i", 2e-3),
    "tensor.arrow": (lambda f: write_ipc(f, pa.ipc.new_file, pa.table({"id": IDS, "vector": TENSOR})), "i", 2e-3),
    "dimensions.parquet": (lambda f: parquet.write_table(pa.table({"id": IDS, **DIMENSIONS}), f), "i", 0),
    "file.arrow": (lambda f: write_ipc(f, pa.ipc.new_file), "it", 0),
    "stream.arrow": (lambda f: write_ipc(f, pa.ipc.new_stream), "it", 0),
    "table.feather": (lambda f: feather.write_feather(TABLE, f), "it", 0),
    "lines.jsonl": (records, "it", 0),
    "lines_really.json": (records, "it", 0),
    "lines.jsonl.gz": (
        lambda f: f.write_bytes(gzip.compress(b"\n".join(json.dumps(e).encode() for e in E.tolist()))),
        "",
        0,
    ),
    "chroma.json": (
        lambda f: f.write_text(json.dumps({"ids": IDS, "embeddings": E.tolist(), "documents": TEXTS, "uris": None})),
        "it",
        0,
    ),
    "openai.json": (
        lambda f: f.write_text(json.dumps({"object": "list", "data": [{"embedding": e} for e in E.tolist()]})),
        "",
        0,
    ),
    "array.json": (lambda f: f.write_text(json.dumps(E.tolist())), "", 0),
    "pgvector.csv": (lambda f: write_csv(f, lambda e: json.dumps(e.tolist())), "it", 0),
    "printed_by_numpy.csv": (lambda f: write_csv(f, str), "it", 1e-7),
    "tabs.tsv": (lambda f: write_csv(f, lambda e: json.dumps(e.tolist()), "\t"), "it", 0),
    "dimensions.csv": (lambda f: csv.write_csv(pa.table({"id": IDS, **DIMENSIONS}), f), "i", 0),
    "projector.tsv": (lambda f: np.savetxt(f, E, delimiter="\t"), "", 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for name, (write, *_) in KINDS.items():
        write(folder / name)  # type: ignore[no-untyped-call]
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_every_container_gives_the_same_rows(name: str, folder: Path) -> None:
    _, beside, most = KINDS[name]
    file = open_vectors(str(folder / name))
    assert file.count in (ROWS, None)
    for start, size in ((0, 999), (301, 4000), (2499, 7), (2500, 3)):
        found = list(file.batches(size, start))
        sizes = [size] * ((ROWS - start) // size) + [(ROWS - start) % size] * (((ROWS - start) % size) > 0)
        assert [len(rows.vectors) for rows in found] == sizes
        if found:
            vectors = np.concatenate([rows.vectors for rows in found]).astype(np.float32)
            np.testing.assert_allclose(vectors, E[start:], atol=most, rtol=0)
        ids = IDS[start:] if "i" in beside else list(range(start, ROWS)) if "n" in beside else None
        assert [i for rows in found for i in rows.ids or []] == (ids or [])
        assert [t for rows in found for t in rows.texts or []] == (TEXTS[start:] if "t" in beside else [])


def test_what_else_a_file_holds_is_metadata(tmp_path: Path) -> None:
    """Each container gives its other columns, but for vectors and what would have to be unpickled."""
    owner, page = [f"o{i}@example.com" for i in range(ROWS)], list(range(ROWS))
    columns = {"id": IDS, "embedding": FIXED, "text": TEXTS, "owner": owner, "page": page, "other": FIXED}
    table = pa.table(columns)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    write_ipc(tmp_path / "a.arrow", pa.ipc.new_file, table)
    write_csv(tmp_path / "plain.csv", lambda e: json.dumps(e.tolist()))
    with csv.open_csv(tmp_path / "plain.csv") as stream:
        whole = stream.read_all().append_column("owner", pa.array(owner)).append_column("page", pa.array(page))
    csv.write_csv(whole, tmp_path / "a.csv")
    arrays = {"embeddings": E, "ids": np.array(IDS), "owner": np.array(owner), "page": np.array(page)}
    np.savez(tmp_path / "a.npz", **arrays, pickled=np.array(owner, object))
    fields = ("id", "embedding", "owner", "page", "other")
    values = zip(IDS, E.tolist(), owner, page, E.tolist(), strict=True)
    rows = [dict(zip(fields, one, strict=True)) for one in values]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lists = {"ids": IDS, "embeddings": E.tolist(), "owner": owner, "page": page, "uris": None}
    (tmp_path / "a.json").write_text(json.dumps(lists))
    for name in ("a.parquet", "a.arrow", "a.csv", "a.npz", "a.jsonl", "a.json"):
        location = str(tmp_path / name) + (":embedding" if name in ("a.parquet", "a.arrow", "a.jsonl") else "")
        found = [one for part in open_store(location).rows.batches(999, 301) for one in part.metadata or []]
        assert found == [{"owner": o, "page": p} for o, p in zip(owner[301:], page[301:], strict=True)], name
        assert next(open_vectors(location).batches(1)).metadata is None  # where nobody asks, it isn't read


def test_records_are_read_to_a_limit() -> None:
    """Inner ones by dotted names, lists of them together; vectors, objects and what is made to explode are left out."""
    record = {"a": {"b": 1, "c": ["x", "y"]}, "talk": [{"said": "one"}, {"said": "two"}], "e": [0.1, 0.2], "none": None}
    assert plain(record) == {"a.b": 1, "a.c": ["x", "y"], "talk.said": ["one", "two"]}
    assert plain({"half": "a\ud83d", "much": 10**5000, "\ud83d": "b"}) == {
        **{"half": "a?", "much": "a number of 16,610 bits", "?": "b"}
    }
    inner: dict[str, Any] = {"leaf": "x"}
    for _ in range(60):
        inner = {"left": inner, "right": inner}
    assert len(plain(inner)) <= 1000 and len(plain({str(i): i for i in range(2000)})) == 1000


def test_shares_cover_a_file(folder: Path) -> None:
    parts = [open_vectors(str(folder / "lists.parquet")).share(i, 3) for i in range(3)]
    assert [part.first for part in parts] == [0, 833, 1666]
    ids = [i for part in parts for rows in part.batches(100) for i in rows.ids or []]
    assert ids == IDS and sum(part.count or 0 for part in parts) == ROWS
    assert next(parts[1].batches(1, 5)).ids == ["r838"]
    with pytest.raises(InputError, match="isn't known, so it can't be shared"):
        open_vectors(str(folder / "projector.tsv")).share(0, 2)


def test_a_field_names_one_of_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", query=E, passage=-E)
    file = str(tmp_path / "two.npz")
    with pytest.raises(InputError, match=r"several that can be vectors \(query, passage\); name one, as .*:query"):
        open_vectors(file)
    np.testing.assert_array_equal(open_vectors(f"{file}:passage").whole().vectors, -E)
    with pytest.raises(InputError, match="no vectors named 'title'; it holds query, passage"):
        open_vectors(f"{file}:title")
    (tmp_path / "a:b.jsonl").write_text("[1, 2]")  # a colon may be a name's own
    assert open_vectors(str(tmp_path / "a:b.jsonl")).whole().vectors.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", '{"a": 1}\n', r"no vectors \(a\); give a file with"),
        ("x.jsonl", '{"embedding": [1, 2]}\n{"embedding": [1]}', "Row 2 of .* has 1 numbers, but others have 2"),
        ("x.jsonl", '{"embedding": [[1, 2]]}', r"Row 1 of .* has '\[1, 2\]' where a number is meant"),
        ("x.json", '{"embeddings": [[1, 2], [3, 4]], "ids": ["a"]}', "not as many ids or texts as vectors"),
        ("x.jsonl", '{"embedding": [1, 2]}\n{"embedding": [1, "b"]}', "Row 2 of .* has 'b' where a number is meant"),
        ("x.jsonl", '{"embedding": [1, 2]}\n{"embed', "Row 2 of .* is not JSON"),
        (
            "x.jsonl",
            '{"embedding": [1]}\n' * 1500 + '{"embedding": [1, 2]}\n',
            "Row 1501 of .* 2 numbers, but others have 1",
        ),
        ("x.jsonl", "hello", "Row 1 of .* is not JSON"),
        ("x.jsonl", "1", "neither an object nor a list"),
        ("x.json", '{"a": [', "is truncated, damaged or not what its name says"),
        ("x.json", '{"ids": ["a"]}', r"no vectors \(ids\)"),
        ("x.csv", 'id,embedding\n1,"[1, ..., 2]"\n', r"Row 1 of .* has '\[1, \.\.\., 2\]' where a list"),
        ("x.csv", "id,title\n1,2\n", r"no vectors \(id, title\)"),
        ("x.csv", "", "is empty"),
        ("x.npy", "hello", "doesn't begin as .npy files do"),
        ("x.npz", "hello", "not a zip file"),
        ("x.parquet", "hello", "is truncated, damaged"),
        ("x.safetensors", "hello", "is truncated, damaged"),
        ("x.arrow", "hello", "is truncated, damaged"),
        ("x.txt", "hello", "is of no known kind; give a file whose name ends in .npy, .npz"),
        ("x.parquet.gz", "hello", "is of no known kind"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        open_vectors(str(tmp_path / name)).whole()


@pytest.mark.parametrize(
    ("name", "content", "vectors", "ids"),
    [
        ("x.jsonl", '{"embedding": [1, 2]}\n{"id": 7}\n{"embedding": [null, NaN]}', "12 nn nn", [None, 7, None]),
        ("x.jsonl", '\ufeff{"vector": null}\n{"id": "a", "vector": [1, 2]}', "nn 12", [None, "a"]),
        ("x.json", '\ufeff{"embedding": [1, 2]}', "12", None),
        ("X.CSV", "\ufeffid,year,b0,b1\n007,1999,0,1\n008,n.k.,2,0.5\n", "01 2.", ["007", "008"]),
        ("x.csv", "12,3\n4,5\n", "c3 45", None),
        ("x.csv", "0,1\n4,5\n", "45", None),
        ("x.csv", 'id,tags0,embedding\n1,7,"[1, 2]"\n2,8,\n', "12 nn", ["1", "2"]),
    ],
)
def test_what_is_unusual_is_read(name: str, content: str, vectors: str, ids: list | None, tmp_path: Path) -> None:
    """Rows that lack a vector or a number (n), byte-order marks, leading zeros, files without a header."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    rows = open_vectors(str(tmp_path / name)).whole()
    expected = [[{"n": np.nan, ".": 0.5, "c": 12.0}.get(c, c) for c in row] for row in vectors.split()]
    np.testing.assert_array_equal(rows.vectors.astype(np.float64), np.array(expected, np.float64))
    assert rows.ids == ids


def test_other_mistakes(tmp_path: Path) -> None:
    np.save(tmp_path / "deep.npy", np.ones((2, 3, 4)))
    np.savez(tmp_path / "order.npz", np.asfortranarray(np.ones((2, 3))))
    objects = np.array([[1, None]], object)
    np.savez(tmp_path / "objects.npz", vectors=objects)
    np.save(tmp_path / "pickled.npy", objects)
    said = {"deep": "holds no vectors", "order": "Fortran's order"} | dict.fromkeys(("objects", "pickled"), "objects")
    for name, what in said.items():
        with pytest.raises(InputError, match=what):
            open_vectors(str(next(tmp_path.glob(f"{name}.*")))).whole()
    with pytest.raises(InputError, match="is a folder, a pipe or a device"):
        (tmp_path / "x.npy").mkdir()
        open_vectors(str(tmp_path / "x.npy"))
    with pytest.raises(InputError, match=r"/store' doesn't exist; give a file whose name ends in .npy"):
        open_vectors(str(tmp_path / "store"))
    with pytest.raises(OSError, match="No such file"):
        open_vectors(str(tmp_path / "none.npy"))
    widths = VectorFile("two kinds", None, lambda start: iter([Rows(np.ones((1, 2))), Rows(np.ones((1, 3)))]))
    with pytest.raises(InputError, match="vectors of 3 after those of 2 numbers"):
        widths.whole()


@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith((".npy", "_really.json"))])
def test_damage_never_shows_as_another_exception(name: str, folder: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with a byte changed in its first kilobyte: an error or vectors."""
    whole, rng = (folder / name).read_bytes(), np.random.default_rng(0)
    damaged = [whole[: len(whole) * i // 12] for i in range(1, 12)]
    for _ in range(25):
        changed = bytearray(whole)
        changed[rng.integers(min(len(whole), 1000))] = rng.integers(256)
        damaged.append(bytes(changed))
    for content in damaged:
        (tmp_path / name).write_bytes(content)
        try:
            open_vectors(str(tmp_path / name)).whole()
        except InputError:
            continue


def test_damaged_arrays_are_refused_whatever_the_damage(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.ones((4, 5), np.float32))
    whole, file, rng = (tmp_path / "good.npy").read_bytes(), tmp_path / "bad.npy", np.random.default_rng(0)
    file.write_bytes(whole.replace(b"(4, 5)", b"(9**9,"))
    with pytest.raises(InputError):
        open_vectors(str(file))
    file.write_bytes(whole.replace(b"(4, 5), ", b"(999999999999, 5), ").replace(b" " * 11 + b"\n", b"\n"))
    with pytest.raises(InputError, match="truncated"):  # and no attempt to hold them in memory
        open_vectors(str(file))
    for length in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError):
            open_vectors(str(file)).whole()
    for _ in range(300):
        changed = bytearray(whole)
        changed[rng.integers(128)] = rng.integers(256)
        file.write_bytes(changed)
        try:
            open_vectors(str(file)).whole()
        except InputError:
            continue


def test_a_sample_keeps_order_and_ids_and_can_start_anywhere(tmp_path: Path) -> None:
    vectors = np.arange(7000, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    np.save(tmp_path / "many.npy", vectors)
    with (tmp_path / "few.jsonl").open("w") as file:
        for i in range(30):
            file.write(json.dumps({"id": f"n{i}", "embedding": [i, 1.0], "text": str(i)}) + "\n")
    many = open_vectors(str(tmp_path / "many.npy")).sampled(2500, seed=1)
    whole = many.whole()
    assert many.count == len(set(whole.ids)) == 2500 and whole.ids == sorted(whole.ids)
    assert whole.ids != [*range(2500)] and (whole.vectors[:, 0] == whole.ids).all()
    later = [*many.batches(1000, 1400)]
    assert [len(rows.vectors) for rows in later] == [1000, 100] and later[0].ids == whole.ids[1400:2400]
    few = open_vectors(str(tmp_path / "few.jsonl")).sampled(10).whole()
    assert [f"n{text}" for text in few.texts] == few.ids and (few.vectors[:, 0] == [*map(int, few.texts)]).all()
    assert open_vectors(str(tmp_path / "few.jsonl")).sampled(99).whole().ids == [f"n{i}" for i in range(30)]
