"""From hypotheses to their embeddings, inside a compiled program: on the device, or by one batched callback a step (or
part of it) to what lives on the host, the embedder's own tokenizer (`tokens`) or one that isn't JAX at all (`vectors`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from v2t_jax.config import ModelConfig
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, embed_texts
from v2t_jax.inversion.correction import Embed, at_longest
from v2t_jax.inversion.parts import EMBEDDED, by_parts
from v2t_jax.inversion.pool import first_equals
from v2t_jax.models.embedder import EmbedderConfig, TokenMap, embed, embed_model_ids


def embed_hypotheses(
    config: ModelConfig, embedder: TextEmbedder, vocabulary: Vocabulary, shares_vocabulary: bool, devices: int
) -> tuple[Embed, Callable[[], None]]:
    """From model ids to embeddings, on the device if both share a vocabulary, else as text; and the loop's `check`.

    Hypotheses often repeat one another: of those that are embedded together, each text is embedded once a device.
    """
    host = HostFunctions()
    if not isinstance(embedder, JaxEmbedder):
        vectors = host.vectors(lambda ids: embed_texts(embedder, vocabulary.decode(ids)), embedder.width)
        return lambda params, ids: vectors(ids), host.check
    once = functools.partial(embed_once, width=embedder.width, rows=EMBEDDED.rows(1), devices=devices)
    if shares_vocabulary:
        shared = shared_embedder(embedder.config, embedder.token_map())
        return lambda params, ids: once(functools.partial(shared, params), ids), host.check
    tokens = host.tokens(*retokenizer(vocabulary, embedder, config.max_length))

    def embed_text(params: Any, ids: Array) -> Array:
        token_ids, mask = tokens(ids)
        # There is room for texts of twice as many tokens as the model's; the longest decides how many are embedded.
        run = functools.partial(once, functools.partial(embed, embedder.config, params["embedder"]))
        return jnp.where(mask[:, :1] < 0, jnp.nan, at_longest(run, mask > 0, token_ids, mask))

    return embed_text, host.check


def embed_once(run: Callable[..., Array], *tokens: Array, width: int, rows: int, devices: int) -> Array:
    """`run(*tokens)`, embeddings [R, width] of token ids [R, M], or ids and mask; on each device, equals are run once.

    Equal are those that the embedder reads, not the model's: spellings of one text get the very same vector, as in the
    original, which keeps their order. Repetitions come last, in parts of `rows` that are left out (`by_parts`).
    """
    devices = 1 if len(tokens[0]) % devices else devices
    read = tokens[0] if len(tokens) == 1 else jnp.where(tokens[1] > 0, tokens[0], -1)  # 0, the padding, may be a token
    ids = read.reshape(devices, -1, read.shape[1])
    first = first_equals(ids, jnp.ones(ids.shape[:2], bool))
    repeated = (first != jnp.arange(ids.shape[1])[None]).reshape(-1)
    none = jnp.zeros((len(repeated), width), jnp.float32)
    e = by_parts(lambda given, _: run(*given), rows, devices, repeated, tokens, none)
    return jnp.take_along_axis(e.reshape(devices, -1, width), first[..., None], axis=1).reshape(e.shape)


def shared_embedder(config: EmbedderConfig, token_map: TokenMap) -> Embed:
    """Model ids -> embeddings where model and embedder share a vocabulary."""
    return lambda params, ids: embed_model_ids(config, token_map, params["embedder"], params["pieces"], ids)


def retokenizer(
    vocabulary: Vocabulary, embedder: JaxEmbedder, length: int
) -> tuple[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], int]:
    """Model ids [rows, length] -> the embedder's ids and mask [rows, M] of their texts; and M."""
    most = _most_tokens(embedder, length)
    short = embedder.shortened(most)

    def retokenize(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        token_ids, mask = short.tokenize(vocabulary.decode(ids))
        missing = ((0, 0), (0, most - token_ids.shape[1]))
        return np.pad(token_ids, missing), np.pad(mask, missing)

    return retokenize, most


def _most_tokens(embedder: JaxEmbedder, length: int) -> int:
    """What needs more than twice as many tokens as the model's is cut."""
    around = len(embedder.tokenizer.encode(embedder.config.prefix).ids)
    return min(embedder.config.max_length, 2 * length + around)


def embedded_as_text(embedder: TextEmbedder, length: int, texts: Sequence[str]) -> np.ndarray:
    """[n] bool: which texts a loop without the embedder's vocabulary embeds as `embed_texts`: not blank nor cut."""
    if not isinstance(embedder, JaxEmbedder):
        return np.ones(len(texts), bool)
    _, mask = embedder.tokenize(texts)
    return (mask.sum(axis=1) <= _most_tokens(embedder, length)) & [bool(text.strip()) for text in texts]


class HostFunctions:
    """Host functions as functions for use under jit. They must be pure and must not call jax, which may wait for them.

    What one raises would reach the program's caller as an error of JAX's. It is kept instead; until `check` raises it,
    no host function is called, and all return embeddings of NaN.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raises what a host function raised since the last check; call it when a program's results have arrived."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def vectors(self, function: Callable[[np.ndarray], np.ndarray], width: int) -> Callable[[Array], Array]:
        """`function`: ids [rows, L] int32 -> vectors [rows, width]."""
        return lambda ids: self._call(function, jax.ShapeDtypeStruct((len(ids), width), jnp.float32), ids)

    def tokens(
        self, function: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], length: int
    ) -> Callable[[Array], tuple[Array, Array]]:
        """`function`: ids [rows, L] int32 -> another vocabulary's ids and mask [rows, length]; -1 if it failed."""
        return lambda ids: self._call(function, (jax.ShapeDtypeStruct((len(ids), length), jnp.int32),) * 2, ids)

    def _call(self, function: Callable[[np.ndarray], Any], shapes: Any, ids: Array) -> Any:
        def on_host(ids: Array) -> Any:
            if self._error is None:
                try:
                    found = function(np.asarray(ids, np.int32))
                    return jax.tree.map(lambda shape, x: np.asarray(x, shape.dtype), shapes, found)
                except BaseException as error:  # Ctrl-C too
                    self._error = error
            return jax.tree.map(lambda x: np.full(x.shape, np.nan if x.dtype == jnp.float32 else -1, x.dtype), shapes)

        return jax.pure_callback(on_host, shapes, ids)
