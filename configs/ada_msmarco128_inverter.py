"""The paper's inverter for text-embedding-ada-002: MSMARCO passages of up to 128 tokens, 100 epochs.

    v2t data build collection.tsv --embedder gtr-base --output data/msmarco --held-out-share 0.001
    v2t train configs/ada_msmarco128_inverter.py --workdir runs/ada_msmarco128_inverter

The pieces are T5's, which gtr-base has. The vectors come from an endpoint, so they must be cached before training
(8.8 million texts, 54 GB as float32): `v2t data embed`.

Hardware: 16 chips of TPU v5e or more. Not yet run: training on cached vectors of an endpoint is to come, and its time
isn't known. Expected: BLEU 17.0, token F1 0.54, exact 0.6% (Morris et al. 2023, ada-002 on MSMARCO, 128 tokens).
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import Config, DataConfig, load_recipe


def get_config() -> Config:
    base = load_recipe(str(Path(__file__).with_name("gtr_nq32_inverter.py")))
    stage = replace(base.inverter, num_steps=1_726_700)  # 100 epochs of 8.84 million texts
    return replace(
        base,
        name="ada-msmarco128",
        embedder="text-embedding-ada-002",
        model=replace(base.model, embedding_width=1536, max_length=128),
        data=DataConfig(sources=("data/msmarco",), held_out="data/msmarco"),
        inverter=stage,
        corrector=stage,
    )
