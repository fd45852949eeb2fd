"""The packaged model's ranker, which guided edits need, trained beside its inverter and corrector.

    v2t data corpus runs/wide.txt.gz
    v2t train configs/minilm_wordnet_ranker.py --workdir runs/minilm_wordnet_ranker

The inverter makes hypotheses and the corrector is kept; both are the packaged ones. A step learns from 64 texts, two
edited hypotheses of each.

Hardware: 2 CPU cores (AMD EPYC, without bfloat16 units: `--model.t5.dtype float32 --embedder-dtype float32`), where
training takes about 2.5 s a step. How the packaged weights came about is in the model's card, the scores in
docs/search.md.
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import Config, EvalConfig, OptimizerConfig, StageConfig, load_recipe


def get_config() -> Config:
    recipe = load_recipe(str(Path(__file__).with_name("minilm_wordnet.py")))
    return replace(
        recipe,
        stages=("ranker",),
        initial_inverter="minilm-wordnet",
        initial_corrector="minilm-wordnet",
        corrector_from_inverter=False,
        initial_embedding="random",
        partial_hypotheses=False,
        data=replace(
            recipe.data,
            sources=("wordnet", "runs/wide.txt.gz"),
            weights=(1.0, 0.3),
            vocabulary_size=0,
            bucket_lengths=(10, 17),
        ),
        ranker=StageConfig(
            num_steps=3000,
            batch_size=64,
            optimizer=OptimizerConfig(learning_rate=6e-4, schedule="cosine", warmup_steps=100, b2=0.98),
        ),
        evaluation=EvalConfig(every_steps=0, num_examples=100),
    )
