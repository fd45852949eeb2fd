"""Leakage at matched utility: what each defence still gives away, beside what a search loses by it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from v2t_jax import progress
from v2t_jax.data.split import read_texts
from v2t_jax.defences import vectors as defences
from v2t_jax.defences.attack import estimator, procrustes
from v2t_jax.defences.vectors import Defence, Function, unit
from v2t_jax.embedders.base import TextEmbedder
from v2t_jax.errors import InputError
from v2t_jax.eval.metrics import score, text_scores
from v2t_jax.eval.personal import came_back
from v2t_jax.inversion.api import invert_embeddings
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.vectors import cosines
from v2t_jax.models.layers import Params

PUBLIC, DISTRACTORS, QUERIES = 5000, 3000, 300  # texts of WordNet's training split, and held-out ones to look for
KEPT = 0.02  # of NDCG@10 that a recommended defence may lose
KEY = 20231023  # of the rotation; the attacker doesn't know it


@dataclass(frozen=True)
class Attacked:
    """A defence and an attacker's knowledge."""

    defence: Defence
    attack: Function
    known_pairs: int | None = None


def attacked(public: np.ndarray, known_pairs: Sequence[int]) -> list[Attacked]:
    """Each defence at three strengths, with the best attack that its being known allows."""
    width = public.shape[1]
    made = [*(defences.noise(level) for level in (0.1, 0.3, 1.0))]
    made += [defences.matryoshka(width // part) for part in (2, 4, 8)]
    made += [defences.pca(width // part, public) for part in (2, 4, 8)]
    made += [defences.masking(part, width) for part in (0.25, 0.5, 0.75)]
    made += [defences.scalar(bits, public) for bits in (8, 4, 1)]
    made += [defences.product(width // part, public) for part in (4, 8, 16)]
    found = [Attacked(defences.none(), unit)]
    found += [Attacked(defence, estimator(defence.store(public), public)) for defence in made]
    turned = defences.rotation(width, KEY)
    for count in known_pairs:
        if not 1 <= count <= len(public):
            raise InputError(f"known_pairs holds {count}; give numbers from 1 to {len(public)}.")
        known = public[:count]
        found.append(Attacked(turned, procrustes(turned.store(known), known), count))
    return found


def public_embeddings(embedder: TextEmbedder) -> np.ndarray:
    return unit(embedder.embed(read_texts("wordnet", "train", limit=PUBLIC)))


def leakage(
    model: InversionPipeline,
    texts: Sequence[str],
    some: Sequence[Attacked],
    budget: int,
    facts: Sequence[dict[str, str]] = (),
    num_steps: int | None = None,
    tune: Callable[[Attacked], Params] | None = None,
) -> list[dict[str, Any]]:
    """What is recovered of `texts`, in the model's normal form, behind each defence.

    Args:
        facts: of the last texts, what each tells of a person.
        tune: gives the inverter that the attacker has trained for a defence.
    """
    e, rows = unit(model.embedder.embed(texts)), []
    estimates = [one.attack(one.defence.store(e)) for one in some]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are no embeddings is known here
        if tune is None:  # in full batches
            found = invert_embeddings(model, np.concatenate(estimates), budget=budget, num_steps=num_steps)
        else:
            found, given = [], model.params
            for one, estimate in zip(some, estimates, strict=True):
                model.params = given | {"inverter": tune(one)}
                found += invert_embeddings(model, estimate, budget=budget, num_steps=num_steps)
            model.params = given
    for i, (one, estimate) in enumerate(zip(some, estimates, strict=True)):
        mine = [one.text for one in found[i * len(texts) : (i + 1) * len(texts)]]
        plain = len(texts) - len(facts)
        row: dict[str, Any] = {"defence": one.defence.family, "strength": one.defence.strength}
        row |= {"known_pairs": one.known_pairs, "n": plain}
        row["cosine"] = score(cosines(estimate, e))._asdict()
        row |= {name: value._asdict() for name, value in text_scores(mine[:plain], texts[:plain]).items()}
        back = came_back(facts, mine[plain:])
        hits, words = (sum(counts) for counts in zip(*back.values(), strict=True)) if back else (0, 0)
        rows.append(row | {"personal_words": {"hits": hits, "n": words}})
    return rows


def utility(embedder: TextEmbedder, some: Sequence[Attacked], public: np.ndarray) -> list[dict[str, Any]]:
    """NDCG@10, what of it is lost (in pairs of the same query), and recall@10 behind each defence; the first is none.

    Documents are held-out texts among `public` ones; the query for a document is every other of its words, so one
    document is right. Recall is of the ten nearest documents without a defence.
    """
    texts = [text for text in read_texts("wordnet", "held_out") if len(text.split()) >= 4][:QUERIES]
    documents = np.concatenate([unit(embedder.embed(texts)), public[:DISTRACTORS]])
    queries = unit(embedder.embed([" ".join(text.split()[::2]) for text in texts]))
    nearest = _nearest(queries, documents)
    rows, gains = [], []
    with progress.bar(len(some), "searching", unit="defences") as update:
        for i, one in enumerate(some):
            found = _nearest(one.defence.query(queries), one.defence.store(documents))
            hits = found == np.arange(len(texts))[:, None]
            gains.append(np.where(hits.any(axis=1), 1 / np.log2(2 + hits.argmax(axis=1)), 0.0))
            same = [len({*a} & {*b}) / len(a) for a, b in zip(found.tolist(), nearest.tolist(), strict=True)]
            scores: dict[str, Any] = {"ndcg": gains[-1], "ndcg_lost": gains[0] - gains[-1], "recall": same}
            rows.append({name: score(values)._asdict() for name, values in scores.items()} | {"queries": len(texts)})
            update(i + 1)
    return rows


def _nearest(queries: np.ndarray, documents: np.ndarray, count: int = 10) -> np.ndarray:
    return np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :count]


def recommendation(rows: Sequence[dict[str, Any]]) -> str:
    """The defence that leaks least of those that keep NDCG@10 within `KEPT`, judged by its best-informed attacker."""
    plain = rows[0]
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows[1:]:
        key = row["defence"], row["strength"]
        if key not in worst or row["exact_match"]["mean"] >= worst[key]["exact_match"]["mean"]:
            worst[key] = row
    kept = [row for row in worst.values() if row["ndcg_lost"]["mean"] <= KEPT]
    if not kept:
        return (
            f"Nothing keeps NDCG@10 within {100 * KEPT:.0f} points of {plain['ndcg']['mean']:.3f}, without a defence."
        )
    best = min(kept, key=lambda row: (row["exact_match"]["mean"], row["bleu"]["mean"]))
    name = f"{best['defence']} {best['strength']}".strip()
    (exact, bleu), without = ([row[key]["mean"] for key in ("exact_match", "bleu")] for row in (best, plain))
    return (
        f"Of what keeps NDCG@10 within {100 * KEPT:.0f} points, {name} leaks least: exact match {exact:.1%} instead of "
        f"{without[0]:.1%}, BLEU {bleu:.1f} instead of {without[1]:.1f}. It costs a search "
        f"{_cell(best['ndcg_lost'], '.3f')} of {plain['ndcg']['mean']:.3f} NDCG@10."
    )


# By the table's columns: which score, how it is written.
_COLUMNS = {"exact match": ("exact_match", ".1%"), "BLEU": ("bleu", ".1f"), "F1": ("token_f1", ".2f")}
_COLUMNS |= {"personal words": ("personal_words", ""), "cosine": ("cosine", ".3f")}
_COLUMNS |= {"NDCG@10": ("ndcg", ".3f"), "lost": ("ndcg_lost", ".3f"), "recall@10": ("recall", ".3f")}


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """A line a defence and attacker."""
    made = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), show_edge=False)
    made.add_column("defence", no_wrap=True)
    columns = {column: about for column, about in _COLUMNS.items() if about[0] in rows[0]}
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        pairs = f", {row['known_pairs']:,} pairs known" if row["known_pairs"] else ""
        name = f"{row['defence']} {row['strength']}".strip() + pairs
        made.add_row(name, *(_cell(row[key], shown) for key, shown in columns.values()))
    return made


def _cell(value: dict[str, Any], shown: str) -> str:
    if "hits" in value:
        return f"{value['hits']} of {value['n']}" if value["n"] else ""
    return f"{value['mean']:{shown}}" + ("" if value["sem"] is None else f"±{value['sem']:{shown}}")


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Leakage against utility, a point for each defence and strength."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for family in dict.fromkeys(row["defence"] for row in rows):
        mine = [row for row in rows if row["defence"] == family]
        x, y = ([row[name]["mean"] for row in mine] for name in ("ndcg", "bleu"))
        axis.plot(x, y, marker="o", linestyle=":", label=family)
        for row, at in zip(mine, zip(x, y, strict=True), strict=True):
            shown = f"{row['known_pairs']:,}" if row["known_pairs"] else row["strength"]
            axis.annotate(shown, at, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set(xlabel="NDCG@10 of a search", ylabel="BLEU of what an attacker recovers who knows it")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
