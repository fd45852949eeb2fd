"""The benchmarks: torch is asked for in one place and only when one runs; both sides do the same work."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v2t_jax
from v2t_jax.bench import Comparison, Turn, decode, take_turns, train
from v2t_jax.cli import main as cli
from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.errors import InputError
from v2t_jax.models import inverter, t5

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


def test_torch_is_asked_for_by_two_functions_alone() -> None:
    """tests/test_imports.py looks at import statements; `importlib.import_module("torch")` is none."""
    package = Path(v2t_jax.__file__).parent
    asking = []
    for path in package.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                named = [a for call in calls for a in call.args if isinstance(a, ast.Constant) and a.value == "torch"]
                asking += [f"{path.relative_to(package)}:{function.name}" for _ in named]
    assert sorted(asking) == ["bench/__init__.py:load_torch", "interop/checkpoint.py:_open_pickle"]


class NoTorch:
    """An import hook for a machine without torch."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name=name)


@pytest.mark.parametrize("command", ["decode", "train"])
def test_without_torch_one_sentence_says_how_to_get_it(command, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoTorch(), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["v2t", "bench", command])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install torch" in error


def test_turns_alternate_and_their_ratio_is_that_of_neighbours() -> None:
    order: list[str] = []
    take_turns("x", lambda: order.append("ours"), lambda: order.append("torch"), repeats=3)
    assert order == ["ours", "torch"] * 3
    ours = (Turn(1.0, 1.0), Turn(10.0, 1.0), Turn(1.0, 1.0))  # the machine was busy in the second turn
    theirs = (Turn(2.0, 3.0), Turn(20.0, 3.0), Turn(4.0, 3.0))
    found = Comparison("x", ours, theirs).to_dict()
    assert (found["ours_seconds"], found["torch_seconds"], found["speedup"]) == (1.0, 4.0, 2.0)
    assert (found["ours_cpu_seconds"], found["torch_cpu_seconds"]) == (1.0, 3.0)
    json.dumps(found)
    with pytest.raises(InputError, match="at least one turn"):
        take_turns("x", lambda: None, lambda: None, repeats=0)


def test_our_side_makes_exactly_as_many_tokens_and_never_ends() -> None:
    params = t5.init(TINY, jax.random.key(0))
    ids = np.asarray(jax.jit(decode.generate, static_argnums=(0, 3))(TINY, params, jnp.full((3, 4), 5), 6))
    assert ids.shape == (3, 6) and not (ids == decode.SPECIAL.eos).any()


def test_our_train_step_learns() -> None:
    config = ModelConfig(t5=TINY, embedding_width=8, num_pseudo_tokens=2, max_length=4, projection_dropout=0.0)
    e = np.random.default_rng(0).standard_normal((2, 8), np.float32)
    step = train.OurStep(config, inverter.init(config, jax.random.key(0)), e, np.full((2, 4), 7))
    first, second = step(), step()
    assert second < first


@pytest.mark.oracle
def test_tokens_and_losses_are_those_of_torch() -> None:
    options = decode.Decode(batch_size=(1, 3), num_tokens=5, source_length=4, repeats=1)
    assert len(decode.compare(options, TINY)) == 2
    small = train.Train(batch_size=2, num_tokens=4, num_pseudo_tokens=2, embedding_width=8, repeats=1)
    assert train.compare(small, TINY).speedup > 0
