"""Built data sets: the same bytes whoever makes them and however often they are killed, and nothing leaks."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from v2t_jax.data import build as build_module
from v2t_jax.data import shards
from v2t_jax.data.blocks import ROWS, ColumnWriter, StoredTexts, is_stored
from v2t_jax.data.build import BuildSettings, Workers, build
from v2t_jax.data.sources import is_held_out, normalize_for_split, read_texts, unique
from v2t_jax.data.vocabulary import EOS, Vocabulary
from v2t_jax.errors import InputError
from v2t_jax.parallel.processes import Share

from .conftest import WORDS

SETTINGS = BuildSettings(held_out_share=0.1, max_tokens=12, chunk_bytes=4000, shard_bytes=20_000)


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


def build_here(source, folder, tokenizer, settings=SETTINGS, **workers):
    return build([str(source)], folder, tokenizer, settings, Workers(**workers))


def test_it_holds_what_the_files_hold_but_no_leaks(source, tmp_path, tokenizer):
    stored = build_here(source, tmp_path / "built", tokenizer)
    vocabulary = stored.vocabulary(tokenizer)
    assert len(stored.manifest["shards"]) == 3 and stored.token_dtype == np.uint16
    rows = [row for shard in range(3) for block in stored.texts(shard) for row in block]
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
    assert stored.manifest["longest"] == 12 and counts["rows"] == len(rows) == stored.block_rows.sum()
    assert not (tmp_path / "built" / "work").exists() and is_stored(str(tmp_path / "built"))


def test_neighbours_in_the_source_are_none_in_the_data_set(source, tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    groups = np.repeat(["red", "blue", "house"], 1000)
    source.write_text("\n".join(f"{group} {' '.join(rng.choice([*'abcdefghij'], 12))}" for group in groups))
    stored = build_here(source, tmp_path / "built", tokenizer, BuildSettings(chunk_bytes=9000))
    first = np.array([row[0] for block in stored.texts(0) for row in block])
    parts = first[: len(first) // 10 * 10].reshape(10, -1)
    for group in np.unique(first):
        assert (parts == group).mean(1).min() > 0.2 and (parts == group).mean(1).max() < 0.47


def test_processes_and_hosts_and_chunks_make_the_same_bytes(source, tmp_path, tokenizer):
    alone = contents(build_here(source, tmp_path / "one", tokenizer).folder)
    assert contents(build_here(source, tmp_path / "two", tokenizer, processes=2).folder) == alone
    hosts = [
        threading.Thread(
            target=lambda i=i: subprocess.run([*COMMAND(source, tmp_path / "hosts"), str(i), "2", "1"], check=True)
        )
        for i in range(2)
    ]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    assert contents(tmp_path / "hosts") == alone
    # How the source is cut into chunks decides nothing but the settings that are recorded.
    other = BuildSettings(held_out_share=0.1, max_tokens=12, chunk_bytes=999, shard_bytes=20_000)
    rechunked = contents(build_here(source, tmp_path / "rechunked", tokenizer, other).folder)
    assert {name for name in alone if alone[name] != rechunked[name]} == {"made_of.json", "manifest.json"}


SCRIPT = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from v2t_jax.data.build import BuildSettings, Workers, build
from v2t_jax.parallel.processes import Share
if __name__ == "__main__":
    source, folder, tokenizer, index, count, processes = sys.argv[1:]
    settings = BuildSettings(held_out_share=0.1, max_tokens=12, chunk_bytes=4000, shard_bytes=20_000)
    workers = Workers(int(processes), Share(int(index), int(count)), 60.0)
    build([source], Path(folder), Tokenizer.from_file(tokenizer), settings, workers)
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
        process = subprocess.Popen([*COMMAND(source, folder), "0", "1", "1"])
        while process.poll() is None and len([*folder.glob("work/*")]) < at_least:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.003)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2 and not (folder / "manifest.json").exists()
    (folder / "work" / ".chunk-000001.arrow.dead").write_bytes(b"half")
    (folder / "tokens").mkdir(exist_ok=True)
    (folder / "tokens" / ".00000.array_record.dead").write_bytes(b"half")
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


def test_ctrl_c_ends_workers_too_and_the_build_goes_on(source, tmp_path, tokenizer):
    folder = tmp_path / "built"
    command = [*COMMAND(source, folder), "0", "1", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while (
        process.poll() is None and not (folder / "made_of.json").exists()
    ):  # the workers are about to start: that takes a second or two
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to parent and workers
    _, errors = process.communicate(timeout=60)  # and so stderr has been closed by all of them
    assert process.returncode and "KeyboardInterrupt" in errors and not (folder / "manifest.json").exists()
    whole = contents(build_here(source, tmp_path / "whole", tokenizer).folder)
    assert contents(build_here(source, folder, tokenizer).folder) == whole


def test_what_is_done_is_not_done_again(source, tmp_path, tokenizer, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", die)
        with pytest.raises(KeyboardInterrupt):
            build_here(source, tmp_path / "built", tokenizer)
    monkeypatch.setattr(shards, "write_chunk", die)
    build_here(source, tmp_path / "built", tokenizer)
    monkeypatch.setattr(shards, "write_shard", die)
    assert build_here(source, tmp_path / "built", tokenizer).manifest["counts"]["texts"] == 2000


def test_a_small_vocabulary_keeps_the_commonest_pieces(source, tmp_path, tokenizer):
    source.write_text("\n".join(["the cat sleep " + "ab"[i % 2] * (i % 9 + 1) for i in range(500)] + ["red dog"] * 3))
    settings = BuildSettings(vocabulary_size=4, held_out_share=0.1)
    stored = build_here(source, tmp_path / "built", tokenizer, settings)
    vocabulary = stored.vocabulary(tokenizer)
    kept = {tokenizer.id_to_token(int(i)) for i in vocabulary.vocab_map[2:]}
    assert vocabulary.size == 6 and {"the", "cat", "sleep"} < kept
    assert all(row.min() > EOS and row.max() < 6 for block in stored.texts(0) for row in block)
    assert stored.manifest["counts"]["unknown"] > 0


def test_a_full_disk_stops_in_one_sentence_and_the_build_goes_on_later(source, tmp_path, tokenizer):
    whole = contents(build_here(source, tmp_path / "whole", tokenizer).folder)
    command = COMMAND(source, tmp_path / "built")
    for limit in (3, 60):  # KB a file may have: a chunk doesn't fit, then an ArrayRecord file
        script = command[2].replace(
            "    build(",
            f"    import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit << 10},) * 2)\n    build(",
        )
        done = subprocess.run([*command[:2], script, *command[3:], "0", "1", "1"], stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1
        assert "InputError: The build stopped at" in done.stderr and "File too large" in done.stderr
        assert done.stderr.strip().endswith("run the same command to go on.")
    assert contents(build_here(source, tmp_path / "built", tokenizer).folder) == whole


def damage(folder, what):
    tokens = folder / "tokens" / "00001.array_record"
    if what == "byte":
        data = bytearray(tokens.read_bytes())
        (ids,) = StoredTexts(folder).tokens.read([3], np.dtype("<u2"))
        data[data.index(ids.tobytes()) + 7] ^= 1
        tokens.write_bytes(data)
    elif what == "cut":
        os.truncate(tokens, tokens.stat().st_size // 2)
    elif what == "missing":
        tokens.unlink()
    elif what == "swapped":  # whole records in the wrong place
        shutil.copyfile(folder / "tokens" / "00000.array_record", tokens)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][1]["tokens"] = manifest["shards"][0]["tokens"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif what == "manifest":
        (folder / "manifest.json").unlink()
    elif what == "json":
        (folder / "manifest.json").write_text("{")
    elif what == "format":
        (folder / "manifest.json").write_text('{"format": 99}')
    elif what == "keys":
        (folder / "manifest.json").write_text('{"format": 2}')
    elif what == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif what == "pieces":
        (folder / "pieces.npy").write_bytes(bytes((folder / "pieces.npy").stat().st_size))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("byte", r"Block \d of .*tokens/00001.array_record is damaged"),
        ("swapped", r"Block 0 of .*tokens/00001.array_record is damaged"),
        ("cut", r"00001.array_record has \d+ bytes where its manifest says \d+ \(is it cut off\?\)"),
        ("missing", r"00001.array_record is missing"),
        ("manifest", "manifest.json is missing: .* was never finished; run v2t data build"),
        ("json", "manifest.json is damaged"),
        ("format", "is of format 99, not 2"),
        ("keys", "manifest.json is damaged .*it lacks or garbles 'shards'"),
        ("pieces", "pieces.npy is damaged"),
        ("tokenizer", r"tokenizer.json has 2 bytes where its manifest says \d+"),
    ],
)
def test_damage_is_named(source, tmp_path, tokenizer, what, message):
    folder = build_here(source, tmp_path / "built", tokenizer).folder
    damage(folder, what)
    with pytest.raises(InputError, match=message) as caught:
        stored = StoredTexts(folder)
        for shard in range(2):
            for _ in stored.texts(shard):
                pass
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    if what == "byte":  # what is not read is found by building again
        with pytest.raises(InputError, match="is damaged .its sha256"):
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
        build([], tmp_path / "x", tokenizer, SETTINGS, Workers())
    with pytest.raises(InputError, match="none falls into the held-out share"):
        build_here(source, tmp_path / "x", tokenizer)
    source.write_text("?\n!\n")
    with pytest.raises(InputError, match="hold no text"):
        build_here(source, tmp_path / "y", tokenizer)
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(InputError, match="another tokenizer"):
        StoredTexts(folder).vocabulary(tokenizer)


@pytest.mark.parametrize(
    "changed", [{"max_tokens": 0}, {"max_tokens": 70_000}, {"held_out_share": 0.0}, {"vocabulary_size": -1}]
)
def test_bad_settings_are_refused(changed):
    with pytest.raises(InputError, match=next(iter(changed))):
        BuildSettings(**changed)


@pytest.mark.parametrize("changed", [{"processes": 0}, {"timeout": 0.0}])
def test_bad_workers_are_refused(changed):
    with pytest.raises(InputError):
        Workers(**changed)


def test_a_host_may_find_the_work_done_and_cleared_away(source, tmp_path, tokenizer, monkeypatch):
    def others_work(_):
        monkeypatch.undo()
        build_here(source, tmp_path / "built", tokenizer)

    monkeypatch.setattr(build_module.time, "sleep", others_work)
    found = build_here(source, tmp_path / "built", tokenizer, share=Share(1, 2))
    assert found.manifest["counts"]["texts"] == 2000 and not (tmp_path / "built" / "work").exists()


def test_a_host_that_does_not_come_is_named(source, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(build_module, "POLL_SECONDS", 0.01)
    with pytest.raises(InputError, match=r"Host 1 of 2 has not made .*chunk-000001.arrow .* run alone"):
        build_here(source, tmp_path / "built", tokenizer, share=Share(0, 2), timeout=0.05)
    assert build_here(source, tmp_path / "built", tokenizer).manifest["counts"]["texts"] == 2000


def test_columns_are_written_shard_by_shard_and_keyed_by_what_made_them(source, tmp_path, tokenizer):
    stored = build_here(source, tmp_path / "built", tokenizer)
    made_by = {"embedder": "abc", "dtype": "float16", "max_length": 13}
    writer = ColumnWriter(stored, "vectors", "float16", (3,), made_by)

    def blocks(shard):
        for block in stored.texts(shard):
            yield np.array([[len(row), row[0], row[-1]] for row in block], np.float32)

    assert writer.missing() == [0, 1, 2]
    for shard in (2, 0):
        writer.write(shard, blocks(shard))
    with pytest.raises(InputError, match="manifest.json is missing: .* was never finished"):
        stored.column("vectors")
    again = ColumnWriter(StoredTexts(stored.folder), "vectors", "float16", (3,), made_by)
    assert again.missing() == [1]
    for shard in again.missing():
        again.write(shard, blocks(shard))
    again.finish()
    column = stored.column("vectors")
    expected = [np.concatenate(list(blocks(shard))) for shard in range(3)]
    np.testing.assert_array_equal(column.read(range(len(stored.block_rows))), np.concatenate(expected))
    assert column.made_by == made_by and len(expected[0]) > ROWS
    with pytest.raises(InputError, match=r"made of something else \(it differs in made_by\)"):
        ColumnWriter(stored, "vectors", "float16", (3,), made_by | {"embedder": "def"})
    manifest = Path(stored.folder / "manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match="belongs to another build"):
        StoredTexts(stored.folder).column("vectors")


def test_vocabulary_of_the_whole_tokenizer(source, tmp_path, tokenizer):
    stored = build_here(source, tmp_path / "built", tokenizer)
    np.testing.assert_array_equal(stored.vocabulary(tokenizer).vocab_map, Vocabulary.full(tokenizer).vocab_map)
    assert stored.vocabulary().tokenizer.to_str() == stored.vocabulary(tokenizer).tokenizer.to_str()
