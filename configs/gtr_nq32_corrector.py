"""The paper's corrector for GTR-base, on the hypotheses of the inverter that gtr_nq32_inverter.py trained.

    v2t train configs/gtr_nq32_corrector.py --workdir runs/gtr_nq32_corrector

@@TIME@@
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import Config, load_recipe


def get_config() -> Config:
    inverter = load_recipe(str(Path(__file__).with_name("gtr_nq32_inverter.py")))
    return replace(inverter, stages=("corrector",), initial_inverter="runs/gtr_nq32_inverter/model")
