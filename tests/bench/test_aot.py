"""Compiling for TPUs that aren't here: what is counted, what is refused, and, where libtpu is, one topology."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v2t_jax.bench import aot
from v2t_jax.bench.roofline import CHIPS, Report, Topology, work
from v2t_jax.config import T5_SIZES, Config, ModelConfig, load_recipe
from v2t_jax.errors import InputError
from v2t_jax.models.inverter import Inverter

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="make aot installs libtpu")


def counted(function, *shapes, turns: int = 1) -> np.ndarray:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return work(jax.make_jaxpr(function)(*arrays).jaxpr, turns)


def test_products_are_counted_through_loops_branches_and_gradients():
    same = np.testing.assert_array_equal
    product = np.array([2 * 3 * 5 * 7, 4 * (3 * 5 + 5 * 7 + 3 * 7)])
    same(counted(jnp.matmul, (3, 5), (5, 7)), product)
    same(counted(jax.jit(lambda x, w: jnp.tanh(x) @ w), (3, 5), (5, 7)), product)
    square = counted(jnp.matmul, (3, 5), (5, 5))
    scan = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=4)[0]  # noqa: E731
    same(counted(scan, (3, 5), (5, 5)), square * 4)
    loop = lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x)  # noqa: E731
    same(counted(loop, (3, 5), (5, 5), turns=6), square * 6)
    branch = lambda x, w: jax.lax.cond(x[0, 0] < 1, lambda: x @ w @ w, lambda: x @ w)  # noqa: E731
    same(counted(branch, (3, 5), (5, 5)), square * 2)
    # Backward, each product is two; recomputed, the forward one is made again.
    both = lambda f: lambda x, w: jax.grad(lambda x, w: jnp.sum(f(x @ w)), (0, 1))(x, w)  # noqa: E731
    assert counted(both(jnp.tanh), (3, 5), (5, 7))[0] == 3 * product[0]
    again = jax.checkpoint(lambda x, w: jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w)))
    assert counted(jax.grad(again, (0, 1)), (3, 5), (5, 5))[0] == (2 + 2 + 4) * square[0]


def test_an_inverters_step_is_what_arithmetic_on_paper_gives():
    """T5-base, 16 pseudo-tokens, 32 tokens: every matrix's weights times the tokens that pass it."""
    t5 = T5_SIZES["t5-base"]
    config = ModelConfig(t5=t5, max_length=32)
    params = Inverter(config).abstract_params()
    shapes = [jax.ShapeDtypeStruct((1, 768), jnp.float32), jax.ShapeDtypeStruct((1, 32), jnp.int32)]
    found = work(jax.make_jaxpr(Inverter(config).apply)({"params": params}, *shapes).jaxpr)
    d, ff = 768, 3072
    encoder, decoder = 12 * 16 * (4 * d * d + 2 * d * ff), 12 * (32 * (6 * d * d + 2 * d * ff) + 16 * 2 * d * d)
    attention = 12 * 2 * d * (16 * 16 + 32 * 32 + 32 * 16)
    projection = 768 * 768 + 768 * 768 * 16
    assert found[0] == 2 * (encoder + decoder + attention + projection + 32 * d * 32128)


def test_what_is_recomputed_is_not_kept():
    """The policies act: each keeps less for the backward pass than the one before."""
    kept = {}
    for remat in ("none", "dots", "full"):
        t5 = dataclasses.replace(T5_SIZES["t5-small"], remat=remat)
        config = ModelConfig(t5=t5, max_length=32)
        params = Inverter(config).abstract_params()
        e, ids = jax.ShapeDtypeStruct((7, 768), jnp.float32), jax.ShapeDtypeStruct((7, 32), jnp.int32)

        def left(params, e, ids, config=config):
            return jax.tree.leaves(jax.vjp(lambda p: Inverter(config).apply({"params": p}, e, ids), params)[1])

        kept[remat] = sum(leaf.size for leaf in jax.eval_shape(left, params, e, ids) if 7 in leaf.shape)
    assert kept["none"] > 1.2 * kept["dots"] > 1.5 * kept["full"], kept


def test_the_roofline_is_what_takes_longest():
    seconds = {"compute": 2.0, "memory": 4.0, "ici": 1.0, "dcn": 0.0}
    report = Report("train", 4, 8, {}, 17 * 10**9, 16 * 10**9, {}, 1.5, 3.0, seconds)
    assert (report.step_seconds, report.mfu, report.fits) == (4.0, 0.25, False)
    assert "does not fit" in str(report) and "It lacks 1.00 GB a chip: shard the weights" in str(report)
    memory, sent = {"parameters": 1, "optimizer": 2, "temporaries": 3}, {"count": 9, "bytes": 10**9}
    sends = {"all-reduce": sent, "all-gather": sent, "reduce-scatter": sent}
    fits = Report("train", 4, 8, memory, 10**9, 16 * 10**9, sends, 1.5, 3.0, seconds)
    for shown in (str(report), str(fits)):
        assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    json.dumps(dataclasses.asdict(report))


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("Ran out of memory in memory space hbm. Used 25.5G of 15.75G hbm. Exceeded by 9.75G.", 25.5 * 2**30),
        ("the total memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G).", 20.5 * 2**30 + 100),
    ],
)
def test_the_compilers_refusal_says_how_much_it_wanted(said, needed):
    assert aot._needed(RuntimeError(f"RESOURCE_EXHAUSTED: {said}"), 100) == int(needed)
    with pytest.raises(RuntimeError, match="another"):
        aot._needed(RuntimeError("another"), 100)


def test_without_libtpu_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'jax.tpu"):
        Topology("v5e:4x4")


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "v9:2x2", "v5e:axb", "", "v5e:4x4x", "tpu:2x2"])
def test_topologies_that_are_none(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(InputError, match="There is no topology .* v5e:4x4"):
        Topology(name)


def test_an_embedder_is_known_by_name_or_by_its_folder(tmp_path):
    config = dataclasses.replace(Config(), embedder="gtr-base", embedder_dtype="bfloat16")
    sizes, around = aot.embedder_sizes(config)
    assert (sizes.width, sizes.normalize, sizes.encoder.dtype, around.before) == (768, False, "bfloat16", ())
    with pytest.raises(InputError, match="sizes of the embedder text-embedding-ada-002 aren't known"):
        aot.embedder_sizes(dataclasses.replace(config, embedder="text-embedding-ada-002"))
    bert = {"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert |= {"intermediate_size": 64, "max_position_embeddings": 16, "type_vocab_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(bert))
    sizes, around = aot.embedder_sizes(dataclasses.replace(config, embedder=str(tmp_path)))
    assert (sizes.width, len(around.before)) == (32, 1)


def test_peaks_are_per_chip():
    assert CHIPS["v5e"].dcn == pytest.approx(3.125e9) and CHIPS["v6e"].ici == 400e9


RECIPE = """
from v2t_jax.config import *
def get_config():
    t5 = T5Config(d_model=32, d_kv=8, d_ff=64, num_heads=4, num_encoder_layers=1, num_decoder_layers=1)
    stage = StageConfig(batch_size=ROWS)
    return Config(
        stages=("inverter",), model=ModelConfig(t5=t5, num_pseudo_tokens=2, max_length=8),
        data=DataConfig(vocabulary_size=512), inverter=stage, corrector=stage, mesh=MeshConfig(data=-1, fsdp=2),
    )
"""


ENDPOINT = """
from v2t_jax.config import *
def get_config():
    t5 = T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_encoder_layers=1, num_decoder_layers=1)
    data = DataConfig(sources=("data/x",), held_out="data/x", embeddings="e", hypotheses="h")
    return Config(
        embedder="https://host/v1", api=ApiConfig(model="m"), data=data,
        model=ModelConfig(t5=t5, embedding_width=24, num_pseudo_tokens=2, max_length=8),
    )
"""


@needs_libtpu
@pytest.mark.tpu
def test_a_recipe_for_an_endpoint_compiles_without_an_embedder(tmp_path: Path):
    (tmp_path / "recipe.py").write_text(ENDPOINT)
    config = load_recipe(str(tmp_path / "recipe.py"))
    reports = list(aot.compile_recipe(config, Topology("v5e:2x2"), ("train", "hypotheses", "correct")))
    assert [report.program for report in reports] == ["train inverter", "train corrector", "hypotheses"]
    assert all(report.fits for report in reports)
    # Word-pieces alone: no embedder, and no inverter, since the hypotheses are in a column.
    assert {report.memory.get("frozen", 4 * 512) for report in reports} == {4 * 512}


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.parametrize("rows", [32, 2**24])
def test_a_recipe_compiles_for_tpus_that_are_not_here(rows, tmp_path: Path):
    (tmp_path / "recipe.py").write_text(RECIPE.replace("ROWS", str(rows)))
    arguments = ["v2t", "bench", "aot", "--config", str(tmp_path / "recipe.py"), "--topology", "v5e:2x2", "--json"]
    arguments += ["--programs", "train", "hypotheses"] if rows == 32 else ["--programs", "train"]
    code = f"import sys; sys.argv = {arguments!r}; from v2t_jax.cli.main import main; main()"
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(("starting JAX", "compiling ")) for line in done.stderr.splitlines()), done.stderr
    said = json.loads(done.stdout)
    assert said["compiled, not run"] is True
    train = said["programs"][0]
    if rows != 32:
        assert not train["fits"] and train["needed"] > train["capacity"]
        assert "It lacks " in train["advice"] and "model.t5.remat=full" in train["advice"]
        return
    assert train["fits"] and train["chips"] == 4 and train["collectives"]["all-gather"]["bytes"] > 0
    assert 0 < train["mfu"] < 1 and train["flops"] == train["flops_run"] > 0
    assert train["memory"]["optimizer"] > train["memory"]["params"] > 0
    assert said["programs"][1]["program"] == "hypotheses"
