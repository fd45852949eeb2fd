"""The original itself, live: its own pairs give the same here, and it reads what ours writes."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import upstream_pair
from tests.helpers.equivalence import close, load
from tests.helpers.upstream_pair import BEAMS, NAMES, SEARCHES, embedder_of, read_pair, read_recorded, record_of
from tests.oracle.original import ROOT, Original, run_upstream
from v2t_jax.errors import InputError
from v2t_jax.inversion import pipeline
from v2t_jax.inversion.upstream import rank
from v2t_jax.vec2text.convert import from_vec2text

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]

FRESH = {"seed": 11, "d_model": 40, "num_repeat_tokens": 5, "max_seq_length": 12, "steps": 120}


def run_v2t(*arguments: str) -> str:
    command = [sys.executable, "-c", "from v2t_jax.cli.main import main; main()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh pair, saved as .bin, and the golden ones; all recorded anew."""
    folder = tmp_path_factory.mktemp("upstream")
    for name in NAMES:
        upstream_pair.write_pair(load(name), folder / name, head=True)
    fresh = str(folder / "fresh")
    golden = [["record", str(folder / name)] for name in NAMES]
    run_upstream(["make", fresh, FRESH], ["record", fresh], *golden, ["beams", fresh])
    return folder


@pytest.fixture(scope="module")
def converted(root: Path) -> Path:
    sources = [str(root / "fresh" / name) for name in ("inverter", "corrector", "t5-base")]
    from_vec2text(root / "model", *sources, str(embedder_of(root / "fresh")))
    return root / "model"


@pytest.fixture(scope="module")
def model(converted: Path) -> pipeline.InversionPipeline:
    return pipeline.load(str(converted))


@pytest.mark.parametrize("name", NAMES)
def test_golden_records_are_what_the_original_does(name: str, root: Path) -> None:
    live, golden = read_recorded(root / name), record_of(load(name))
    assert set(live) == set(golden)
    for key, value in golden.items():
        if np.issubdtype(value.dtype, np.floating):
            np.testing.assert_allclose(live[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(live[key], value, err_msg=key)


def test_golden_beams_are_what_its_transformers_gives(root: Path) -> None:
    golden = load(BEAMS)
    with np.load(root / "fresh" / "beams.npz") as live:
        assert set(live) == set(golden)
        np.testing.assert_array_equal(live["decode/0/ids"], golden["decode/0/ids"])
        np.testing.assert_allclose(live["decode/0/scores"], golden["decode/0/scores"], rtol=1e-5, atol=1e-5)


def test_logits_of_a_fresh_pair(root: Path) -> None:
    upstream_pair.check_logits(read_pair(root / "fresh"), read_recorded(root / "fresh"))


@pytest.mark.parametrize(("num_steps", "width"), SEARCHES)
def test_every_step_of_a_fresh_pair(num_steps: int, width: int, root: Path, model: pipeline.InversionPipeline) -> None:
    upstream_pair.check_search(model, read_recorded(root / "fresh"), num_steps, width)


def test_the_original_reads_what_ours_writes(root: Path, converted: Path) -> None:
    """By the commands: one invocation there, one back."""
    back = root / "back"
    run_v2t("convert", "--to", "vec2text", str(converted), str(back))
    for name in ("t5-base", "sentence-transformers"):
        shutil.copytree(root / "fresh" / name, back / name)
    shutil.copy(root / "fresh" / "spec.json", back)
    run_upstream(["record", str(back)])
    live, ours = read_recorded(root / "fresh"), read_recorded(back)
    for key in ("inverter_logits", "corrector_logits"):
        close(ours[key], live[key], 1e-6, key)
    for search in ("0/0", "3/0", "3/2", "3/4"):
        texts = f"search/{search}/texts"
        np.testing.assert_array_equal(ours[texts], live[texts])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 16, 17, 25, 64, 100])
def test_equal_scores_are_ranked_as_torch_does(size: int) -> None:
    import torch

    rng = np.random.default_rng(size)
    for different in (1, 2, 1 + size // 4, size):
        for _ in range(30):
            scores = rng.integers(0, different, size).astype(np.float32) / 7
            expected = torch.from_numpy(scores).topk(size).indices.numpy()
            np.testing.assert_array_equal(rank(scores), expected)


def test_a_pair_is_searched_as_it_is_recorded(root: Path) -> None:
    """By the process that `compare` takes turns with; it ends with its input."""
    record = read_recorded(root / "fresh")
    with Original(root / "fresh", reproducible=True) as original:  # as where it was recorded
        for num_steps, width in ((None, 0), (3, 2)):
            took, texts = original.invert(record["e"], num_steps, width, 128)
            assert took.wall > 0
            assert texts == record[f"search/{num_steps or 0}/{width}/texts"].tolist()
    assert original.process.returncode == 0


def test_searches_of_random_weights_are_compared() -> None:
    from tests.oracle import compare

    sizes = {"vocab_size": 400, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
    gtr = {**sizes, "d_model": 768, "num_layers": 1}
    spec = {"seed": 0, "num_repeat_tokens": 4, "max_seq_length": 8, "t5": sizes, "gtr": gtr}
    (found,) = compare.compare_hypotheses(3, 1, spec)
    assert found["torch_seconds"] > 0
    steps = list(compare.compare_correction((2,), ((1, 1, 1), (3, 2, 1)), spec))
    assert [len(one["turns"]) for one in steps] == [1, 1]


def damage(kind: str, file: Path) -> None:
    import torch

    if kind == "code":
        torch.save({"weight": torch.zeros(2), "run": Path("/")}, file)
    elif kind == "list":
        torch.save([torch.zeros(2)], file)
    else:
        file.write_bytes(file.read_bytes()[:3000] if kind == "cut" else b"")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("code", "is damaged or contains more than weights .UnpicklingError: it refers to pathlib.PosixPath"),
        ("list", "is not a dict of tensors by name; save a model's state_dict"),
        ("cut", "is damaged or contains more than weights"),
        ("empty", "is damaged or contains more than weights"),
    ],
)
def test_pickles_that_are_not_weights(kind: str, message: str, root: Path, tmp_path: Path) -> None:
    pair = shutil.copytree(root / "fresh", tmp_path / "pair")
    damage(kind, pair / "inverter" / "pytorch_model.bin")
    with pytest.raises(InputError, match=message):
        read_pair(pair)
