"""CORRECTOR"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import Config, load_recipe


def get_config() -> Config:
    base = load_recipe(str(Path(__file__).with_name("ada_msmarco128_inverter.py")))
    stage = replace(base.corrector, batch_size=128, num_steps=6_906_800)  # 32 on each of the original's four GPUs
    return replace(
        base,
        stages=("corrector",),
        initial_inverter="runs/ada_msmarco128_inverter/model",
        data=replace(base.data, hypotheses="ada_guesses"),
        corrector=stage,
    )
