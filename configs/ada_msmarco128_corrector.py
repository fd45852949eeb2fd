r"""The paper's corrector for text-embedding-ada-002, on top of the inverter from ada_msmarco128_inverter.py.

    v2t data hypotheses data/msmarco --name ada_guesses --embeddings ada \
        --model runs/ada_msmarco128_inverter/model --embedder https://api.openai.com/v1 \
        --api.model text-embedding-ada-002 --api.price 0.1 --api.max-cost 120 --api.cache data/answers
    v2t train configs/ada_msmarco128_corrector.py --workdir runs/ada_msmarco128_corrector

Run the inverter's commands first: this recipe reads their data set and column. `hypotheses` pays for one more vector
per text and needs 32 GB of disk, plus 54 GB for the cached answers. Training calls the API only to evaluate the
correction loop on held-out texts; the largest part is the final evaluation: 500 texts, 50 steps, beam 8, hence 64
hypotheses per step (at most 20 dollars at 0.1 per million tokens).

Hardware: 16 TPU v5e chips (4x4). Not yet run. According to `v2t bench aot`, a step takes at least 17 ms and 8.4 GB per
chip, so 100 epochs take at least 33 hours; two to three times that is usual.
Expected with 50 steps and a sequence beam of 8: BLEU 55.0, exact match 8.0% (Morris et al. 2023, ada-002 on MSMARCO,
128 tokens).
"""

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
