"""Open questions of the article (Morris et al. 2023): recovery by length, width, noise; texts that share a vector."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from v2t_jax import progress
from v2t_jax.defences import vectors as defences
from v2t_jax.defences.attack import estimator
from v2t_jax.defences.measure import Attacked, leakage, public_embeddings
from v2t_jax.defences.vectors import unit
from v2t_jax.errors import InputError
from v2t_jax.eval.evaluate import evaluation_texts
from v2t_jax.inversion.pipeline import InversionPipeline

NOISE = (0.03, 0.1, 0.3, 0.6, 1.0)
SEEDS = 100  # texts of which `collisions` makes edits


def by_length(model: InversionPipeline, limit: int, budget: int) -> list[dict[str, Any]]:
    """`limit` held-out texts of each quarter of the lengths that the model recovers."""
    texts = evaluation_texts(model)
    lengths = np.array([*map(len, model.vocabulary.encode(texts))])
    edges = np.unique(np.linspace(0, model.config.max_length - 1, 5).astype(int))
    rows = []
    for low, high in zip(edges, edges[1:], strict=False):
        chosen = [texts[i] for i in np.flatnonzero((lengths > low) & (lengths <= high))[:limit]]
        if chosen:
            row = leakage(model, chosen, [Attacked(defences.none(), unit)], budget)[0]
            rows.append(row | {"defence": f"{low + 1} to {high} tokens"})
    return rows


def by_width(model: InversionPipeline, limit: int, budget: int) -> list[dict[str, Any]]:
    """Truncated, projected and quantized embeddings, filled in by the attacker's regression."""
    public = public_embeddings(model.embedder)
    width = public.shape[1]
    made = [
        function
        for part in (2, 4, 8)
        for function in (defences.matryoshka(width // part), defences.pca(width // part, public))
    ]
    made += [defences.scalar(bits, public) for bits in (8, 4, 1)]
    some = [Attacked(one, estimator(one.store(public), public)) for one in made]
    return leakage(model, evaluation_texts(model, limit=limit), [Attacked(defences.none(), unit), *some], budget)


def by_noise(model: InversionPipeline, limit: int, budget: int) -> list[dict[str, Any]]:
    """Each level of noise, inverted as it is and as the regression estimates it."""
    public = public_embeddings(model.embedder)
    some = [Attacked(defences.none(), unit)]
    for level in NOISE:
        for attack in (unit, estimator(defences.noise(level).store(public), public)):
            some.append(Attacked(defences.noise(level), attack))
    rows = leakage(model, evaluation_texts(model, limit=limit), some, budget)
    for i, row in enumerate(rows[1:]):
        row["strength"] += ", estimated" if i % 2 else ", as it is"
    return rows


def collisions(model: InversionPipeline, count: int) -> dict[str, Any]:
    """The nearest two of `count` texts that come from `SEEDS` texts by one or two edits; pairs of one origin.

    "distances" [SEEDS] has the least of each origin's.
    """
    if count < 2 * SEEDS:
        raise InputError(f"edits is {count}; give {2 * SEEDS} or more.")
    origins = evaluation_texts(model, limit=SEEDS)
    words = sorted({word for text in evaluation_texts(model) for word in text.split()})
    nearest, shared, made, distances = (2.0, "", ""), 0, 0, list[float]()
    with progress.bar(count, "embedding edits", unit="texts") as update:
        for i, origin in enumerate(origins):
            texts = [origin, *edits(origin, words, count // len(origins), random.Random(i))]
            e, least = unit(model.embedder.embed(texts)).astype(np.float64), 2.0
            for first in range(0, len(e), 1024):
                # Of unit vectors; 1 - cosine loses nothing here, as the products are summed in float64.
                distance = np.sqrt(np.maximum(2 - 2 * (e[first : first + 1024] @ e.T), 0))
                distance[np.arange(len(distance)), np.arange(first, first + len(distance))] = 2
                shared += int((distance < 1e-6).sum())
                row, column = np.unravel_index(distance.argmin(), distance.shape)
                least = min(least, float(distance[row, column]))
                if distance[row, column] < nearest[0]:
                    nearest = float(distance[row, column]), texts[first + row], texts[column]
            distances.append(least)
            made += len(texts)
            update(min(made, count))
    found = {"texts": made, "distance": nearest[0], "nearest": nearest[1:], "shared": shared // 2}
    return found | {"median": float(np.median(distances)), "distances": distances}


def plot_collisions(found: dict[str, Any], file: Path, title: str) -> None:
    """How many texts have their nearest two edits at which distance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axis = figure.subplots()
    axis.hist(found["distances"], bins=30)
    axis.axvline(1e-6, color="black", linestyle=":")
    axis.annotate("float32's error", (1e-6, 0), xytext=(4, 60), textcoords="offset points", rotation=90, fontsize=8)
    axis.set(xlabel="distance of the nearest two of a text's edits", ylabel="texts", xlim=(-0.01, None))
    figure.suptitle(title)
    figure.savefig(file, dpi=110)


def edits(origin: str, words: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """Different texts by one or two substitutions, insertions, deletions or swaps of words."""
    found = dict.fromkeys([origin])
    for _ in range(20 * count):  # a short text has few single edits
        if len(found) > count:
            break
        text = origin.split()
        for _ in range(draw.choice((1, 2))):
            at, kind = draw.randrange(len(text)), draw.randrange(4)
            if kind == 0:
                text[at] = draw.choice(words)
            elif kind == 1:
                text.insert(at, draw.choice(words))
            elif kind == 2 and len(text) > 1:
                del text[at]
            else:
                other = draw.randrange(len(text))
                text[at], text[other] = text[other], text[at]
        found[" ".join(text)] = None
    return [*found][1:]


def plot(rows: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Exact match and cosine of each row, with errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.6 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = [f"{row['defence']} {row['strength']}".strip() for row in rows]
    for axis, key, label in zip(axes, ("exact_match", "bleu"), ("exact match", "BLEU"), strict=True):
        axis.barh(names, [row[key]["mean"] for row in rows], xerr=[row[key]["sem"] or 0 for row in rows], capsize=2)
        axis.set(xlabel=label)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
