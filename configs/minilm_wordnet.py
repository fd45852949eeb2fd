"""The packaged model: inverter and corrector for all-MiniLM-L6-v2, texts of up to 16 word-pieces, trained on WordNet.

    v2t data corpus runs/gcide.txt.gz --sources gcide
    v2t train configs/minilm_wordnet.py --workdir runs/minilm_wordnet

A part of GCIDE (Webster 1913, GPL-2+) joins each epoch, for variety: the inverter sees every WordNet line about three
times. (The packaged weights were trained on GCIDE as an earlier version split it into sentences.)

Hardware, time and scores: see the README's table and the model card in v2t_jax/assets/models/minilm-wordnet.
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
        corrector_from_inverter=True,
        partial_hypotheses=True,
        data=DataConfig(
            sources=("wordnet", "runs/gcide.txt.gz"),
            weights=(1.0, 0.15),
            vocabulary_size=19_200,  # the largest round number at which the model stays below 40 MB
            span_share=0.2,
            bucket_lengths=(6, 9, 11, 13, 15, 17),
        ),
        inverter=StageConfig(
            num_steps=7500,
            batch_size=64,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=200, b2=0.98),
        ),
        corrector=StageConfig(
            num_steps=2700,
            batch_size=64,
            optimizer=OptimizerConfig(learning_rate=7e-4, schedule="cosine", warmup_steps=200, b2=0.98),
        ),
        evaluation=EvalConfig(every_steps=1500, num_examples=100),
        checkpoint=CheckpointConfig(every_steps=250),
    )
