"""The functions that a correction loop is made of (correction.py), over our networks and over any embedder."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.config import ModelConfig
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.decode.beam import beam_search
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, embed_texts
from v2t_jax.inversion.correction import Embed, Hypotheses, Hypothesize, Mode, Propose
from v2t_jax.inversion.host_callback import HostFunctions
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.embedder import EmbedderConfig, TokenMap, embed, embed_model_ids
from v2t_jax.models.inverter import Inverter


def initial_hypotheses(config: ModelConfig) -> Hypothesize:
    def hypothesize(params: Any, e: jax.Array, k: int) -> jax.Array:
        start = Inverter(config).start_decoding(params["inverter"], e, num_beams=k)
        return _decode(start, config, len(e), k)

    return hypothesize


def propose_corrections(config: ModelConfig, mode: Mode) -> Propose:
    def propose(params: Any, given: Hypotheses, k: int) -> jax.Array:
        inputs = (given.e, given.ids, given.embedding)
        start = Corrector(config).start_decoding(params["corrector"], *inputs, num_beams=k)
        return _decode(start, config, len(given.e), k, mode)

    return propose


def embed_hypotheses(
    config: ModelConfig, embedder: TextEmbedder, vocabulary: Vocabulary, shares_vocabulary: bool
) -> tuple[Embed, Callable[[], None]]:
    """From model ids to embeddings, on the device if both share a vocabulary, else as text; and the loop's `check`."""
    host = HostFunctions()
    if not isinstance(embedder, JaxEmbedder):
        vectors = host.vectors(lambda ids: embed_texts(embedder, vocabulary.decode(ids)), embedder.width)
        return lambda params, ids: vectors(ids), host.check
    if shares_vocabulary:
        return shared_embedder(embedder.config, embedder.token_map()), host.check
    retokenize, length = retokenizer(vocabulary, embedder, config.max_length)
    tokens = host.tokens(retokenize, length)

    def embed_text(params: Any, ids: jax.Array) -> jax.Array:
        token_ids, mask = tokens(ids)
        return jnp.where(mask[:, :1] < 0, jnp.nan, embed(embedder.config, params["embedder"], token_ids, mask))

    return embed_text, host.check


def shared_embedder(config: EmbedderConfig, token_map: TokenMap) -> Embed:
    """Model ids -> embeddings where model and embedder share a vocabulary."""
    return lambda params, ids: embed_model_ids(config, token_map, params["embedder"], params["pieces"], ids)


def retokenizer(
    vocabulary: Vocabulary, embedder: JaxEmbedder, length: int
) -> tuple[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], int]:
    """Model ids [rows, length] -> the embedder's ids and mask [rows, M] of their texts; and M."""
    around = len(embedder.tokenizer.encode(embedder.config.prefix).ids)
    most = min(embedder.config.max_length, 2 * length + around)  # what needs more than twice as many tokens is cut
    short = embedder.shortened(most)

    def retokenize(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        token_ids, mask = short.tokenize(vocabulary.decode(ids))
        missing = ((0, 0), (0, most - token_ids.shape[1]))
        return np.pad(token_ids, missing), np.pad(mask, missing)

    return retokenize, most


def _decode(start: tuple[Any, Any], config: ModelConfig, rows: int, k: int, mode: Mode = "best") -> jax.Array:
    """k sequences a row, ids [rows, k, L]."""
    sizes: dict[str, Any] = {"batch_size": rows, "num_beams": k, "num_return": k, "max_length": config.max_length}
    return beam_search(*start, **sizes, stop_rule="any" if mode == "upstream" else "running")[0].ids
