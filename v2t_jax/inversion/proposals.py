"""First guesses and corrections by our networks, two of the functions that a loop (correction.py) is made of."""

from typing import Any

import jax

from v2t_jax.config import ModelConfig
from v2t_jax.decode.beam import beam_search
from v2t_jax.inversion.correction import Hypotheses, Hypothesize, Mode, Propose
from v2t_jax.models.corrector import Corrector
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


def _decode(start: tuple[Any, Any], config: ModelConfig, rows: int, k: int, mode: Mode = "best") -> jax.Array:
    """k sequences a row, ids [rows, k, L]."""
    sizes: dict[str, Any] = {"batch_size": rows, "num_beams": k, "num_return": k, "max_length": config.max_length}
    return beam_search(*start, **sizes, stop_rule="any" if mode == "upstream" else "running")[0].ids
