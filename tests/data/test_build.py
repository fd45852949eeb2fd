"""Built data sets: the same bytes whoever makes them and however often they are killed, and nothing leaks."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from v2t_jax.config import BuildSettings
from v2t_jax.data import build as build_module
from v2t_jax.data import columns
from v2t_jax.data.build import build
from v2t_jax.data.columns import ColumnWriter, open_column
from v2t_jax.data.dataset import FILES, TokenDataset, is_built
from v2t_jax.data.split import is_held_out, normalize_for_split, read_texts, unique
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.decode.state import EOS
from v2t_jax.errors import InputError

from .conftest import WORDS

SETTINGS = BuildSettings(held_out_share=0.1, max_tokens=12)


@pytest.fixture(autouse=True)
def small_pieces_of_work(monkeypatch):
    monkeypatch.setattr(build_module, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(build_module, "PART_BYTES", 20_000)


def make_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice([*WORDS, *"abcdefghij"], rng.integers(1, 16))) for _ in range(count)]


@pytest.fixture
def source(tmp_path):
    texts = make_texts(2000)
    texts[7], texts[1500] = "?!", texts[3].upper() + "."  # blank, and a duplicate
    texts[11] = "the zebra sleeps"  # a piece that the tokenizer lacks
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts))
    return file


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def build_here(source, folder, tokenizer, settings=SETTINGS, processes=1):
    return build([str(source)], folder, tokenizer, settings, processes)


def rows_of(dataset):
    return np.split(dataset.tokens, dataset.offsets[1:-1])


def test_it_holds_what_the_files_hold_but_no_leaks(source, tmp_path, tokenizer):
    stored = build_here(source, tmp_path / "built", tokenizer)
    vocabulary = stored.vocabulary(tokenizer)
    assert stored.tokens.dtype == np.uint16 and stored.offsets.dtype == np.int64
    rows = rows_of(stored)
    # By the in-memory reader, which is another path: the same texts on either side of the split.
    train = read_texts(str(source), "train", held_out_share=0.1)
    held_out = read_texts(str(source), "held_out", held_out_share=0.1)
    ids = [row[:12] for row in vocabulary.encode(train) if len(row) and row.min() >= 0]
    assert sorted(map(tuple, rows)) == sorted(map(tuple, ids))
    assert sorted(stored.held_out()) == sorted(held_out) and stored.held_out(3) == stored.held_out()[:3]
    assert all(is_held_out(normalize_for_split(text), 0.1) for text in held_out)
    counts = stored.manifest["counts"]
    found = unique(source.read_text().split("\n"))
    assert counts["texts"] == 2000 and counts["blank"] == 1 and counts["unknown"] == 1 and counts["given_away"] > 10
    assert counts["duplicates"] == 1999 - len(found) > 0
    names = ("rows", "held_out", "blank", "duplicates", "given_away", "unknown")
    assert sum(counts[name] for name in names) == counts["texts"]
    assert counts["cut"] == sum(len(row) > 12 for row in vocabulary.encode(list(source.read_text().split("\n"))))
    assert np.diff(stored.offsets).max() == 12 and counts["rows"] == len(rows) == len(stored)
    assert not (tmp_path / "built" / "work").exists() and is_built(str(tmp_path / "built"))


def test_neighbours_in_the_source_are_none_in_the_data_set(source, tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    groups = np.repeat(["red", "blue", "house"], 1000)
    source.write_text("\n".join(f"{group} {' '.join(rng.choice([*'abcdefghij'], 12))}" for group in groups))
    stored = build_here(source, tmp_path / "built", tokenizer, BuildSettings())
    first = stored.tokens[stored.offsets[:-1]]
    parts = first[: len(first) // 10 * 10].reshape(10, -1)
    for group in np.unique(first):
        assert (parts == group).mean(1).min() > 0.2 and (parts == group).mean(1).max() < 0.47


def test_processes_and_chunks_make_the_same_bytes(source, tmp_path, tokenizer, monkeypatch):
    alone = contents(build_here(source, tmp_path / "one", tokenizer).folder)
    assert set(alone) == {*FILES, "made_of.json", "manifest.json"}
    assert contents(build_here(source, tmp_path / "two", tokenizer, processes=2).folder) == alone
    monkeypatch.setattr(build_module, "CHUNK_BYTES", 999)
    monkeypatch.setattr(build_module, "PART_BYTES", 7000)
    assert contents(build_here(source, tmp_path / "other", tokenizer).folder) == alone


SCRIPT = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from v2t_jax.data import build as module
if __name__ == "__main__":
    source, folder, tokenizer, processes = sys.argv[1:]
    module.CHUNK_BYTES, module.PART_BYTES = 4000, 20_000
    settings = module.BuildSettings(held_out_share=0.1, max_tokens=12)
    module.build([source], Path(folder), Tokenizer.from_file(tokenizer), settings, int(processes))
"""


def COMMAND(source, folder):
    return [sys.executable, "-c", SCRIPT, str(source), str(folder), str(source.parent / "tokenizer.json")]


@pytest.fixture(autouse=True)
def tokenizer_file(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))


def test_a_build_that_is_killed_goes_on_and_nothing_is_lost_or_doubled(source, tmp_path, tokenizer):
    whole = contents(build_here(source, tmp_path / "whole", tokenizer).folder)
    folder, kills = tmp_path / "killed", 0
    rng = np.random.default_rng(0)
    for at_least in (1, 4, 7, 10):  # files in work/ when it is killed
        process = subprocess.Popen([*COMMAND(source, folder), "1"])
        while process.poll() is None and len([*folder.glob("work/*")]) < at_least:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.003)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2 and not (folder / "manifest.json").exists()
    (folder / "work" / ".chunk-000001.arrow.dead").write_bytes(b"half")
    (folder / ".tokens.npy.dead").write_bytes(b"half")
    assert contents(build_here(source, folder, tokenizer).folder) == whole


def test_a_killed_worker_process_is_reported_and_the_build_goes_on(source, tmp_path, tokenizer):
    source.write_text("\n".join(make_texts(10_000)))  # enough to be at work when the first chunk is seen

    def kill() -> None:
        while not [*tmp_path.glob("built/*/chunk-*")]:
            time.sleep(0.001)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)  # so that a build that fails early ends the test
    killer.start()
    with pytest.raises(InputError, match="A worker process was killed .* with fewer --processes"):
        build_here(source, tmp_path / "built", tokenizer, processes=2)
    killer.join()
    whole = contents(build_here(source, tmp_path / "whole", tokenizer).folder)
    assert contents(build_here(source, tmp_path / "built", tokenizer).folder) == whole


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_workers_too_and_the_build_goes_on(source, tmp_path, tokenizer, stop):
    folder = tmp_path / "built"
    command = [*COMMAND(source, folder), "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while (
        process.poll() is None and not (folder / "made_of.json").exists()
    ):  # the workers are about to start: that takes a second or two
        time.sleep(0.001)
    os.killpg(process.pid, stop)  # as a terminal and a scheduler send it: to parent and workers
    _, errors = process.communicate(timeout=60)  # and so stderr has been closed by all of them
    assert process.returncode and (stop == signal.SIGTERM or "KeyboardInterrupt" in errors)
    assert not (folder / "manifest.json").exists()
    whole = contents(build_here(source, tmp_path / "whole", tokenizer).folder)
    assert contents(build_here(source, folder, tokenizer).folder) == whole


def test_what_is_done_is_not_done_again(source, tmp_path, tokenizer, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build_module, "_write_part", die)
        with pytest.raises(KeyboardInterrupt):
            build_here(source, tmp_path / "built", tokenizer)
    monkeypatch.setattr(build_module, "_write_chunk", die)
    build_here(source, tmp_path / "built", tokenizer)
    monkeypatch.setattr(build_module, "_write_part", die)
    assert build_here(source, tmp_path / "built", tokenizer).manifest["counts"]["texts"] == 2000


def test_a_small_vocabulary_keeps_the_commonest_pieces(source, tmp_path, tokenizer):
    source.write_text("\n".join(["the cat sleep " + "ab"[i % 2] * (i % 9 + 1) for i in range(500)] + ["red dog"] * 3))
    settings = BuildSettings(vocabulary_size=4, held_out_share=0.1)
    stored = build_here(source, tmp_path / "built", tokenizer, settings)
    vocabulary = stored.vocabulary(tokenizer)
    kept = {tokenizer.id_to_token(int(i)) for i in vocabulary.vocab_map[2:]}
    assert vocabulary.size == 6 and {"the", "cat", "sleep"} < kept
    assert stored.tokens.min() > EOS and stored.tokens.max() < 6
    assert stored.manifest["counts"]["unknown"] > 0


def test_a_full_disk_stops_in_one_sentence_and_the_build_goes_on_later(source, tmp_path, tokenizer):
    whole = contents(build_here(source, tmp_path / "whole", tokenizer).folder)
    command = COMMAND(source, tmp_path / "built")
    for limit in (1, 12):  # KB a file may have: a chunk doesn't fit, then a part
        script = command[2].replace(
            "    module.build(",
            f"    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit << 10},) * 2)\n    module.build(",
        )
        done = subprocess.run([*command[:2], script, *command[3:], "1"], stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert "InputError: The build stopped at" in done.stderr and "File too large" in done.stderr
        assert done.stderr.strip().endswith("run the same command to go on.")
    assert contents(build_here(source, tmp_path / "built", tokenizer).folder) == whole


def damage(folder, what):
    file = folder / "tokens.npy" if what in ("byte", "cut", "missing") else folder / "manifest.json"
    if what == "byte":
        data = bytearray(file.read_bytes())
        data[-7] ^= 1
        file.write_bytes(data)
    elif what == "offset":
        damage_byte = bytearray((folder / "offsets.npy").read_bytes())
        damage_byte[-1] ^= 128
        (folder / "offsets.npy").write_bytes(damage_byte)
    elif what == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif what in ("missing", "manifest"):
        file.unlink()
    elif what == "json":
        file.write_text("{")
    elif what == "format":
        file.write_text('{"format": 99}')
    elif what == "older":  # shards of ArrayRecord files
        file.write_text('{"format": 2, "shards": []}')
    elif what == "keys":
        file.write_text('{"format": 3}')
    elif what == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif what == "vocabulary":
        (folder / "vocabulary.npy").write_bytes(bytes((folder / "vocabulary.npy").stat().st_size))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("offset", "offsets.npy is damaged .its sha256 differs"),
        ("cut", r"tokens.npy has \d+ bytes instead of \d+ \(is it truncated\?\)"),
        ("missing", "tokens.npy is missing"),
        ("manifest", "manifest.json is missing: .* was never finished; run 'v2t data build'"),
        ("json", "manifest.json is damaged"),
        ("format", "was built by another version of v2t: build it again"),
        ("older", "was built by another version of v2t: build it again"),
        ("keys", "manifest.json is damaged .it lacks files"),
        ("vocabulary", "vocabulary.npy is damaged"),
        ("tokenizer", r"tokenizer.json has 2 bytes instead of \d+"),
    ],
)
def test_damage_is_named(source, tmp_path, tokenizer, what, message):
    folder = build_here(source, tmp_path / "built", tokenizer).folder
    damage(folder, what)
    with pytest.raises(InputError, match=message) as caught:
        TokenDataset.open(folder)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_damaged_token_is_found_by_building_again(source, tmp_path, tokenizer):
    folder = build_here(source, tmp_path / "built", tokenizer).folder
    damage(folder, "byte")
    with pytest.raises(InputError, match="tokens.npy is damaged .its sha256 differs"):
        build_here(source, folder, tokenizer)


def test_settings_and_folders_that_do_not_fit_are_refused(source, tmp_path, tokenizer):
    folder = build_here(source, tmp_path / "built", tokenizer).folder
    other = BuildSettings(held_out_share=0.2)
    with pytest.raises(InputError, match=r"is being made of something else \(it differs in settings\)"):
        build_here(source, folder, tokenizer, other)
    source.write_text("another text\n")
    with pytest.raises(InputError, match=r"differs in sources\)"):
        build_here(source, folder, tokenizer)
    with pytest.raises(InputError, match="holds something else"):
        build_here(source, tmp_path, tokenizer)
    with pytest.raises(InputError, match="is a file"):
        build_here(source, source, tokenizer)
    with pytest.raises(InputError, match="nothing to build from"):
        build([], tmp_path / "x", tokenizer, SETTINGS)
    with pytest.raises(InputError, match="None of 1 texts falls into the held-out share"):
        build_here(source, tmp_path / "x", tokenizer)
    source.write_text("?\n!\n")
    with pytest.raises(InputError, match="hold no text"):
        build_here(source, tmp_path / "y", tokenizer)
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(InputError, match="another tokenizer"):
        TokenDataset.open(folder).vocabulary(tokenizer)


@pytest.mark.parametrize(
    "changed", [{"max_tokens": 0}, {"max_tokens": 70_000}, {"held_out_share": 0.0}, {"vocabulary_size": -1}]
)
def test_bad_settings_are_refused(changed):
    with pytest.raises(InputError, match=next(iter(changed))):
        BuildSettings(**changed)


def test_no_processes_are_refused(source, tmp_path, tokenizer):
    with pytest.raises(InputError, match="processes is 0; give at least 1"):
        build_here(source, tmp_path / "x", tokenizer, processes=0)


def test_a_folder_of_an_older_version_is_refused(source, tmp_path, tokenizer):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "made_of.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="was built by another version of v2t: build it again, in a new folder"):
        build_here(source, tmp_path / "old", tokenizer)


def test_columns_are_written_by_pieces_and_keyed_by_what_made_them(source, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(columns, "PIECE_ROWS", 700)
    stored = build_here(source, tmp_path / "built", tokenizer)
    made_by = {"embedder": "abc", "dtype": "float16", "max_length": 13}
    writer = ColumnWriter(stored, "vectors", "float16", (3,), made_by)
    expected = np.stack([np.diff(stored.offsets), stored.offsets[1:] % 99, stored.tokens[stored.offsets[:-1]]], 1)
    assert writer.missing() == [0, 1, 2] and 1400 < len(stored) < 2100
    for piece in (2, 0):
        writer.write(piece, expected[writer.rows(piece)])
    with pytest.raises(InputError, match="columns/vectors was never finished: run the command"):
        open_column(stored, "vectors")
    again = ColumnWriter(TokenDataset.open(stored.folder), "vectors", "float16", (3,), made_by)
    assert again.missing() == [1]
    again.write(1, expected[again.rows(1)])
    again.finish()
    writer.finish()  # another process that sees nothing missing any more
    column = open_column(stored, "vectors")
    np.testing.assert_array_equal(column.values, expected)
    folder = stored.folder / "columns" / "vectors"
    assert column.made_by == made_by and sorted(os.listdir(folder)) == ["manifest.json", "values.npy"]
    np.testing.assert_array_equal(np.load(folder / "values.npy"), expected)
    assert ColumnWriter(stored, "vectors", "float16", (3,), made_by).missing() == []
    with pytest.raises(InputError, match=r"made of something else \(it differs in made_by\)"):
        ColumnWriter(stored, "vectors", "float16", (3,), made_by | {"embedder": "def"})
    os.truncate(folder / "values.npy", 200)
    with pytest.raises(InputError, match="values.npy has 200 bytes instead of"):
        open_column(stored, "vectors")
    manifest = Path(stored.folder / "manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match="belongs to another build"):
        open_column(TokenDataset.open(stored.folder), "vectors")


def test_vocabulary_of_the_whole_tokenizer(source, tmp_path, tokenizer):
    stored = build_here(source, tmp_path / "built", tokenizer)
    np.testing.assert_array_equal(stored.vocabulary(tokenizer).vocab_map, Vocabulary.full(tokenizer).vocab_map)
    assert stored.vocabulary().tokenizer.to_str() == stored.vocabulary(tokenizer).tokenizer.to_str()
