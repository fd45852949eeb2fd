"""From inside a compiled program to what lives on the host, by one batched callback a step: the embedder's own
tokenizer (`tokens`), or an embedder that isn't JAX at all (`vectors`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


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
