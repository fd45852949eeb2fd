"""The paper's corrector for GTR-base, on top of the inverter from gtr_nq32_inverter.py.

    v2t train configs/gtr_nq32_corrector.py --workdir runs/gtr_nq32_corrector

Hardware: 16 TPU v5e chips (4x4); on fewer, raise `--corrector.optimizer.accumulate-steps`. Not yet run. According to
`v2t bench aot` for v5e:4x4, a step takes at least 34 ms and 10.3 GB per chip, so 100 epochs take at least 9 hours; two
to three times that is usual.
Expected: with 50 steps, BLEU 85.4 and exact match 40.6%; with a sequence beam of 8 as well, BLEU 97.3 and exact match
92.0% (Morris et al. 2023, GTR on NQ).
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import Config, load_recipe


def get_config() -> Config:
    inverter = load_recipe(str(Path(__file__).with_name("gtr_nq32_inverter.py")))
    return replace(inverter, stages=("corrector",), initial_inverter="runs/gtr_nq32_inverter/model")
