"""The benchmarks run, do the work that they time, and import no torch; beside torch, both sides do the same work."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v2t_jax
from v2t_jax.bench import decode, measure, train
from v2t_jax.cli import main as cli
from v2t_jax.config import T5_SIZES, ModelConfig, T5Config
from v2t_jax.decode.state import EOS
from v2t_jax.models.ranker import NETWORKS
from v2t_jax.models.t5 import T5

TINY = T5Config(
    vocab_size=48,
    d_model=16,
    d_kv=4,
    d_ff=32,
    num_heads=2,
    num_encoder_layers=2,  # as many as the decoder has: `generate` makes its cache by this number
    num_decoder_layers=2,
    dropout_rate=0.0,
)


def test_importing_the_benchmarks_does_not_import_torch() -> None:
    code = "import v2t_jax.bench.decode, v2t_jax.bench.train, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"False\n"


def test_torch_is_imported_in_one_function_alone() -> None:
    """tests/test_imports.py looks at import statements; `importlib.import_module("torch")` is none."""
    package = Path(v2t_jax.__file__).parent
    asking = []
    for path in package.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                named = [a for call in calls for a in call.args if isinstance(a, ast.Constant) and a.value == "torch"]
                asking += [f"{path.relative_to(package)}:{function.name}" for _ in named]
    assert asking == ["interop/torch_files.py:_read_legacy"]


def test_a_row_is_of_the_calls_after_the_first() -> None:
    calls: list[int] = []
    row = measure.measure("work", lambda: calls.append(1), 3, sequences=8, tokens=40)
    assert len(calls) == 4 and len(row.turns) == 3
    assert row.tokens_per_second == pytest.approx(5 * row.sequences_per_second)
    assert str(row).startswith("work:\n  0.000 s (median of 3") and row.mfu is None and row.compile_seconds is None


@pytest.mark.parametrize("command", ["decode", "train"])
def test_the_commands_print_one_document(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(T5_SIZES, "t5-large", TINY)
    size = ["--size", "t5-large", "--num-tokens", "4", "--repeats", "1", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["v2t", "bench", command, "--json", *size])
    cli.main()
    (found,) = json.loads(capsys.readouterr().out)["rows"]
    assert found["seconds"] > 0 and "t5-large, float32, batch 2" in found["name"] and len(found["turns"]) == 1
    assert found["tokens_per_second"] == pytest.approx(8 / found["seconds"])
    assert found["flops"] > 0 and found["xla_flops"] > 0 and found["compile_seconds"] > 0
    monkeypatch.setattr(sys, "argv", ["v2t", "bench", command, "--num-tokens", "0"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--num-tokens is 0; give at least 1" in capsys.readouterr().err


def test_a_step_is_of_as_many_texts_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(T5_SIZES, "t5-large", TINY)
    command = train.Train(size="t5-large", num_tokens=4, num_pseudo_tokens=2, embedding_width=8, repeats=1)
    (between,) = dataclasses.replace(command, batch_size=48).rows()
    limit = between.needed
    monkeypatch.setattr(type(jax.devices()[0]), "memory_stats", lambda _: {"bytes_limit": limit})
    (row,) = dataclasses.replace(command, batch_size=16, fill=True).rows()
    assert "batch 32 x 4 tokens" in row.name and row.needed < limit


def test_decoding_makes_exactly_as_many_tokens_and_never_ends() -> None:
    params = T5(TINY).init_params(jax.random.key(0))
    ids = np.asarray(jax.jit(decode.generate, static_argnums=(0, 3))(TINY, params, jnp.full((3, 4), 5), 6))
    assert ids.shape == (3, 6) and not (ids == EOS).any()


@pytest.mark.parametrize("network", ["inverter", "corrector"])
def test_the_training_step_learns(network: train.Network) -> None:
    config = ModelConfig(t5=TINY, embedding_width=8, num_pseudo_tokens=2, max_length=4, projection_dropout=0.0)
    e = np.random.default_rng(0).standard_normal((2, 8), np.float32)
    params = NETWORKS[network](config).init_params(jax.random.key(0))
    step = train.Step(config, params, e, np.full((2, 4), 7), network)
    first, second = step(), step()
    assert second < first


@pytest.mark.oracle
def test_tokens_and_losses_are_those_of_torch() -> None:
    compare = pytest.importorskip("tests.oracle.compare")
    options = decode.Decode(batch_size=(1, 3), num_tokens=5, source_length=4, repeats=1)
    assert len(list(compare.compare_decoding(options, TINY))) == 2
    small = train.Train(batch_size=2, num_tokens=4, num_pseudo_tokens=2, embedding_width=8, repeats=1)
    assert len(list(compare.compare_training(small, TINY))) == 2


@pytest.mark.oracle
def test_turns_alternate_and_their_ratio_is_that_of_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = pytest.importorskip("tests.oracle.compare")
    order: list[str] = []
    compare.take_turns("x", lambda: order.append("ours"), lambda: order.append("torch"), repeats=3)
    assert order == ["ours", "torch"] * 3
    # The machine was busy in the second turn.
    turns = iter([(1.0, 1.0), (2.0, 3.0), (10.0, 1.0), (20.0, 3.0), (1.0, 1.0), (4.0, 3.0)])
    monkeypatch.setattr(compare, "turn", lambda run: compare.Turn(*next(turns)))
    found = compare.take_turns("x", lambda: None, lambda: None, repeats=3)
    assert (found["ours_seconds"], found["torch_seconds"], found["speedup"]) == (1.0, 4.0, 2.0)
    assert (found["ours_cpu_seconds"], found["torch_cpu_seconds"]) == (1.0, 3.0)
    json.dumps(found)
