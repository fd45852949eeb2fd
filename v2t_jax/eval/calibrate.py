"""Learns how likely a model's recovered texts are exact, and shows whether the probabilities hold."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from v2t_jax.errors import InputError
from v2t_jax.interop.files import read_json, write_file
from v2t_jax.inversion.api import embed_decoded, invert_embeddings
from v2t_jax.inversion.confidence import Weights, fit, probability
from v2t_jax.inversion.pipeline import InversionPipeline

EDGES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)  # of the probabilities in a report
LEAST_TEXTS = 8


def calibrate(
    inverter: InversionPipeline, texts: Sequence[str], noise: Sequence[float], seed: int = 0, **options: Any
) -> tuple[Weights, dict[str, Any]]:
    """Recovers `texts`, in the tokenizer's normal form, from embeddings with noise.

    Args:
        noise: standard deviations, as shares of an embedding's length; the texts take these levels in turn.
        options: of `invert_embeddings`.

    Returns:
        Weights for `confidence.probability`, fitted to all texts, and a report of two-fold cross-validation:
        {"n", "noise", "exact_match", "brier" (mean squared error of the probabilities; 0 is best), "bins":
        [{"from", "to", "n", "probability", "exact_match"}, both means of the texts there]}.

    Raises:
        InputError: fewer than LEAST_TEXTS texts, noise out of range, or see `invert_embeddings`.
    """
    if len(texts) < LEAST_TEXTS:
        raise InputError(f"{len(texts)} texts say too little about a model; give {LEAST_TEXTS} or more, better 200.")
    if not noise or not all(0 <= level < 1 for level in noise):
        raise InputError(f"noise is {list(noise)}; give levels of at least 0 and below 1.")
    e, levels = embed_decoded(inverter, texts), np.resize(np.asarray(noise, np.float32), len(texts))
    lengths = np.linalg.norm(e, axis=1, keepdims=True)
    scale = levels[:, None] * lengths / e.shape[1] ** 0.5
    noisy = e + scale * np.random.default_rng(seed).standard_normal(e.shape, np.float32)
    noisy *= lengths / np.linalg.norm(noisy, axis=1, keepdims=True)
    found = invert_embeddings(inverter, noisy, **options)
    cosine, runner_up = np.array([[one.cosine, one.runner_up] for one in found]).T
    exact = np.array([one.text == text for one, text in zip(found, texts, strict=True)], np.float64)
    # Blocks of len(noise) texts in turn, so that each half has every level.
    half, given = np.arange(len(texts)) // len(noise) % 2 == 0, np.empty(len(texts))
    for part in (half, ~half):
        given[~part] = probability(fit(cosine[part], runner_up[part], exact[part]), cosine[~part], runner_up[~part])
    bins = []
    for low, high in zip(EDGES, EDGES[1:], strict=False):
        inside = (given >= low) & ((given < high) | (high == EDGES[-1]))
        if inside.any():
            means = {"probability": round(given[inside].mean(), 4), "exact_match": round(exact[inside].mean(), 4)}
            bins.append({"from": low, "to": high, "n": int(inside.sum())} | means)
    scores = {"exact_match": round(exact.mean(), 4), "brier": round(np.square(given - exact).mean(), 4)}
    return fit(cosine, runner_up, exact), {"n": len(texts), "noise": list(noise)} | scores | {"bins": bins}


def store(folder: Path, weights: Weights, report: dict[str, Any]) -> None:
    """Puts a calibration into a model's config.json."""
    file = folder / "config.json"
    config = read_json(file, "a model folder")
    config["calibration"] = weights
    config["record"] = config.get("record", {}) | {"calibration": report}
    write_file(file, [(json.dumps(config, indent=2) + "\n").encode()])


def plot_reliability(report: dict[str, Any], file: Path) -> None:
    """The share of exact texts by the probability given, with the number of texts, in the suffix's format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axis = figure.subplots(subplot_kw={"xmargin": 0.12, "ymargin": 0.12})
    axis.plot([0, 1], [0, 1], color="0.7")
    given, seen, counts = ([part[key] for part in report["bins"]] for key in ("probability", "exact_match", "n"))
    shares = zip(seen, counts, strict=True)  # the standard error of one text isn't drawn
    errors = [(share * (1 - share) / count) ** 0.5 if count > 1 else math.nan for share, count in shares]
    axis.errorbar(given, seen, errors, marker="o", capsize=3)
    for i, (x, y, count) in enumerate(zip(given, seen, counts, strict=True)):  # neighbors may be close
        axis.annotate(f"n = {count}", (x, y), textcoords="offset points", xytext=(0, (8, -16)[i % 2]), ha="center")
    axis.set(xlabel="probability given", ylabel="share of exact texts", title=f"{report['n']} texts, cross-validated")
    figure.savefig(file, dpi=120)
