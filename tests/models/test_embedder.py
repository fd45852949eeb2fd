"""The embedder as a function: on a CPU, a batch goes through the network in parts that stay in its caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v2t_jax.config import MeshConfig
from v2t_jax.models.embedder import EmbedderConfig, EmbedderNetwork, embed
from v2t_jax.models.encoders import BertConfig, encoder_network
from v2t_jax.parallel.mesh import batch_sharding, make_mesh

CONFIG = EmbedderConfig(BertConfig(100, 32, 1, 2, 64, 1100), width=32)


@pytest.mark.parametrize(
    ("rows", "length", "parts"), [(64, 64, True), (67, 64, False), (2, 1100, False), (1, 8, False)]
)
def test_parts_of_a_batch_are_embedded_like_the_whole(rows: int, length: int, parts: bool) -> None:
    params = {"encoder": encoder_network(CONFIG.encoder).init_params(jax.random.key(0)), "dense": []}
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 100, (rows, length)), jnp.int32)
    mask = jnp.asarray(np.arange(length) < rng.integers(1, length + 1, (rows, 1)), jnp.int32)
    run = jax.jit(functools.partial(embed, CONFIG))
    traced = run.trace(params, ids, mask)
    assert ("platform_index" in str(traced.jaxpr)) == parts
    whole = jax.jit(lambda params, *tokens: EmbedderNetwork(CONFIG).apply({"params": params}, *tokens))(
        params, ids, mask
    )
    np.testing.assert_allclose(traced.lower().compile()(params, ids, mask), whole, atol=1e-6)
    if parts:  # each has rows of all eight devices, and none asks another for its own
        place = batch_sharding(make_mesh(MeshConfig(), jax.devices()))
        spread = [jax.device_put(x, place) for x in (ids, mask)]
        program = run.lower(params, *spread).compile()
        np.testing.assert_allclose(program(params, *spread), whole, atol=1e-6)
        assert "all-gather" not in program.as_text()
