"""A T5-3B inverter and corrector for GTR-base on a pod: weights sharded over the 16 chips of each slice, 10 epochs.

    v2t data build psgs_w100.tsv --embedder gtr-base --output data/nq --held-out-share 0.001
    v2t train configs/t5_3b_nq32.py --workdir runs/t5_3b_nq32

Hardware: a multiple of 16 chips, such as 16 TPU v5e (4x4); more slices train with larger batches. Not yet run.
According to `v2t bench aot` for v5e:4x4, a step takes at least 0.34 s for the inverter and 0.91 s for the corrector and
9.0 GB per chip, so the stages take at least 2.3 and 6.2 hours; two to three times that is usual. The paper reports no
scores for this size.
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import T5_SIZES, Config, MeshConfig, load_recipe


def get_config() -> Config:
    base = load_recipe(str(Path(__file__).with_name("gtr_nq32_inverter.py")))
    optimizer = replace(base.inverter.optimizer, name="adafactor", warmup_steps=1000)
    stage = replace(base.inverter, num_steps=24_400, batch_size=2048, optimizer=optimizer)
    return replace(
        base,
        name="t5-3b-nq32",
        stages=("inverter", "corrector"),
        model=replace(base.model, t5=replace(T5_SIZES["t5-3b"], dtype="bfloat16", remat="full")),
        initial_t5="t5-3b",
        inverter=stage,
        corrector=stage,
        # Sharded by fsdp alone, the corrector's evaluation wouldn't fit: decoding shards weights over `model` only.
        mesh=MeshConfig(data=-1, fsdp=4, model=4, decode="model"),
    )
