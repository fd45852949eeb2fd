"""The paper's inverter for GTR-base: 5 million Wikipedia passages (NQ), up to 32 tokens, 100 epochs.

    v2t data build psgs_w100.tsv --embedder gtr-base --output data/nq --held-out-share 0.001
    v2t train configs/gtr_nq32_inverter.py --workdir runs/gtr_nq32_inverter

Hardware: 16 TPU v5e chips (4x4); on fewer, raise `--inverter.optimizer.accumulate-steps`. Not yet run. According to
`v2t bench aot` for v5e:4x4, a step takes at least 13 ms and 6.1 GB per chip, so 100 epochs take at least 3.5 hours; two
to three times that is usual. The original took days on 4 A6000 GPUs.
Expected: BLEU 31.9, token F1 0.67, exact match 0% (Morris et al. 2023, GTR on NQ, 0 steps).
"""

from dataclasses import replace

from v2t_jax.config import (
    T5_SIZES,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
)


def get_config() -> Config:
    stage = StageConfig(
        num_steps=976_600,  # 100 epochs of 5 million texts
        batch_size=512,  # 128 on each of the original's four GPUs
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=10_000),
    )
    return Config(
        name="gtr-nq32",
        embedder="gtr-base",
        embedder_dtype="bfloat16",
        stages=("inverter",),
        model=ModelConfig(t5=replace(T5_SIZES["t5-base"], dtype="bfloat16"), num_pseudo_tokens=16, max_length=32),
        initial_t5="t5-base",
        data=DataConfig(sources=("data/nq",), held_out="data/nq"),
        inverter=stage,
        corrector=stage,
        evaluation=EvalConfig(
            every_steps=20_000, num_examples=500, num_steps=(0, 1, 20, 50), sequence_beam_width=(1, 8)
        ),
        checkpoint=CheckpointConfig(every_steps=2000),
    )
