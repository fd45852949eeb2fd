"""The packaged model: inverter, corrector and ranker for all-MiniLM-L6-v2, texts of up to 16 word-pieces.

    v2t data corpus runs/wide.txt.gz
    v2t train configs/minilm_wordnet.py --workdir runs/minilm_wordnet

WordNet's glosses, and for variety 562,000 sentences of other kinds, from the packages that `v2t data corpus` lists.
Not yet run in one go: the packaged weights come from several runs, each of which went on from the last. For what they
were, their hardware, times and scores see the model card (v2t_jax/assets/models/minilm-wordnet).

On a CPU without bfloat16 units add `--model.t5.dtype float32 --embedder-dtype float32`.
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
        d_model=384,
        d_kv=64,
        d_ff=1536,
        num_heads=6,
        num_encoder_layers=2,
        num_decoder_layers=3,
        dropout_rate=0.0,
        dtype="bfloat16",
        scan_unroll=3,
    )
    return Config(
        name="minilm-wordnet",
        embedder="all-MiniLM-L6-v2",
        embedder_dtype="bfloat16",
        model=ModelConfig(
            t5=t5,
            num_pseudo_tokens=4,
            max_length=17,
            projection_dropout=0.0,
            standardize=True,
            bag_of_words=True,
        ),
        initial_embedding="embedder",
        stages=("inverter", "corrector", "ranker"),
        corrector_from_inverter=True,
        shared_table=True,
        partial_hypotheses=True,
        edited_hypotheses=True,
        data=DataConfig(
            sources=("wordnet", "runs/wide.txt.gz"),
            weights=(1.0, 0.25),
            span_share=0.1,
            bucket_lengths=(10, 17),
        ),
        inverter=StageConfig(
            num_steps=7500,
            batch_size=64,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=200, b2=0.98),
        ),
        corrector=StageConfig(
            num_steps=4000,
            batch_size=64,
            optimizer=OptimizerConfig(learning_rate=7e-4, schedule="cosine", warmup_steps=200, b2=0.98),
        ),
        ranker=StageConfig(
            num_steps=5000,
            batch_size=64,
            optimizer=OptimizerConfig(learning_rate=6e-4, schedule="linear", warmup_steps=200, b2=0.98),
        ),
        evaluation=EvalConfig(every_steps=1500, num_examples=100),
        checkpoint=CheckpointConfig(every_steps=250),
    )
