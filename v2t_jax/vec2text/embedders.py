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

    pooling: Pooling | tuple[Pooling, ...]
    num_dense: int
    normalize: bool
    name: str | None = None

    @property
    def advice(self) -> str:
        # Only our table's names may be followed by a folder.
        return self.name if self.name and "/" in self.name else f"{self.name or self.pooling}@DIR"

    def __str__(self) -> str:
        normalized = "normalized" if self.normalize else "not normalized"
        return f"pooling {self.pooling}, dense layers {self.num_dense}, {normalized}"


_MINILM = ("all-MiniLM-L6-v2", "all-MiniLM-L12-v2")
_POOLED = ("bert__random_init", "contriever", "gte_base", "ance_tele", "paraphrase-distilroberta")
_AVERAGED = ("gtr_base__random_init", "gtr_large")
COMPUTED = {
    **dict.fromkeys(_POOLED, Computed("pooler", 0, False)),
    **dict.fromkeys(_AVERAGED, Computed("mean", 0, False)),
    **dict.fromkeys(("gtr_base_st", "sentence-transformers/gtr-t5-base"), Computed("mean", 1, True, "gtr-base-st")),
    **{f"sentence-transformers/{name}": Computed("mean", 0, True, name) for name in _MINILM},
    "bert": Computed("pooler", 0, False, "google-bert/bert-base-uncased"),
    "dpr": Computed("cls", 0, False, "dpr-ctx-single-nq-base"),
    "dpr_st": Computed("cls", 0, False, "sentence-transformers/facebook-dpr-question_encoder-multiset-base"),
    "gte_base_st": Computed("mean", 0, True, "gte-base"),
    "gtr_base": Computed("mean", 0, False, "gtr-base"),
    "medicalai/ClinicalBERT": Computed("mean", 0, False, "medicalai/ClinicalBERT"),
    # Our table's name for it adds a prefix.
    "nomic-ai/nomic-embed-text-v1": Computed("mean", 0, True, "nomic-ai/nomic-embed-text-v1"),
}
PIPELINES = "sentence-transformers/"  # other names with this owner follow their modules.json


def check_computation(theirs: str, embedder: JaxEmbedder) -> None:
    """Compares what follows the embedder's encoder with what the original has there, which weights can't show.

    `theirs` is the checkpoint's `embedder_model_name`.
    """
    config, expected = embedder.config, COMPUTED.get(theirs)
    found = Computed(config.pooling, len(config.dense), config.normalize)
    if expected is not None and (found[:3] != expected[:3] or config.prefix):
        prefix = f", prefix {config.prefix!r}" if config.prefix else ""
        raise InputError(
            f"The inverter was trained for {theirs} ({expected}), but {embedder.name} is {found}{prefix}: give the "
            f"embedder as {expected.advice}."
        )
    if expected is None and theirs.startswith(PIPELINES) and embedder.name.partition("@")[0] in get_args(Pooling):
        raise InputError(
            f"The inverter was trained for {theirs} with its modules.json, which {embedder.name} ignores: give the "
            "folder alone."
        )
    if expected is None:
        progress.note(f"The inverter was trained for {theirs}; whether {embedder.name} pools the same way is unknown.")


def default_name(theirs: str) -> str:
    """The embedder to load for a checkpoint's `embedder_model_name`."""
    known = COMPUTED.get(theirs)
    if name := known.name if known else theirs if theirs.startswith(PIPELINES) else None:
        return name
    advice = f"embedder={known.advice!r}" if known else "embedder=..."
    raise InputError(f"The inverter was trained for the embedder {theirs!r}, which is unknown here: give {advice}.")
