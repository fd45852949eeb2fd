"""The whole pipeline in under three minutes on two CPU cores: both stages, evaluation, a model folder.

    v2t train configs/tiny.py --workdir runs/tiny

For watching a training run, and for tests; its scores are poor (BLEU 2). It took 2 min 46 s on 2 cores of an AMD EPYC,
including the final evaluation.
"""

from v2t_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    StageConfig,
    T5Config,
)


def get_config() -> Config:
    t5 = T5Config(
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dropout_rate=0.0,
    )
    optimizer = OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=10)
    return Config(
        name="tiny",
        model=ModelConfig(t5=t5, num_pseudo_tokens=2, max_length=17, projection_dropout=0.0, standardize=True),
        data=DataConfig(vocabulary_size=4000, bucket_lengths=(9, 13, 17)),
        inverter=StageConfig(num_steps=150, batch_size=64, optimizer=optimizer),
        corrector=StageConfig(num_steps=60, batch_size=64, optimizer=optimizer),
        evaluation=EvalConfig(every_steps=50, num_examples=20),
        checkpoint=CheckpointConfig(every_steps=50),
    )
