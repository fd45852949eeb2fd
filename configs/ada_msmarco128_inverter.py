r"""The paper's inverter for text-embedding-ada-002: MSMARCO passages of up to 128 tokens, 100 epochs.

    export OPENAI_API_KEY=...
    v2t data build collection.tsv --embedder gtr-base --output data/msmarco --held-out-share 0.001
    v2t data embed data/msmarco --name ada --max-length 128 --embedder https://api.openai.com/v1 \
        --api.model text-embedding-ada-002 --api.price 0.1 --api.max-cost 120 --api.cache data/answers
    v2t train configs/ada_msmarco128_inverter.py --workdir runs/ada_msmarco128_inverter

The data set is tokenized with T5's tokenizer, which gtr-base uses. `embed` pays for one vector for each of the 8.8
million texts, once (up to 127 tokens each: 112 dollars at 0.1 per million; pass your provider's price). The column
takes 27 GB. The cached answers in data/answers, which let an interrupted `embed` resume, take another 54 GB until you
delete them. Training calls the API for held-out texts only.

Hardware: 16 TPU v5e chips (4x4). Not yet run. According to `v2t bench aot`, a step takes at least 21 ms and 9.4 GB per
chip, so 100 epochs take at least 10 hours; two to three times that is usual.
Expected: BLEU 17.0, token F1 0.54, exact match 0.6% (Morris et al. 2023, ada-002 on MSMARCO, 128 tokens, 0 steps).
"""

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
