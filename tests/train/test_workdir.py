"""What may change when a run is resumed, and how the rest is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from v2t_jax.config import Config, from_dict, to_dict
from v2t_jax.errors import InputError
from v2t_jax.train.workdir import check_workdir

FREE: list[dict[str, Any]] = [
    {"inverter": {"num_steps": 2000}, "corrector": {"num_steps": 10}},
    {"log_every_steps": 1},
    {"evaluation": {"every_steps": 0, "num_examples": 7, "num_steps": [0, 50], "sequence_beam_width": [8]}},
    {"checkpoint": {"every_steps": 1, "keep": 9}},
    {"mesh": {"fsdp": 2}},
]
DECISIVE: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "seed=0, not 1"),
    ({"inverter": {"optimizer": {"b1": 0.5}}}, r"inverter\.optimizer\.b1=0\.9, not 0\.5"),
    ({"data": {"bucket_lengths": [8, 32]}}, r"data\.bucket_lengths=\(\), not \(8, 32\)"),
    ({"name": "b", "model": {"t5": {"d_ff": 64}}}, r"name='unnamed', not 'b'; model\.t5\.d_ff=2048, not 64"),
]


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Of a run with the default config, as version 0.1 wrote it: without fields that came later."""
    config = to_dict(Config())
    config["model"]["standardise"] = config["model"].pop("standardize")
    del config["data"]["tokenizer"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("changes", FREE, ids=lambda changes: ",".join(changes))
def test_what_decides_neither_batches_nor_parameters_may_change(workdir: Path, changes: dict[str, Any]) -> None:
    check_workdir(from_dict(Config, changes), workdir)


@pytest.mark.parametrize(("changes", "message"), DECISIVE, ids=lambda value: "" if isinstance(value, dict) else value)
def test_what_is_refused_is_named_with_both_values(workdir: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"holds a run of another config, with {message}: give a new --workdir"):
        check_workdir(from_dict(Config, changes), workdir)


def test_an_inverter_whose_corrector_already_trains_keeps_its_length(workdir: Path) -> None:
    (workdir / "corrector" / "checkpoints").mkdir(parents=True)
    config = Config()
    check_workdir(dataclasses.replace(config, corrector=dataclasses.replace(config.corrector, num_steps=9)), workdir)
    with pytest.raises(InputError, match="inverter.num_steps=1000, not 9"):
        check_workdir(dataclasses.replace(config, inverter=dataclasses.replace(config.inverter, num_steps=9)), workdir)
