"""The original's recipe for an embedder with another tokenizer: T5-base against all-MiniLM-L6-v2, both stages.

    v2t data build psgs_w100.tsv --embedder gtr-base --output data/nq --held-out-share 0.001
    v2t train configs/t5_base_minilm.py --workdir runs/t5_base_minilm

Texts and hypotheses are sequences of T5 tokens (gtr-base uses T5's tokenizer). Before they reach the embedder, the host
decodes each batch to text and tokenizes it with MiniLM's tokenizer. Any other embedder works the same way: pass
`--embedder NAME`.

Hardware: 16 TPU v5e chips (4x4), as for gtr_nq32_inverter.py, with a host that tokenizes 512 texts per step (twice that
for the corrector). Not yet run: neither time nor scores are known.
"""

from dataclasses import replace
from pathlib import Path

from v2t_jax.config import Config, load_recipe


def get_config() -> Config:
    base = load_recipe(str(Path(__file__).with_name("gtr_nq32_inverter.py")))
    return replace(
        base,
        name="t5-base-minilm",
        embedder="all-MiniLM-L6-v2",
        stages=("inverter", "corrector"),
        data=replace(base.data, tokenizer="t5-base"),
    )
