"""The paper's corrector for GTR-base, on the hypotheses of the inverter that gtr_nq32_inverter.py trained.

    v2t train configs/gtr_nq32_corrector.py --workdir runs/gtr_nq32_corrector

Hardware: 16 chips of TPU v5e (4x4); on fewer, with `--corrector.optimizer.accumulate-steps`. Not yet run. Compiled for
v5e:4x4 (`v2t bench aot`), it takes 10.3 GB a chip and a step at least 34 ms, so 100 epochs at least 9 hours; two to
three times that is usual. Expected, with 50 steps: BLEU 85.4, exact 40.6%; with a sequence beam of 8: BLEU 97.3, exact
92.0% (Morris et al. 2023, GTR on NQ).
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import Config, load_recipe


def get_config() -> Config:
    inverter = load_recipe(str(Path(__file__).with_name("gtr_nq32_inverter.py")))
    return replace(inverter, stages=("corrector",), initial_inverter="runs/gtr_nq32_inverter/model")
