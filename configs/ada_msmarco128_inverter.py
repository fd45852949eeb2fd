"""INVERTER"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import ApiConfig, Config, DataConfig, load_recipe


def get_config() -> Config:
    base = load_recipe(str(Path(__file__).with_name("gtr_nq32_inverter.py")))
    stage = replace(base.inverter, num_steps=1_726_700)  # 100 epochs of 8.84 million texts
    return replace(
        base,
        name="ada-msmarco128",
        embedder="https://api.openai.com/v1",
        api=ApiConfig(model="text-embedding-ada-002"),
        model=replace(base.model, embedding_width=1536, max_length=128),
        data=DataConfig(sources=("data/msmarco",), held_out="data/msmarco", embeddings="ada"),
        inverter=stage,
        corrector=stage,
    )
