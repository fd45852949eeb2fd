"""The original's recipe for an embedder with another tokenizer: T5-base against all-MiniLM-L6-v2, both stages.

    v2t data build psgs_w100.tsv --embedder gtr-base --output data/nq --held-out-share 0.001
    v2t train configs/t5_base_minilm.py --workdir runs/t5_base_minilm

Texts and hypotheses are T5's tokens (gtr-base has T5's tokenizer); on their way to the embedder, the host turns each
batch back into text and tokenizes it as MiniLM does. Any other embedder works the same way: `--embedder NAME`.

Hardware: as for gtr_nq32_inverter.py, 16 chips of TPU v5e (4x4), and a host that tokenizes 512 texts, twice for the
corrector, in the time of a step. Not yet run: no time and no score are known.
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
