"""Shows an audit's findings: report.html, report.json, and findings.sarif (SARIF 2.1.0) for tools."""

import hashlib
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from v2t_jax import __version__
from v2t_jax.audit.personal_data import in_id
from v2t_jax.audit.run import PROVEN, SURE, is_proven, is_sure, records

INVERSION, CLEARTEXT = "CWE-200/embedding-inversion", "CWE-200/cleartext-payload"
RULES = {
    INVERSION: "The text behind a stored embedding can be recovered from the embedding alone.",
    CLEARTEXT: "Texts or metadata lie in clear beside the embeddings.",
}
TAXONOMIES = {
    "OWASP Top 10 for LLM Applications 2026": ["LLM09:2026"],
    "MITRE ATLAS": ["AML.T0024.001", "AML.T0085.000"],
    "OWASP AISVS 1.0": ["C8.2.1"],
    "OWASP GenAI Data Security 2026": ["DSGAI13", "DSGAI18"],
}
MOST_RESULTS = 1000  # of single records in a SARIF file: viewers take no more


def write(report: dict[str, Any], folder: Path, show_text: bool) -> None:
    """All three files; report.json last, as the sign that the audit is done."""
    shown = report if show_text else redacted(report)
    environment = Environment(loader=PackageLoader("v2t_jax.audit", "."), autoescape=True, trim_blocks=True)
    environment.filters |= {"percent": percent, "share": share, "mean": mean, "visible": visible}
    html = environment.get_template("report.html").render(
        **shown,
        plot=plot(shown),
        conditions=_conditions(report),
        shows_text=show_text,
        taxonomies=TAXONOMIES,
        sure=SURE,
        version=__version__,
    )
    (folder / "report.html").write_text(html, encoding="utf-8")
    found = sarif(report, folder / "recovered.jsonl", show_text)
    (folder / "findings.sarif").write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(shown, indent=1, ensure_ascii=False), encoding="utf-8")


def visible(text: Any) -> str:
    """Without characters that hide or reorder others: controls, and marks of direction."""
    return "".join(c if unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def mask(text: Any) -> str:
    """The first letter of each word of two or more, and its length: "John Smith" -> "J*** S****"."""
    # Accents and vowel signs are marks of letters, and soft hyphens lie within words.
    kinds = ["L" if letter == "_" else unicodedata.category(letter) for letter in str(text)]
    words = [kind[0] in "LNM" or kind == "Cf" for kind in kinds]
    shown = ""
    for i, letter in enumerate(str(text)):
        first = kinds[i][0] == "L" and not (i and words[i - 1]) and words[i + 1 : i + 2] == [True]
        shown += letter if first or not words[i] else "*"
    return shown


def hidden(one: Any) -> str:
    """A record's id, masked if it holds personal data."""
    return mask(one) if in_id(one) else str(one)


def redacted(report: dict[str, Any]) -> dict[str, Any]:
    """The report without texts, but for their first letters."""
    fields = {
        name: field | {"examples": [*map(mask, field["examples"])]}
        for name, field in report["in_clear"]["fields"].items()
    }
    texts = ("text", "original", "reference")
    worst = [
        {
            name: mask(value) if name in texts else hidden(value) if name == "id" else value
            for name, value in one.items()
        }
        for one in report["recovery"]["worst"]
    ]
    changed = {"in_clear": report["in_clear"] | {"fields": fields}, "recovery": report["recovery"] | {"worst": worst}}
    if "deleted" in report:
        changed["deleted"] = report["deleted"] | {"records": [*map(hidden, report["deleted"]["records"])]}
    return report | changed


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def mean(part: dict[str, Any], digits: int) -> str:
    """47.9 ± 4.9"""
    return f"{part['mean']:.{digits}f}" + ("" if part["sem"] is None else f" ± {part['sem']:.{digits}f}")


def share(part: dict[str, Any]) -> str:
    """17 of 64 (26.6%; 95% interval 17.3% to 38.5%)"""
    if not part["n"]:
        return "none of none"
    interval = f"{percent(part['low'])} to {percent(part['high'])}"
    return f"{part['hits']:,} of {part['n']:,} ({percent(part['share'])}; 95% interval {interval})"


def plot(report: dict[str, Any]) -> str:
    """Exact recovery by the text's length, with intervals, as SVG; empty where no text is known."""
    from matplotlib.figure import Figure

    if not (parts := report["recovery"]["by_length"]):
        return ""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axis = figure.subplots()
    names = [f"{one['from']} to {one['to']}" if one["to"] < 10**6 else f"{one['from']} and more" for one in parts]
    heights = [100 * one["share"] for one in parts]
    spread = [
        [100 * (one["share"] - one["low"]) for one in parts],
        [100 * (one["high"] - one["share"]) for one in parts],
    ]
    axis.bar(names, heights, color="#9b3b2f", width=0.6)
    axis.errorbar(names, heights, spread, fmt="none", color="#333333", capsize=3)
    for i, one in enumerate(parts):
        axis.annotate(
            f"n = {one['n']:,}", (i, 100 * one["high"]), ha="center", xytext=(0, 4), textcoords="offset points"
        )
    axis.set(ylim=(0, 118), xlabel="length of the stored text in tokens", ylabel="recovered exactly (%)")
    axis.spines[["top", "right"]].set_visible(False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue().partition("<svg")[2].join(["<svg", ""])


def sarif(report: dict[str, Any], recovered: Path, show_text: bool) -> dict[str, Any]:
    """One result for what lies in clear, and one for each record that is recovered with a probability of `SURE`."""
    store, clear = report["store"], report["in_clear"]
    results, left_out = list[dict[str, Any]](), 0
    if clear["rows"]:
        fields = ", ".join(f"{visible(name)} ({field['rows']:,})" for name, field in clear["fields"].items())
        said = f"{clear['rows']:,} of {clear['n']:,} sampled records have fields in clear: {fields}."
        results.append(_result(CLEARTEXT, "warning", said, store, "", "demonstrated"))
    for record in filter(is_sure, records(recovered, report["recovery"]["sure"] is not None)):
        if len(results) > MOST_RESULTS:
            left_out += 1
            continue
        one = str(record.get("id", record["row"]))
        place = one if show_text else hidden(one)
        said = f"The text of record {visible(place)} is recovered from its embedding"
        exact = record.get("exact_match")
        said += " exactly" if exact else f" with a probability of {record['confidence']:.3f} of being exact"
        said += f" (cosine {record['cosine']:.4f}; {_conditions(report)})"
        said += f": {visible(record['text'])}" if show_text else "."
        state = "demonstrated" if is_proven(record) else "poc"
        results.append(_result(INVERSION, "error", said, store, one, state, place))
    taxa = {
        name: {"name": name, "taxa": [{"id": one} for one in ids], "shortDescription": {"text": name}}
        for name, ids in TAXONOMIES.items()
    }
    targets = [
        {"target": {"id": one, "toolComponent": {"name": name}}, "kinds": ["relevant"]}
        for name, ids in TAXONOMIES.items()
        for one in ids
    ]
    rules = [{"id": name, "shortDescription": {"text": text}, "relationships": targets} for name, text in RULES.items()]
    driver = {"name": "v2t_jax", "version": __version__, "rules": rules}
    driver["informationUri"] = "https://owasp.org/www-project-top-10-for-large-language-model-applications/"
    run = {"tool": {"driver": driver}, "taxonomies": [*taxa.values()], "results": results}
    run["properties"] = {"ai/origin": "generated", "conditions": _conditions(report), "results_left_out": left_out}
    schema = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
    return {"$schema": schema, "version": "2.1.0", "runs": [run]}


def _conditions(report: dict[str, Any]) -> str:
    store, model, sample = report["store"], report["model"], report["sample"]
    stored = store["approximate"] or "as the store gives them"
    steps = "" if sample["num_steps"] is None else f", {sample['num_steps']} correction steps"
    return (
        f"encoder {model['embedder']}, model {model['name']} for texts of up to {model['longest']} tokens, vectors "
        f"{stored}, {sample['budget']:,} embedder calls a text{steps}, {sample['n']:,} of {store['count']:,} records; "
        "known to the attacker: the vectors and the embedder"
    )


def _result(
    rule: str, level: str, said: str, store: dict[str, Any], one: str, state: str, shown: str = ""
) -> dict[str, Any]:
    place = "/".join(filter(None, (store["collection"], shown)))
    path = store["path"] if "://" in store["path"] else Path(store["path"]).absolute().as_uri()
    key = "\0".join((path, store["collection"], rule, one))
    logical = [{"fullyQualifiedName": visible(place), "kind": "element"}] if place else []
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": path}}}
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": said},
        "locations": [location | ({"logicalLocations": logical} if logical else {})],
        "partialFingerprints": {"record/v1": hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()},
        "properties": {"ai/exploitability": state, "probability_proven_from": PROVEN},
    }
