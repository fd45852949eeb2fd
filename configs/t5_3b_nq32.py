"""A T5-3B pair for GTR-base on a pod: both stages, weights cut over 16 chips of each slice, 10 epochs.

    v2t data build psgs_w100.tsv --embedder gtr-base --output data/nq --held-out-share 0.001
    v2t train configs/t5_3b_nq32.py --workdir runs/t5_3b_nq32

Hardware: a multiple of 16 chips, such as 16 of TPU v5e (4x4). Not yet run. Compiled for v5e:4x4 (`v2t bench aot`), a
step takes at least 0.34 s for the inverter and 0.91 s for the corrector, so the two at least 2.3 and 6.2 hours; two to
three times that is usual. A chip has 9.0 GB in use at most. More slices train with larger batches. No score is known
for this size.
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
        # Cut by fsdp alone, the corrector's evaluation wouldn't fit: it keeps weights whole, or cut over `model`.
        mesh=MeshConfig(data=-1, fsdp=4, model=4, decode="model"),
    )
