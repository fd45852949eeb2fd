"""The audit of a store, step by step; each gives a part of the report (`report.py` shows it).

1. what lies in clear beside the vectors      4. what inversion recovers, and how sure that is
2. whether model and vectors fit              5. what comparison with known texts finds (`candidates`)
3. whether the model recovers known texts     6. what is left of deleted records

Nothing is claimed where 2 or 3 fail. Memory doesn't grow with the store; with the sample only by its vectors, where
there are candidates, and by a few numbers a row.
"""

import hashlib
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from v2t_jax import progress
from v2t_jax.audit.personal_data import detector, in_id, joined
from v2t_jax.data.dataset import write_json
from v2t_jax.data.readers import read_lines
from v2t_jax.data.vector_file import VectorFile, is_text
from v2t_jax.errors import InputError
from v2t_jax.eval.evaluate import evaluation_texts
from v2t_jax.eval.metrics import score, sentence_bleu, token_f1
from v2t_jax.inversion.api import BUDGET, embed_decoded, invert_strings
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.stream import recover_file
from v2t_jax.inversion.vectors import as_targets, cosines, foreign_reasons
from v2t_jax.stores.base import Store

READ, EXAMPLES, WORST, SHOWN, TOP = 1024, 3, 20, 100, 10
# Texts of the store that are embedded; their cosine to their vectors in the middle, which is 0.8 where only signs are
# stored; and the share to which their own vector is the nearest of these. Anything less comes from another embedder.
KNOWN, LEAST_COSINE, LEAST_OWN, SAME = 64, 0.7, 0.9, 0.9999
TESTED = 8  # texts of the self-test
LENGTHS = ((1, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 10**6))  # in tokens of the model
SURE, PROVEN, NEAR = 0.5, 0.99, 0.99
MEANS = ("bleu", "token_f1")


@dataclass(frozen=True)
class Settings:
    sample: int = 1000
    seed: int = 0
    budget: int = BUDGET
    num_steps: int | None = None
    text: str | None = None
    candidates: str | None = None
    deleted: str | None = None


def audit(
    store: Store,
    load_model: Callable[[], InversionPipeline],
    folder: Path,
    settings: Settings,
    known_texts: Sequence[str] = (),
) -> dict[str, Any]:
    """The report. What is recovered goes to folder/recovered.jsonl as it comes; called again, the audit goes on.

    Args:
        known_texts: of the self-test, in the model's normal form; by default short held-out ones of WordNet.

    Raises:
        InputError: a store, model and embedder that don't fit; a model that recovers no known text; settings that
            differ from those with which the folder was begun.
    """
    compared = None if settings.candidates is None else [*read_lines(settings.candidates)]  # fails now or never
    count = store.rows.rows()
    if not count:
        raise InputError(f"{store.rows.path} holds no vectors; there is nothing to audit.")
    chosen = np.random.default_rng(settings.seed).choice(count, min(settings.sample, count), replace=False)
    ids = None if settings.deleted is None else set(read_lines(settings.deleted))
    gone, by = (None, Counter[str]()) if ids is None else _rows_of(store.rows, ids)
    numbers = np.unique(np.concatenate([chosen, gone if gone is not None else chosen[:0]]))
    source = store.rows.with_texts(settings.text) if settings.text else store.rows
    rows, sample = source.at(numbers), source.at(np.sort(chosen))
    report: dict[str, Any] = {
        "store": {
            **{name: getattr(store, name) for name in ("kind", "collection", "width", "metric", "approximate")},
            **{"path": store.rows.path, "count": count},
        },
        "sample": {"n": sample.count} | {name: getattr(settings, name) for name in ("seed", "budget", "num_steps")},
        "personal_data_by": detector().name,
        "in_clear": in_clear(sample),
    }
    model = load_model()
    report["fit"] = fit(model, sample)
    report["self_test"] = self_test(model, known_texts or _short_texts(model), settings)
    report["model"] = {"name": model.name, "embedder": model.embedder.name, "longest": model.config.max_length - 1}
    weights = {"model": model.sha256, "embedder": model.embedder.identity.to_dict()}
    recovered = folder / "recovered.jsonl"
    begun, made_of = folder / "settings.json", {"settings": vars(settings), **report["store"], "weights": weights}
    made_of["rows"] = hashlib.sha256(numbers.tobytes()).hexdigest()  # which the file of deleted ids decides too
    if begun.exists() and json.loads(begun.read_text()) != json.loads(json.dumps(made_of)):
        raise InputError(f"{folder} holds an audit of something else, or with other settings; give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(begun, made_of)
    stopped = recovered.with_name(f"{recovered.name}.job").exists()
    if stopped or not recovered.exists() or not recovered.stat().st_size:
        recover_file(model, rows, recovered, num_steps=settings.num_steps, budget=settings.budget)
    sampled = np.isin(numbers, chosen)
    told = model.calibration is not None and not store.approximate  # by vectors as the embedder gives them
    report["recovery"] = recovery(model, (one for one in records(recovered, told) if sampled[one["row"]]), told)
    if compared is not None:
        report["candidates"] = candidates(model, sample, compared)
    if gone is not None:
        deleted = np.isin(numbers, gone)
        left, sure = list[str](), 0
        for one in records(recovered, told):
            if deleted[one["row"]]:
                left, sure = [*left, str(one.get("id", one["row"]))][:SHOWN], sure + is_sure(one)
        report["deleted"] = {"asked": len(ids or ()), "left": len(gone), "found_by": dict(by), "records": left}
        report["deleted"]["recovered"] = None if report["recovery"]["sure"] is None else share(sure, len(gone))
    return report


def in_clear(rows: VectorFile) -> dict[str, Any]:
    """What can be read beside the vectors: of each field how many rows have it, some examples, and personal data."""
    counts, examples, personal = Counter[str](), dict[str, list[str]](), Counter[str]()
    exposed = total = 0
    with progress.bar(rows.count, "reading what lies in clear", unit="rows") as update:
        for part in rows.batches(READ):
            texts, ids = (column or [None] * len(part.vectors) for column in (part.texts, part.ids))
            for one, text, beside in zip(ids, texts, part.metadata or itertools.repeat({}), strict=False):
                fields = beside | ({} if text is None else {"text": text})
                if in_id(one):
                    fields |= {"id": one}
                told = {name: str(value) for name, value in fields.items() if value not in (None, "")}
                counts.update(told.keys())
                for name, value in told.items():
                    if len(shown := examples.setdefault(name, [])) < EXAMPLES:
                        shown.append(value)
                found = {kind for value in told.values() for kind, _ in detector().find(value)}
                personal.update(found)
                exposed += bool(told)
            total += len(part.vectors)
            update(total)
    fields = {name: {"rows": count, "examples": examples[name]} for name, count in counts.most_common()}
    return {"n": total, "rows": exposed, "fields": fields, "personal_data": dict(personal)}


def fit(model: InversionPipeline, rows: VectorFile) -> dict[str, Any]:
    """Whether the vectors look like the embedder's, and are those of the texts beside them."""
    first = next(rows.batches(READ))
    e, faults = as_targets(first.vectors, model.config.embedding_width)
    good = [i for i in range(len(e)) if i not in faults]
    if not good:
        raise InputError(f"None of the first {len(e)} vectors of {rows.path} is one; there is nothing to invert.")
    other = "name the model that was trained for it with --model"
    norms = np.linalg.norm(e[good], axis=1)
    # The last tenth by length isn't asked: one record that somebody put there mustn't end the audit.
    usual = np.argsort(np.abs(norms - np.median(norms)))[: -(-9 * len(good) // 10)]
    if reasons := foreign_reasons(model, e[good][usual]):
        why = " and ".join(reasons)
        raise InputError(f"The vectors don't look like {model.embedder.name}'s: {why}. Find the store's and {other}.")
    report: dict[str, Any] = {"norm_from": float(norms.min()), "norm_to": float(norms.max())}
    texts = [] if first.texts is None else [i for i in good if is_text(first.texts[i])]
    if known := texts[:KNOWN]:
        theirs = model.embedder.embed([(first.texts or [])[i] for i in known])
        cosine = float(np.median(cosines(theirs, e[known])))
        vectors = e[known] / np.linalg.norm(e[known], axis=1, keepdims=True)
        nearest = vectors[(theirs @ vectors.T).argmax(axis=1)]
        own = np.mean((nearest * vectors).sum(axis=1) > SAME)  # equal texts have nearly equal vectors
        report |= {"known_texts": len(known), "cosine": cosine}
        if cosine < LEAST_COSINE or own < LEAST_OWN:
            raise InputError(
                f"{len(known)} of the store's texts, embedded by {model.embedder.name}, have a cosine of {cosine:.2f} "
                f"to their vectors in the middle, and {own:.0%} have theirs as the nearest: another embedder made "
                f"those, or they are of another text. Find out which, and {other}, or the texts' field with --text."
            )
    return report


def _short_texts(model: InversionPipeline) -> list[str]:
    """Held-out texts of at most half the model's length."""
    texts = evaluation_texts(model, limit=10 * TESTED)
    lengths = [*map(len, model.vocabulary.encode(texts))]
    return [texts[i] for i in np.argsort(lengths, kind="stable")[:TESTED]]


def self_test(model: InversionPipeline, texts: Sequence[str], settings: Settings) -> dict[str, Any]:
    """How many known texts come back exactly from their own embeddings."""
    found = invert_strings(model, texts, num_steps=settings.num_steps, budget=settings.budget)
    exact = sum(bool(one.exact_match) for one in found)
    if not exact:
        cosine = float(np.median([one.cosine for one in found]))
        raise InputError(
            f"{model.name} recovers none of {len(found)} known texts exactly (cosine {cosine:.2f} in the middle), so "
            "it would say nothing about a store; train it for longer, or give a larger --budget."
        )
    return {"n": len(found), "exact": exact}


def records(file: Path, told: bool) -> Iterator[dict[str, Any]]:
    """What was recovered, with probabilities only where they hold."""
    with file.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            yield record if told else {name: value for name, value in record.items() if name != "confidence"}


def is_sure(record: dict[str, Any]) -> bool:
    """Whether the text is exact: known to be, or else by its probability."""
    return bool(record.get("exact_match", (record.get("confidence") or 0.0) >= SURE))


def recovery(model: InversionPipeline, records: Iterator[dict[str, Any]], told: bool = True) -> dict[str, Any]:
    """Scores over all rows, and those that tell most; `told`: probabilities can be trusted."""
    skipped = 0
    known = dict[str, list[float]](length=[], exact=[], bleu=[], token_f1=[])
    probabilities, cosine, sure, there, back = list[float](), list[float](), 0, Counter[str](), Counter[str]()
    worst: list[tuple[tuple[bool, bool, float], int, dict[str, Any]]] = []
    for record in records:
        if "error" in record:
            skipped += 1
            continue
        text, original = record["text"], record.get("original")
        found = detector().find(joined(text))
        if isinstance(original, str):
            known["length"].append(len(model.vocabulary.encode([original])[0]))
            known["exact"].append(float(record["exact_match"]))
            known["bleu"].append(sentence_bleu([text], [record["reference"]])[0])
            known["token_f1"].append(token_f1([text], [record["reference"]])[0])
            # Compared in one form, or capitals and spaces would hide what came back.
            true = detector().find(joined(record["reference"])) | detector().find(original)
            there.update(kind for kind, _ in true)
            back.update(kind for kind, _ in found & true)
        probabilities.append(record.get("confidence", float("nan")))
        cosine.append(record["cosine"])
        sure += is_sure(record)
        entry = record | {"personal_data": sorted({kind for kind, _ in found}), "proven": is_proven(record)}
        rank = (is_sure(record) and bool(found), is_sure(record), record.get("confidence") or record["cosine"])
        (heapq.heappush if len(worst) < WORST else heapq.heappushpop)(worst, (rank, -record["row"], entry))
    n, (length, exact, *means) = len(cosine), map(np.array, known.values())
    inside = [(a, b, (length >= a) & (length <= b)) for a, b in LENGTHS]
    return {
        "n": n,
        "skipped": skipped,
        "sure": share(sure, n) if told or len(exact) == n else None,
        "cosine": float(np.median(cosine)) if n else None,
        "expected_exact": float(np.nansum(probabilities)) if n and told else None,
        "known": len(exact),
        "exact": share(int(exact.sum()), len(exact)) if len(exact) else None,
        **dict(zip(MEANS, (score(values)._asdict() if len(exact) else None for values in means), strict=True)),
        "too_long": int((length > model.config.max_length - 1).sum()),
        "by_length": [
            {"from": a, "to": b, **share(int(exact[part].sum()), int(part.sum()))}
            | {name: score(values[part])._asdict() for name, values in zip(MEANS, means, strict=True)}
            for a, b, part in inside
            if part.any()
        ],
        "personal_data": {kind: share(back[kind], there[kind]) for kind in there},
        "worst": [entry for *_, entry in sorted(worst, key=lambda one: one[:2], reverse=True)],
    }


def is_proven(record: dict[str, Any]) -> bool:
    """Equal to the stored text, or, where none is known, exact beyond doubt by the calibration."""
    return bool(record.get("exact_match", (record.get("confidence") or 0.0) >= PROVEN))


def share(hits: int, n: int) -> dict[str, Any]:
    """A share with its 95% interval (Wilson)."""
    interval = binomtest(hits, n).proportion_ci(method="wilson") if n else None
    low, high = (None, None) if interval is None else (float(interval.low), float(interval.high))
    return {"hits": hits, "n": n, "share": hits / n if n else 0.0, "low": low, "high": high}


def candidates(model: InversionPipeline, rows: VectorFile, compared: Sequence[str]) -> dict[str, Any]:
    """The attack without training: lines of a corpus or dictionary, ranked by their cosine to each vector."""
    width = model.config.embedding_width
    targets, texts = list[np.ndarray](), list[Any]()
    for part in rows.batches(READ):
        vectors, faults = as_targets(part.vectors, width)
        good = [i for i in range(len(vectors)) if i not in faults]
        targets.append(vectors[good] / np.linalg.norm(vectors[good], axis=1, keepdims=True))
        texts += [part.texts and part.texts[i] for i in good]
    e = np.concatenate(targets)
    best, lines = np.full((len(e), TOP), -1.0, np.float32), np.full((len(e), TOP), -1)
    with progress.bar(len(compared), "comparing candidates", unit="lines") as update:
        for first in range(0, len(compared), READ):
            theirs = embed_decoded(model, compared[first : first + READ])
            theirs = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
            for row in range(0, len(e), READ):
                some = slice(row, row + READ)
                values = np.concatenate([best[some], e[some] @ theirs.T], axis=1)
                numbers = np.broadcast_to(np.arange(first, first + len(theirs)), (len(values), len(theirs)))
                order = np.argsort(-values, axis=1, kind="stable")[:, :TOP]
                best[some] = np.take_along_axis(values, order, axis=1)
                lines[some] = np.take_along_axis(np.concatenate([lines[some], numbers], axis=1), order, axis=1)
            update(first + len(theirs))
    known = [i for i, text in enumerate(texts) if is_text(text)]
    hits = np.array([[compared[j] == texts[i] for j in lines[i] if j >= 0] for i in known], bool).reshape(
        len(known), -1
    )
    return {
        "lines": len(compared),
        "near": share(int((best[:, 0] > NEAR).sum()), len(e)),
        "known": len(known),
        "top_1": share(int(hits[:, :1].any(axis=1).sum()), len(known)),
        f"top_{TOP}": share(int(hits.any(axis=1).sum()), len(known)),
    }


def _rows_of(rows: VectorFile, ids: set[str]) -> tuple[np.ndarray, Counter[str]]:
    """Numbers of the rows that have one of these as their id or in their metadata, and how many have it where."""
    found, by, row = list[int](), Counter[str](), 0
    with progress.bar(rows.count, "looking for deleted records", unit="rows") as update:
        for part in rows.batches(READ):
            named = part.ids or range(rows.first + row, rows.first + row + len(part.vectors))
            for i, (one, beside) in enumerate(zip(named, part.metadata or itertools.repeat({}), strict=False)):
                values = [("id", one), *beside.items()]
                several = ((name, value if isinstance(value, list) else [value]) for name, value in values)
                where = {name for name, value in several if not ids.isdisjoint(map(str, value))}
                by.update(where)
                found += [row + i] * bool(where)
            row += len(part.vectors)
            update(row)
    return np.array(found, np.int64), by
