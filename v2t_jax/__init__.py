"""v2t_jax: recover text from its embeddings.

    import v2t_jax as v2t

    inverter = v2t.load("minilm-wordnet")
    results = v2t.invert_strings(inverter, ["Any sentence."], num_steps=8, sequence_beam_width=4)

The names below are loaded on first use, so that importing the package (and `v2t --help`) costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v2t_jax.inversion.api import embed, invert_embeddings, invert_strings
    from v2t_jax.inversion.pipeline import load

__version__ = "0.1.0"
__all__ = ["__version__", "embed", "invert_embeddings", "invert_strings", "load"]

_HOME = {
    "embed": "v2t_jax.inversion.api",
    "invert_embeddings": "v2t_jax.inversion.api",
    "invert_strings": "v2t_jax.inversion.api",
    "load": "v2t_jax.inversion.pipeline",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
