"""From inside a compiled program to what lives on the host, by one batched callback a step.

Hypotheses take this way to an embedder that doesn't share the model's vocabulary: as text, to the embedder's own
tokenizer (`tokens`), or to an embedder that isn't JAX at all (`vectors`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class HostFunctions:
    """Host functions as functions for use under jit.

    A host function gets a whole batch at once, must depend on nothing but its argument, and must not call jax: on a CPU
    the device waits for it, and a computation started in it may wait for that device.

    What one raises (an `InputError` of an embedder, Ctrl-C) would reach the caller of the program as an error of JAX's.
    It is kept instead; until `check` raises it, no host function is called, and all return embeddings of NaN.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raises what a host function raised since the last check; call it when a program's results have arrived."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def vectors(self, function: Callable[[np.ndarray], np.ndarray], width: int) -> Callable[[Array], Array]:
        """`function`: ids [rows, L] int32 -> vectors [rows, width]; the result gives them as float32."""
        return lambda ids: self._call(function, jax.ShapeDtypeStruct((len(ids), width), jnp.float32), ids)

    def tokens(
        self, function: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], length: int
    ) -> Callable[[Array], tuple[Array, Array]]:
        """`function`: ids [rows, L] int32 -> another vocabulary's ids and mask [rows, length]; -1 if it failed."""

        def call(ids: Array) -> tuple[Array, Array]:
            shape = jax.ShapeDtypeStruct((len(ids), length), jnp.int32)
            return self._call(function, (shape, shape), ids)

        return call

    def _call(self, function: Callable[[np.ndarray], Any], shapes: Any, ids: Array) -> Any:
        def on_host(ids: Array) -> Any:
            if self._error is None:
                try:
                    found = function(np.asarray(ids, np.int32))
                    return jax.tree.map(lambda shape, x: np.asarray(x, shape.dtype), shapes, found)
                except BaseException as error:  # Ctrl-C too
                    self._error = error
            return jax.tree.map(_failed, shapes)

        return jax.pure_callback(on_host, shapes, ids)


def _failed(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.full(shape.shape, np.nan if shape.dtype == jnp.float32 else -1, shape.dtype)
