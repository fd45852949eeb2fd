"""From inside the compiled correction loop to what lives on the host, by one batched callback a step.

The way from hypothesis to embedding where the two don't share a vocabulary: back to text and to the embedder's own
tokens (`host_bridge`), or to an embedder that isn't JAX at all (`host_embedder`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def host_bridge(
    host_fn: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], embedder_length: int
) -> Callable[[Array], tuple[Array, Array]]:
    """The way to an embedder with another vocabulary, from inside the compiled loop: ids -> text -> its ids.

    Args:
        host_fn: model ids [rows, L] int32 -> (embedder ids [rows, M], mask [rows, M]), numpy in and out. It
            gets a whole batch at once, must depend on nothing but its argument, and must not call jax: on a
            CPU the device waits for it, and a computation started in it may wait for that device.
        embedder_length: M, the fixed length of what host_fn returns.

    Returns:
        A function of ids [rows, L] for use under jit, giving int32 ids and mask [rows, M].
    """

    def on_host(ids: Array) -> tuple[np.ndarray, np.ndarray]:
        embedder_ids, mask = host_fn(np.asarray(ids, np.int32))
        return np.asarray(embedder_ids, np.int32), np.asarray(mask, np.int32)

    def bridge(ids: Array) -> tuple[Array, Array]:
        shape = jax.ShapeDtypeStruct((ids.shape[0], embedder_length), jnp.int32)
        return jax.pure_callback(on_host, (shape, shape), ids)

    return bridge


def host_embedder(host_fn: Callable[[np.ndarray], np.ndarray], width: int) -> Callable[[Array], Array]:
    """The way to a black-box embedder (an API, another framework) from inside the compiled loop.

    Args:
        host_fn: model ids [rows, L] int32 -> embeddings [rows, E]; the rules of `host_bridge` hold.
        width: E.

    Returns:
        A function of ids [rows, L] for use under jit, giving float32 [rows, E].
    """

    def on_host(ids: Array) -> np.ndarray:
        return np.asarray(host_fn(np.asarray(ids, np.int32)), np.float32)

    def embed(ids: Array) -> Array:
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct((ids.shape[0], width), jnp.float32), ids)

    return embed
