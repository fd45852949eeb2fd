"""Converts models from and to the original's checkpoints: `v2t convert`."""

from pathlib import Path

from v2t_jax.config import Stage
from v2t_jax.data.split import read_texts
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder
from v2t_jax.embedders.load import load_embedder, locate
from v2t_jax.errors import InputError
from v2t_jax.interop.files import check_new
from v2t_jax.interop.hub import folder_of, is_hub_name
from v2t_jax.inversion.pipeline import InversionPipeline, norm_statistics, read_model
from v2t_jax.vec2text.checkpoints import check_embedder, read_base, read_settings, read_vec2text, write_vec2text
from v2t_jax.vec2text.embedders import check_computation, default_name

RECORD = "vec2text"  # the original's config.json files, kept in the model folder for the way back
NORM_TEXTS = 128  # texts whose embeddings' lengths are recorded


def build(
    inverter: str, corrector: str | None, t5: str | None, embedder: str | TextEmbedder | None
) -> tuple[InversionPipeline, dict]:
    """A model from checkpoints of the original, as `v2t convert` takes them, and their config.json files by stage."""
    names: dict[Stage, str | None] = {"inverter": inverter, "corrector": corrector}
    folders = {stage: folder_of(name) for stage, name in names.items() if name is not None}
    settings = {stage: read_settings(stage, folder) for stage, folder in folders.items()}
    first = settings["inverter"]
    theirs, api = first["embedder_model_name"], first.get("embedder_model_api")
    if embedder is None and api:
        raise InputError(
            f"The inverter was trained for {api}, which is behind an API: give embedder=HttpEmbedder(...)."
        )
    embedder = default_name(theirs) if embedder is None else embedder
    t5_config, tokenizer = read_base(t5 or first["model_name_or_path"])
    config, params = read_vec2text(folders, settings, t5_config)
    # The original's texts get no prefix, whatever the embedder's folder asks for.
    victim = load_embedder(embedder, prefix="") if isinstance(embedder, str) else embedder
    if isinstance(victim, JaxEmbedder):
        if isinstance(embedder, str):
            check_embedder(folders["inverter"], locate(embedder), embedder)
        if not api:  # with an API the name is a placeholder
            check_computation(theirs, victim)
        # The original embeds hypotheses cut to the length of its training texts.
        victim = victim.shortened(min(config.max_length, victim.config.max_length))
    name = inverter if is_hub_name(inverter) else folders["inverter"].resolve().name
    model = InversionPipeline(name, config, params, victim, Vocabulary.full(tokenizer), shares_vocabulary=False)
    # For the warning about foreign vectors. The original's training texts aren't available; WordNet's replace them.
    if isinstance(victim, JaxEmbedder) and not victim.normalized:  # else it is 1, or every text would cost a request
        texts = read_texts("wordnet", "held_out", limit=NORM_TEXTS)
        readable = [text for text in model.vocabulary.normalize(texts, config.max_length) if text.strip()]
        model.embedding_norm = norm_statistics(victim.embed(readable)) if readable else None
    return model, settings


def from_vec2text(
    folder: Path, inverter: str, corrector: str | None, t5: str | None, embedder: str | TextEmbedder | None
) -> None:
    """Converts checkpoints of the original into a new model folder."""
    check_new(folder)
    model, settings = build(inverter, corrector, t5, embedder)
    networks = "inverter and corrector" if model.has_corrector else "inverter, without a corrector,"
    card = (
        f"# {model.name}\n\nThe {networks} of vec2text (Morris et al. 2023, PyTorch) for vectors of "
        f"{model.embedder.name}, converted by `v2t convert --from vec2text`. Not evaluated here.\n"
    )
    model.save(folder, record={RECORD: settings}, card=card)


def to_vec2text(model: str, folder: Path) -> None:
    """The way back, of a model that `from_vec2text` wrote: into folder/inverter and folder/corrector."""
    check_new(folder)
    header, config, params, *_ = read_model(model)
    settings = header.record.get(RECORD)
    if not isinstance(settings, dict) or set(settings) != set(params):
        raise InputError(
            f"The model {header.name} was not converted from vec2text, which supports only T5's tokenizer and its own "
            "embedders; give a model made by 'v2t convert --from vec2text'."
        )
    write_vec2text(folder, config, params, settings)
