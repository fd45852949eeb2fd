"""The paper's corrector for text-embedding-ada-002, on the inverter that ada_msmarco128_inverter.py trained.

    v2t train configs/ada_msmarco128_corrector.py --workdir runs/ada_msmarco128_corrector

Its hypotheses and their vectors must be cached before training: `v2t data hypotheses`, which pays the endpoint for one
more vector a text.

Hardware: 16 chips of TPU v5e or more. Not yet run: training on cached vectors of an endpoint is to come, and its time
isn't known. Expected, with 50 steps and a sequence beam of 8: BLEU 55.0, exact 8.0% (Morris et al. 2023, ada-002 on
MSMARCO, 128 tokens).
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import Config, load_recipe


def get_config() -> Config:
    base = load_recipe(str(Path(__file__).with_name("ada_msmarco128_inverter.py")))
    stage = replace(base.corrector, batch_size=128, num_steps=6_906_800)  # 32 on each of the original's four GPUs
    return replace(base, stages=("corrector",), initial_inverter="runs/ada_msmarco128_inverter/model", corrector=stage)
