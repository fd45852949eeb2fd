"""Packages a trained model: int8 weights, scores on held-out texts, a plot, and a model card that states them.

    python -m v2t_jax.eval.model_card --model runs/minilm_wordnet/model --output v2t_jax/assets/models/minilm-wordnet \\
        --trained "35 minutes on 2 CPU cores" --plot docs/minilm-wordnet.png --trace docs/minilm-wordnet-trace.svg

The card's figures come from the packaged weights themselves, loaded again after quantization.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from v2t_jax import progress
from v2t_jax.errors import InputError
from v2t_jax.eval.evaluate import cells, evaluate, evaluation_texts, plot
from v2t_jax.inversion.api import invert_strings
from v2t_jax.inversion.pipeline import load
from v2t_jax.inversion.trace import draw_trace
from v2t_jax.parallel.compile_cache import enable_compilation_cache

TRACED = 48  # texts among which the picture's is looked for


@dataclass(frozen=True)
class Card:
    """Package a trained model, with the scores that it reaches."""

    model: str  # the model folder that training wrote
    output: str  # the folder to write
    trained: str  # hardware and time of the training, in words
    plot: str  # where the plot of the scores goes, PNG
    trace: str  # where a picture of the longest text that correction recovered exactly goes, SVG
    limit: int = 200  # held-out texts to evaluate on
    num_steps: tuple[int, ...] | None = None  # correction steps; by default 0, and as many as v2t invert takes
    sequence_beam_width: tuple[int, ...] = (4,)
    budget: tuple[int, ...] = (300, 600, 1000, 2000)  # embedder calls a text, if it is searched by edits

    def run(self) -> None:
        trained, output = load(self.model), Path(self.output)
        record = json.loads((Path(self.model) / "config.json").read_text())["record"] | {"trained": self.trained}
        trained.save(output, record, quantize=True)
        packaged = load(output)
        texts = evaluation_texts(packaged, limit=self.limit)
        report = evaluate(packaged, texts, self.num_steps, self.sequence_beam_width, budget=self.budget)
        plot(report, Path(self.plot))
        shown = invert_strings(packaged, texts[:TRACED])
        longest = max(shown, key=lambda found: (found.exact_match, found.step > 0, len(found.text)))
        Path(self.trace).write_text(draw_trace(longest, f"{packaged.name}, held-out text"), encoding="utf-8")
        card = model_card(record["recipe"], report, self.trained, "int8 weights with float32 scales")
        trained.save(output, record | {"evaluation": report}, quantize=True, card=card)
        print(score_table(report))


def score_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    names = "steps + edit rounds", "sequence beam", "embedder calls", "BLEU", "token F1", "exact match", "cosine"
    head = f"| {' | '.join(names)} |\n|{'---:|' * len(names)}"
    return "\n".join([head, *(f"| {' | '.join(cells(row))} |" for row in report["rows"])])


def model_card(recipe: dict[str, Any], report: dict[str, Any], trained: str, weights: str = "float32 weights") -> str:
    """A model's README.md in Markdown, without the hub's head.

    Args:
        recipe: the config that it was trained with, as a dict.
        report: of its evaluation.
        trained: hardware and time of the training, in words.
        weights: how they are stored.
    """
    model, data = recipe["model"], recipe["data"]
    behind, t5 = recipe.get("api", {}).get("model"), model["t5"]
    form = "v1.0" if t5["feed_forward"] == "relu" else "v1.1"
    layers = f"{t5['num_encoder_layers']} encoder and {t5['num_decoder_layers']} decoder layers"
    sizes = {stage: (recipe[stage]["num_steps"], recipe[stage]["batch_size"]) for stage in recipe["stages"]}
    stages = "; ".join(f"{stage} {steps} steps of {texts} texts" for stage, (steps, texts) in sizes.items())
    shares = data["weights"] or [1] * len(data["sources"])
    named = zip((Path(source).name for source in data["sources"]), shares, strict=True)
    sources = ", ".join(f"{source} (x{share:g} an epoch)" for source, share in named)
    pieces = f"the {data['vocabulary_size']} commonest" if data["vocabulary_size"] else "all"
    embedder = recipe["embedder"]
    victim = Path(embedder).name if Path(embedder).is_dir() else embedder  # its path on this machine is private
    victim = f"{behind} at {victim}" if behind else victim
    return f"""# {report["model"]}

Recovers text from embeddings of {victim}: {" and ".join(recipe["stages"])} (Morris et al. 2023).

- **Takes** texts of up to {model["max_length"] - 1} word-pieces.
- **Data:** training split of {sources} (for wordnet: see WORDNET-NOTICE.txt);
  {pieces} word-pieces; a share of {data["span_share"]} cut to random contiguous spans.
- **Networks:** T5 {form} of width {t5["d_model"]}, {layers}; {weights}.
- **Recipe:** {stages}; the whole recipe is in config.json under `record`.
- **Trained:** {trained}.
- **Not in the data:** the held-out split, and lines that share eight words in a row with it.

Scores on the first {report["n"]} short enough texts of the {report["split"]} split, means with standard errors:

{score_table(report)}

BLEU is the mean over sentences (sacrebleu); *exact match* compares texts in the tokenizer's normal form (lower-case
word-pieces, joined); cosine is of the recovered text's own embedding and the target.

For examining data that you are entitled to examine; don't run it on other people's vectors.
"""


if __name__ == "__main__":
    progress.enable()
    enable_compilation_cache()
    try:
        tyro.cli(Card).run()
    except InputError as error:
        raise SystemExit(f"card: {error}") from None
