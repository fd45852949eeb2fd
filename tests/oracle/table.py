"""Prints how far our text encoders are from transformers', as the README's table.

    python -m tests.oracle.table        (in the environment of `make oracle`)

Every architecture, tiny, with three sets of random weights, float32; the worst of all hidden states and vectors.
"""

import numpy as np

from tests.equivalence import one_less_cosine, run_encoder
from tests.oracle.encoders import MODELS, encoder_case

SEEDS = (2, 3, 4)


def main() -> None:
    print("| architecture | largest difference of hidden states | 1 - cosine of pooled vectors |")
    print("|---|---:|---:|")
    for name, (_, model, _, pooling) in MODELS.items():
        differences, cosines = [], []
        for seed in SEEDS:
            case = encoder_case(name, seed)
            hidden, pooled = run_encoder(case)
            differences.append(np.abs(hidden - np.where(case["mask"][:, :, None] != 0, case["hidden"], 0)).max())
            cosines.append(one_less_cosine(pooled, case["pooled"]))
        print(f"| {name} ({model}, {pooling}) | {max(differences):.1e} | {max(cosines):.1e} |", flush=True)


if __name__ == "__main__":
    main()
