"""Prints how far ours is from transformers and from the original, as the README's table.

    python -m tests.oracle.table        (in the environment of `make oracle`)

Encoders and T5, tiny, with three sets of random weights, in float32 (torch in float64); the worst of all. Then pairs
that the original trained, and every step of its searches. Tokens that differ end the program.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.helpers import upstream_pair
from tests.helpers.equivalence import check_t5_decoding, load, one_less_cosine, run_encoder, run_t5
from tests.oracle.encoders import MODELS, encoder_case
from tests.oracle.generate import CASES
from v2t_jax.inversion import pipeline
from v2t_jax.parallel.compile_cache import enable_compilation_cache, user_cache_dir
from v2t_jax.vec2text.convert import from_vec2text

SEEDS = (2, 3, 4)
T5_SEEDS = (1, 2, 5)  # their search is short
PAIRS = {"vec2text_b": "BERT embedder", "vec2text_gtr": "T5 embedder"}


def row(name: str, difference: float, one_less: float | None, tokens: int | None) -> None:
    cosine = "" if one_less is None else f"{one_less:.1e}"
    compared = "" if tokens is None else f"{tokens:,}, all equal"
    print(f"| {name} | {difference:.1e} | {cosine} | {compared} |", flush=True)


def main() -> None:
    enable_compilation_cache(user_cache_dir() / "xla-tests")  # the tests before it left much
    print("| architecture | largest difference of hidden states | 1 - cosine of pooled vectors | generated tokens |")
    print("|---|---:|---:|---:|")
    for name, (_, model, _, pooling) in MODELS.items():
        differences, cosines = [], []
        for seed in SEEDS:
            case = encoder_case(name, seed)
            hidden, pooled = run_encoder(case)
            differences.append(np.abs(hidden - np.where(case["mask"][:, :, None] != 0, case["hidden"], 0)).max())
            cosines.append(one_less_cosine(pooled, case["pooled"]))
        row(f"{name} ({model}, {pooling})", max(differences), max(cosines), None)
    for name in ("t5_v1_0", "t5_v1_1"):
        differences, tokens = [], 0
        for seed in T5_SEEDS:
            case = CASES[name](seed)
            encoded, logits = run_t5(case)
            differences += [np.abs(encoded - case["encoded"]).max(), np.abs(logits - case["logits"]).max()]
            tokens += check_t5_decoding(case)
        row(f"{name} (encoder and logits; greedy and beam search)", max(differences), None, tokens)
    for name, embedder in PAIRS.items():
        case = load(name)
        record = upstream_pair.record_of(case)
        with tempfile.TemporaryDirectory() as temporary:
            folder = upstream_pair.write_pair(case, Path(temporary))
            difference = upstream_pair.check_logits(upstream_pair.read_pair(folder), record)
            parts = [str(folder / part) for part in ("inverter", "corrector", "t5-base")]
            from_vec2text(folder / "model", *parts, str(upstream_pair.embedder_of(folder)))
            model = pipeline.load(str(folder / "model"))
            tokens = sum(upstream_pair.check_search(model, record, *search) for search in upstream_pair.SEARCHES)
        searches = ", ".join(f"{steps} x {width}" for steps, width in upstream_pair.SEARCHES)
        row(f"vec2text, {embedder} (logits; every step of searches {searches})", difference, None, tokens)


if __name__ == "__main__":
    main()
