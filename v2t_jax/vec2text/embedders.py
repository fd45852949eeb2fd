"""What the original computes with each embedder that it knows by name, and the name of the same computation here.

From its `load_embedder_and_tokenizer` and `call_embedding_model` (vec2text 0.0.13): a plain network returns the output
of its pooler, trained or not, or else the masked mean of its tokens; a sentence-transformers pipeline does what its
modules.json says. Texts never get a prefix.
"""

from typing import NamedTuple, get_args

from v2t_jax import progress
from v2t_jax.embedders.base import JaxEmbedder
from v2t_jax.errors import InputError
from v2t_jax.models.embedder import Pooling


class Computed(NamedTuple):
    """What follows the encoder, and the name that `load_embedder` knows it by; None if only a folder can be given."""

    pooling: Pooling
    num_dense: int
    normalize: bool
    name: str | None

    @property
    def advice(self) -> str:
        if self.name is not None:
            # Only our table's names, which have no owner, may be followed by a folder.
            return self.name if "/" in self.name else f"{self.name}@DIR"
        return f"{self.pooling}@DIR"


_MINILM_L6, _MINILM_L12 = (Computed("mean", 0, True, f"all-MiniLM-{layers}-v2") for layers in ("L6", "L12"))
_GTR_PIPELINE = Computed("mean", 1, True, "gtr-base-st")
_POOLER, _MEAN = Computed("pooler", 0, False, None), Computed("mean", 0, False, None)
COMPUTED = {
    "bert": Computed("pooler", 0, False, "google-bert/bert-base-uncased"),
    "bert__random_init": _POOLER,
    "contriever": _POOLER,
    "dpr": Computed("cls", 0, False, "dpr-ctx-single-nq-base"),
    "dpr_st": Computed("cls", 0, False, "sentence-transformers/facebook-dpr-question_encoder-multiset-base"),
    "gte_base": _POOLER,
    "gte_base_st": Computed("mean", 0, True, "gte-base"),
    "gtr_base": Computed("mean", 0, False, "gtr-base"),
    "gtr_base__random_init": _MEAN,
    "gtr_base_st": _GTR_PIPELINE,
    "gtr_large": _MEAN,
    "ance_tele": _POOLER,
    "paraphrase-distilroberta": _POOLER,
    "medicalai/ClinicalBERT": Computed("mean", 0, False, "medicalai/ClinicalBERT"),
    "sentence-transformers/gtr-t5-base": _GTR_PIPELINE,
    "sentence-transformers/all-MiniLM-L6-v2": _MINILM_L6,
    "sentence-transformers/all-MiniLM-L12-v2": _MINILM_L12,
    # Our table's name for it adds a prefix.
    "nomic-ai/nomic-embed-text-v1": Computed("mean", 0, True, "nomic-ai/nomic-embed-text-v1"),
}
PIPELINES = "sentence-transformers/"  # other names with this owner follow their modules.json


def check_computation(theirs: str, embedder: JaxEmbedder) -> None:
    """Compares what follows the embedder's encoder with what the original has there, which weights can't show.

    Args:
        theirs: the checkpoint's `embedder_model_name`.

    Raises:
        InputError: pooling, dense layers, normalization or prefix differ.
    """
    config, expected = embedder.config, COMPUTED.get(theirs)
    if expected is None:
        if theirs.startswith(PIPELINES) and embedder.name.partition("@")[0] in get_args(Pooling):
            raise InputError(
                f"The inverter was trained for {theirs} with its modules.json, which {embedder.name} ignores: give the "
                "folder alone."
            )
        progress.note(f"The inverter was trained for {theirs}; whether {embedder.name} pools the same way is unknown.")
        return
    if (config.pooling, len(config.dense), config.normalize, config.prefix) != (*expected[:3], ""):
        raise InputError(
            f"The inverter was trained for {theirs} ({_described(*expected[:3], '')}), but {embedder.name} is "
            f"{_described(config.pooling, len(config.dense), config.normalize, config.prefix)}: "
            f"give the embedder as {expected.advice}."
        )


def _described(pooling: str, num_dense: int, normalize: bool, prefix: str) -> str:
    parts = [f"pooling {pooling}", f"dense layers {num_dense}", "normalized" if normalize else "not normalized"]
    return ", ".join([*parts, *([f"prefix {prefix!r}"] if prefix else [])])


def default_name(theirs: str) -> str:
    """The embedder to load for a checkpoint's `embedder_model_name`."""
    known = COMPUTED.get(theirs)
    if known is not None and known.name is not None:
        return known.name
    if known is None and theirs.startswith(PIPELINES):
        return theirs
    advice = f"embedder={known.advice!r}" if known else "embedder=..."
    raise InputError(f"The inverter was trained for the embedder {theirs!r}, which is unknown here: give {advice}.")
