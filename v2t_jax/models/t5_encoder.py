"""T5's encoder alone (models/t5.py), as embedders use it: the body of GTR and Sentence-T5."""

import jax
from jaxtyping import Array, Float, Int

from v2t_jax.config import T5Config
from v2t_jax.models import t5
from v2t_jax.models.layers import Params

PARAM_AXES = (
    (r"word_embedding", ("vocab", None)),
    *((path, axes) for path, axes in t5.PARAM_AXES if path.startswith("(encoder|decoder)")),
)


def init(config: T5Config, key: jax.Array) -> Params:
    """Random parameters, float32: for tests and for shapes."""
    params = t5.init(config, key)
    return {"word_embedding": params["token_embedding"], "encoder": params["encoder"]}


def encode(config: T5Config, params: Params, ids: Int[Array, "B L"], mask: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Ids and mask of 0 and 1 -> hidden states, in `config.dtype`."""
    embedded = t5.embed_tokens(config, {"token_embedding": params["word_embedding"]}, ids)
    return t5.encode(config, params, embedded, mask)
