"""An embedder behind a defence, for programs that take embedders: training, evaluation, audits."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from v2t_jax.defences.vectors import Defence
from v2t_jax.embedders.base import EmbedderIdentity, TextEmbedder


@dataclass
class DefendedEmbedder:
    """Its vectors are those that a store with this defence holds."""

    embedder: TextEmbedder
    defence: Defence
    weights_sha256: str = ""  # what decides its vectors can't be seen from the weights

    def __post_init__(self) -> None:
        self.name = f"{self.embedder.name} with {self.defence.name}"
        probe = np.eye(1, self.embedder.width, dtype=np.float32)
        self.width, self.normalized = self.defence.store(probe).shape[1], True

    @property
    def identity(self) -> EmbedderIdentity:
        return dataclasses.replace(self.embedder.identity, name=self.name, weights_sha256="", width=self.width)

    def embed(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Embeddings [len(texts), width] float32; refuses blank texts."""
        return self.defence.store(self.embedder.embed(texts, batch_size))
