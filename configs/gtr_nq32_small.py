"""A T5-small inverter and corrector for GTR-base, 10 epochs of the paper's texts: a cheaper variant for experiments.

    v2t data build psgs_w100.tsv --embedder gtr-base --output data/nq --held-out-share 0.001
    v2t train configs/gtr_nq32_small.py --workdir runs/gtr_nq32_small

Hardware: 4 TPU v5e chips (2x2) or any GPU or TPU with enough memory; otherwise raise
`--inverter.optimizer.accumulate-steps`. Not yet run. According to `v2t bench aot` for v5e:2x2, a step takes at least 10
ms and 4.1 GB per chip for the inverter, 28 ms and 7.7 GB for the corrector, so the stages take at least 17 and 46
minutes; two to three times that is usual. The paper reports no scores for T5-small.
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import T5_SIZES, Config, load_recipe


def get_config() -> Config:
    base = load_recipe(str(Path(__file__).with_name("gtr_nq32_inverter.py")))
    stage = replace(base.inverter, num_steps=97_660)  # 10 epochs
    return replace(
        base,
        name="gtr-nq32-small",
        stages=("inverter", "corrector"),
        model=replace(base.model, t5=replace(T5_SIZES["t5-small"], dtype="bfloat16")),
        initial_t5="t5-small",
        inverter=stage,
        corrector=stage,
    )
