"""The commands of `v2t bench` beside decode and train: what they print, compare and estimate."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.helpers.command_line import status_of
from tests.helpers.tiny_model import make_model
from v2t_jax.bench.command import Measurement
from v2t_jax.bench.compare import compare
from v2t_jax.bench.decode import Decode
from v2t_jax.bench.estimate import Hardware, estimate, hardware
from v2t_jax.bench.measure import Row, measure
from v2t_jax.bench.peaks import Peak
from v2t_jax.cli import bench
from v2t_jax.config import T5_SIZES, T5Config, load_recipe
from v2t_jax.errors import InputError

RECIPE = """
from v2t_jax.config import *
def get_config():
    t5 = T5Config(d_model=32, d_kv=8, d_ff=64, num_heads=4, num_encoder_layers=1, num_decoder_layers=1)
    stage = StageConfig(batch_size=12, num_steps=7)
    return Config(
        name="small", model=ModelConfig(t5=t5, num_pseudo_tokens=2, max_length=8),
        data=DataConfig(vocabulary_size=64), inverter=stage, corrector=stage,
    )
"""
RANDOM, TRAINED = ("--recipe", "M/recipe.py"), ("--model", "M/tiny")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder)
    (folder / "recipe.py").write_text(RECIPE)
    return folder


@pytest.fixture
def run(models: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `v2t bench ARGUMENTS`; `M/` in an argument is the folder of models."""

    def run(*arguments: str) -> tuple[int, str, str]:
        real = [argument.replace("M/", f"{models}/") for argument in arguments]
        return status_of("bench", *real), *capsys.readouterr()

    return run


def test_embed(run: Run) -> None:
    arguments = ("embed", "--embedder", "M/embedder", "--num-tokens", "8", "--batch-size", "4", "--repeats", "1")
    status, out, _ = run(*arguments, "--json")
    network, whole = json.loads(out)["rows"]
    assert status == 0 and network["mfu"] > 0 and whole["flops"] is None
    assert network["tokens_per_second"] == pytest.approx(8 * network["sequences_per_second"])  # no padding
    assert whole["tokens_per_second"] == pytest.approx(8 * whole["sequences_per_second"])
    assert run(*arguments[:3], "--num-tokens", "999")[2].endswith("tokens of a text; give --num-tokens 32 or less.\n")


def test_correct_with_a_model_and_with_random_weights(run: Run) -> None:
    sizes = ("--batch-size", "2", "--num-steps", "1", "--sequence-beam-width", "1", "--repeats", "1", "--json")
    documents = [json.loads(run("correct", *what, *sizes)[1]) for what in (RANDOM, TRAINED)]
    (random,), (trained,) = (document["rows"] for document in documents)
    assert "small with random weights, float32, 1 steps, beam 1, batch 2" in random["name"] and random["flops"] > 0
    assert "tiny, float32" in trained["name"] and trained["flops"] is None and trained["compile_seconds"] > 0
    assert "--num-steps is 0; give a number from 1" in run("correct", "--num-steps", "0")[2]


@dataclass(frozen=True, kw_only=True)
class Sleep(Measurement):
    def rows(self) -> Iterator[Row]:
        yield measure("sleep", lambda: time.sleep(0.01), self.repeats, 1)


def test_all_is_one_document(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(T5_SIZES, "t5-small", T5Config(48, 16, 4, 32, 2, 1, 1))
    small = Decode(size="t5-small", batch_size=(1,), num_tokens=2)
    monkeypatch.setattr(bench, "SMALL", (Sleep(), small))
    files = ["--plot", str(tmp_path / "roof.png"), "--profile", str(tmp_path / "trace")]
    status, out, _ = run("all", "--repeats", "2", "--json", *files)
    found = json.loads(out)
    assert status == 0 and [len(row["turns"]) for row in found["rows"]] == [2, 2]
    assert set(found) == {"date", "processor", "cores", "device", "versions", "rows"} and found["device"] == "cpu"
    assert (tmp_path / "roof.png").stat().st_size > 1000 and list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_all_as_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SMALL", (Sleep(), Sleep()))
    status, out, _ = run("all", "--repeats", "1")
    assert status == 0 and out.count("(median of 1") == 2 and out.splitlines()[-1].endswith(f"jax {jax.__version__}")
    assert "names no format for a plot" in run("all", "--plot", "roof.txt")[2]
    assert "--repeats is 0; give at least 1" in run("all", "--repeats", "0")[2]


def written(file: Path, **rows: list[float]) -> str:
    found = [
        {"name": name, "seconds": sorted(t)[len(t) // 2], "turns": [{"wall": x} for x in t]} for name, t in rows.items()
    ]
    about = {"date": "2026-01-01", "processor": "[x]", "cores": 2, "device": "cpu"}
    file.write_text(json.dumps(about | {"rows": found}))
    return str(file)


def test_compare_marks_what_the_spread_explains(run: Run, tmp_path: Path) -> None:
    before = written(tmp_path / "a", x=[4.0, 4.1, 4.2, 4.3], y=[1.0, 2.0, 3.0, 4.0], z=[9.0], gone=[1.0])
    after = written(tmp_path / "b", x=[2.0, 2.1, 2.2, 2.3], y=[2.5, 0.5, 3.5, 4.5], z=[1.0], new=[1.0])
    status, out, _ = run("compare", before, after, "--json")
    x, y, z = json.loads(out)
    assert status == 0 and [row["name"] for row in (x, y, z)] == ["x", "y", "z"]
    assert (x["distinct"], y["distinct"], z["distinct"]) == (True, False, False)
    assert (x["speedup"], z["speedup"]) == (pytest.approx(4.2 / 2.2), 9.0)
    lines = run("compare", before, after)[1].splitlines()
    assert [line.endswith("within the spread") for line in lines[-3:]] == [False, True, True]
    assert lines[0] == "before: 2026-01-01, [x], 2 cores, cpu" and "1.91x" in lines[-3]
    other = written(tmp_path / "c", w=[1.0])
    assert "have no measurement in common" in run("compare", before, other)[2]
    (tmp_path / "d").write_text('{"rows": 1}')
    assert "is no document of v2t bench" in run("compare", before, str(tmp_path / "d"))[2]
    assert "can't be read (No such file" in run("compare", before, str(tmp_path / "e"))[2]


def test_the_same_turns_differ_in_nothing() -> None:
    rows: dict[str, Any] = {"rows": {"x": (1.0, [1.0, 1.1, 1.2, 1.3])}}
    assert [(change.speedup, change.distinct) for change in compare(rows, rows)] == [(1.0, False)]


@pytest.mark.parametrize(
    ("name", "devices", "flops"),
    [("h100", 1, 989e12), ("h100x8", 8, 989e12), ("v5e-16", 16, 197e12), ("v5p-128", 64, 459e12), ("v4", 1, 275e12)],
)
def test_hardware(name: str, devices: int, flops: float) -> None:
    assert (hardware(name).devices, hardware(name).peak.flops) == (devices, flops)


@pytest.mark.parametrize("name", ["", "h100x0", "v5p-3", "v9-8", "h100x", "8xh100"])
def test_hardware_that_is_none(name: str) -> None:
    with pytest.raises(InputError, match="There is no hardware .* as h100x8, v5e-16 or v5p-128"):
        hardware(name)


def test_an_estimate_is_the_longer_of_arithmetic_and_memory(models: Path) -> None:
    config, options = load_recipe(str(models / "recipe.py")), (0.5, 1000, 3, 2)
    fast = estimate(config, Hardware("x", 1, Peak(1e9, 1e30, "")), *options)
    assert [part.part for part in fast] == ["train inverter", "train corrector", "invert 1,000 vectors"]
    for part in fast:
        assert part.bound == "arithmetic" and part.hours == pytest.approx(part.runs * part.flops / 1e9 / 0.5 / 3600)
    assert fast[0].runs == 7 and fast[0].flops < fast[1].flops  # whose hypotheses are decoded in the step
    slow = estimate(config, Hardware("x", 1, Peak(1e30, 1e3, "")), *options)
    assert {part.bound for part in slow} == {"memory"}
    # Five devices take three of the twelve texts each, the last one none: a quarter of one device's time.
    split = estimate(config, Hardware("x", 5, Peak(1e9, 1e30, "")), *options)
    assert all(part.device_hours == pytest.approx(5 * part.hours) for part in split)
    assert split[0].hours == pytest.approx(fast[0].hours / 4, rel=0.01)
    assert split[0].flops == pytest.approx(fast[0].flops, rel=0.01)
    assert split[2].hours == pytest.approx(fast[2].hours / 5)
    with pytest.raises(InputError, match="mfu is 1.5; give a share"):
        estimate(config, Hardware("x", 1, Peak(1e9, 1e9, "")), 1.5, *options[1:])


def test_estimate(run: Run) -> None:
    arguments = ("estimate", "M/recipe.py", "--hardware", "v5p-128", "--num-vectors", "1000")
    status, out, _ = run(*arguments, "--json")
    found = json.loads(out)
    assert status == 0 and found["estimated, not measured"] is True and found["hardware"]["devices"] == 64
    out = run(*arguments)[1]
    assert "small on 64 x TPU v5p" in out and "30% of the published peak is assumed" in out
    assert "--mfu is 0.0; give a share" in run(*arguments, "--mfu", "0")[2]
