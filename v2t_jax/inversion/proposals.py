"""The functions that a correction loop is made of (correct.py), over our networks and over any embedder."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.config import ModelConfig
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.decode.beam import beam_search
from v2t_jax.decode.sample import greedy
from v2t_jax.decode.state import PAD, Decoded
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, embed_texts
from v2t_jax.inversion.correction import Embed, Hypothesize, Mode, Propose
from v2t_jax.inversion.host_callback import host_bridge, host_embedder
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.embedder import EmbedderConfig, TokenMap, embed, embed_model_ids
from v2t_jax.models.inverter import Inverter


def initial_hypotheses(config: ModelConfig) -> Hypothesize:
    """First guesses: the inverter's."""
    return functools.partial(_hypothesize, config)


def propose_corrections(config: ModelConfig, mode: Mode) -> Propose:
    """Candidates: the corrector's."""
    return functools.partial(_propose, config, mode)


def embed_hypotheses(
    config: ModelConfig, embedder: TextEmbedder, vocabulary: Vocabulary, shares_vocabulary: bool
) -> Embed:
    """From model ids to embeddings: on the device where the word-pieces are the embedder's own, else as text."""
    if shares_vocabulary:
        assert isinstance(embedder, JaxEmbedder)  # `load` refuses others
        return shared_embedder(embedder.config, embedder.token_map())
    if not isinstance(embedder, JaxEmbedder):
        return functools.partial(_embed_texts, host_embedder(_to_vectors(vocabulary, embedder), embedder.width))
    # Other tokenizers may need more tokens for the same text; what needs twice as many is cut.
    around = len(embedder.tokenizer.encode(embedder.config.prefix).ids)
    length = min(embedder.config.max_length, 2 * config.max_length + around)
    bridge = host_bridge(_to_tokens(vocabulary, embedder, length), length)
    return functools.partial(_embed_retokenized, embedder.config, bridge)


def shared_embedder(config: EmbedderConfig, piece_map: TokenMap) -> Embed:
    """The same on the device."""
    return functools.partial(_embed_shared, config, piece_map)


def _decode(
    tokens_to_logits: Any, cache: Any, config: ModelConfig, rows: int, k: int, mode: Mode = "best"
) -> tuple[jax.Array, jax.Array]:
    """k sequences a row, ids [rows, k, L], and their mean log-probabilities [rows, k]."""
    if k == 1:
        single = greedy(tokens_to_logits, cache, batch_size=rows, max_length=config.max_length)
        found = Decoded(single.ids[:, None], single.log_probs[:, None])
    else:
        found, _ = beam_search(
            tokens_to_logits,
            cache,
            batch_size=rows,
            num_beams=k,
            num_return=k,
            max_length=config.max_length,
            stop_rule="any" if mode == "upstream" else "running",
        )
    return found.ids, found.log_probs / jnp.maximum(jnp.sum(found.ids != PAD, axis=-1), 1)


def _hypothesize(config: ModelConfig, params: Any, e: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    tokens_to_logits, cache = Inverter(config).start_decoding(params["inverter"], e, num_beams=k)
    return _decode(tokens_to_logits, cache, config, e.shape[0], k)


def _propose(
    config: ModelConfig, mode: Mode, params: Any, e: jax.Array, ids: jax.Array, embedding: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    tokens_to_logits, cache = Corrector(config).start_decoding(params["corrector"], e, ids, embedding, num_beams=k)
    return _decode(tokens_to_logits, cache, config, e.shape[0], k, mode)


def _embed_shared(config: EmbedderConfig, piece_map: TokenMap, params: Any, ids: jax.Array) -> jax.Array:
    return embed_model_ids(config, piece_map, params["embedder"], params["pieces"], ids)


def _embed_retokenized(config: EmbedderConfig, bridge: Callable, params: Any, ids: jax.Array) -> jax.Array:
    return embed(config, params["embedder"], *bridge(ids))


def _embed_texts(on_host: Callable[[jax.Array], jax.Array], params: Any, ids: jax.Array) -> jax.Array:
    return on_host(ids)


def _to_tokens(vocabulary: Vocabulary, embedder: JaxEmbedder, length: int) -> Callable[[np.ndarray], Any]:
    """Model ids [rows, L] -> the embedder's ids and mask [rows, length] of their texts."""
    embedder = embedder.shortened(length)

    def to_tokens(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = embedder.tokenize(vocabulary.decode(ids))
        missing = ((0, 0), (0, max(length - tokens.shape[1], 0)))
        return np.pad(tokens, missing)[:, :length], np.pad(mask, missing)[:, :length]

    return to_tokens


def _to_vectors(vocabulary: Vocabulary, embedder: TextEmbedder) -> Callable[[np.ndarray], np.ndarray]:
    """Model ids [rows, L] -> embeddings [rows, E] of their texts; a blank text has the zero vector, hence cosine 0."""
    return lambda ids: embed_texts(embedder, vocabulary.decode(ids))
