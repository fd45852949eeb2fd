r"""The paper's corrector for text-embedding-ada-002, on the inverter that ada_msmarco128_inverter.py trained.

    v2t data hypotheses data/msmarco --name ada_guesses --embeddings ada \
        --model runs/ada_msmarco128_inverter/model --embedder https://api.openai.com/v1 \
        --api.model text-embedding-ada-002 --api.price 0.1 --api.max-cost 120 --api.cache data/answers
    v2t train configs/ada_msmarco128_corrector.py --workdir runs/ada_msmarco128_corrector

After the inverter's commands, whose data set and column it reads. `hypotheses` pays for one more vector a text; it
takes 32 GB, and 54 GB of answers. Training asks only where held-out texts are corrected; the most of that is the final
evaluation: 500 texts, 50 steps of beam 8 and so 64 texts each (20 dollars at most, at 0.1 a million tokens).

Hardware: 16 chips of TPU v5e (4x4). Not yet run. Compiled for them (`v2t bench aot`), a step takes at least 17 ms and
8.4 GB a chip, so 100 epochs at least 33 hours; two to three times that is usual.
Expected, with 50 steps and a sequence beam of 8: BLEU 55.0, exact 8.0% (Morris et al. 2023, ada-002 on MSMARCO, 128
tokens).
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
