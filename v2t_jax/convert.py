"""Whole models from and to the original's checkpoints: what `v2t convert` runs."""

import json
from pathlib import Path

from v2t_jax.config import Stage
from v2t_jax.data.tokenize import Vocabulary
from v2t_jax.errors import InputError
from v2t_jax.interop.checkpoint import check_new
from v2t_jax.interop.sentence_transformers import load_embedder, locate
from v2t_jax.interop.vec2text import check_embedder, read_base, read_vec2text, write_vec2text
from v2t_jax.models.embedder import Embedder
from v2t_jax.pretrained import Inverter, load

RECORD = "vec2text"  # what the original's config.json files said, kept in the model folder for the way back


def from_vec2text(folder: Path, inverter: str, corrector: str | None, t5: str, embedder: str) -> None:
    """Converts checkpoints of the original into a model folder.

    Args:
        folder: the model folder to write.
        inverter, corrector: folders of the original's checkpoints; without a corrector only first guesses are made.
        t5: folder or hub name of the T5 that both were trained from.
        embedder: name or folder of the embedder that they invert.

    Raises:
        InputError: see `read_base`, `load_embedder`, `read_vec2text` and `check_embedder`; the embedder's vectors have
            another width; or the folder can't be written.
    """
    check_new(folder)
    base = read_base(t5)
    stages: dict[Stage, str | None] = {"inverter": inverter, "corrector": corrector}
    pair = read_vec2text({stage: Path(path) for stage, path in stages.items() if path is not None}, base.config)
    victim = load_embedder(embedder)
    if isinstance(victim, Embedder):
        check_embedder(Path(inverter), locate(embedder), embedder)
        # The original embeds hypotheses cut to the length of its training texts.
        victim = victim.shortened(min(pair.config.max_length, victim.config.max_length))
    name = Path(inverter).resolve().name
    model = Inverter(name, pair.config, pair.params, victim, Vocabulary.full(base.tokenizer), bridged=True)
    model.save(folder, record={RECORD: pair.settings}, card=_card(name, embedder, corrector is not None))


def to_vec2text(model: str, folder: Path, embedder: str | None = None) -> None:
    """Converts a model folder that `from_vec2text` wrote back into checkpoints for the original.

    Args:
        model: the model folder.
        folder: where the folders inverter and corrector are written.
        embedder: where the model's embedder lies, if not where it did.

    Raises:
        InputError: see `load` and `write_vec2text`; or the model didn't come from the original.
    """
    loaded = load(model, embedder)
    settings = json.loads((Path(model) / "config.json").read_text())["record"].get(RECORD) if loaded.bridged else None
    if settings is None:
        raise InputError(
            f"The model {loaded.name} didn't come from vec2text, which knows only T5's own tokenizer and its own "
            "embedders; only models that 'v2t convert --from vec2text' made go back."
        )
    write_vec2text(folder, loaded.config, loaded.params, settings)


def _card(name: str, embedder: str, has_corrector: bool) -> str:
    networks = "inverter and corrector" if has_corrector else "inverter, without a corrector,"
    return (
        f"# {name}\n\nThe {networks} of vec2text (Morris et al. 2023, PyTorch) for vectors of {embedder}, converted by "
        "`v2t convert --from vec2text`. Not evaluated here.\n"
    )
