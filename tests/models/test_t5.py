"""What T5 must be by itself, whatever torch says: cache = no cache, row = batch, bfloat16, remat, dropout."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v2t_jax.config import T5Config
from v2t_jax.decode.state import Cache
from v2t_jax.models.layers import TRANSPOSED, Params
from v2t_jax.models.t5 import T5, shift_right, unstack_decoder

V1_0 = T5Config(
    vocab_size=20,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_heads=3,
    num_encoder_layers=2,
    num_decoder_layers=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)
V1_1 = dataclasses.replace(V1_0, feed_forward="gated-gelu", tie_word_embeddings=False)
both = pytest.mark.parametrize("config", [V1_0, V1_1], ids=["v1.0", "v1.1"])
B, S, L, BEAMS = 3, 6, 7, 2


@functools.cache
def make(config: T5Config) -> tuple[Params, jax.Array, jax.Array, jax.Array]:
    """Parameters (norm scales not 1), embeds [B, S, D], mask [B, S], labels [B, L]."""
    rng = np.random.default_rng(0)
    params = jax.jit(T5(config).init_params)(jax.random.key(0))
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
    embeds = jnp.asarray(rng.normal(size=(B, S, config.d_model)), jnp.float32)
    mask = (jnp.arange(S)[None] < jnp.asarray([S, 4, 1])[:, None]).astype(jnp.int32)
    return params, embeds, mask, jnp.asarray(rng.integers(2, config.vocab_size, (B, L)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(config: T5Config, params: Params, embeds: Any, mask: Any, labels: Any, key: Any = None) -> jax.Array:
    def logits(t5: T5) -> jax.Array:
        return t5.logits(t5.decode(shift_right(labels), t5.encode(embeds, mask), mask))

    return T5(config).apply({"params": params}, rngs=None if key is None else {"dropout": key}, method=logits)


def same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


@both
def test_prefill_and_steps_equal_the_full_forward_pass(config: T5Config) -> None:
    """At every position, with beams that differ, a masked source, and an offset before the head."""
    params, embeds, mask, labels = make(config)
    beams = jnp.stack([labels, labels[::-1, ::-1]], axis=1).reshape(B * BEAMS, L)  # item-major
    offset = jax.random.normal(jax.random.key(1), (B, config.d_model))

    @jax.jit
    def full(params: Params) -> jax.Array:
        def logits(t5: T5) -> jax.Array:
            encoded = jnp.repeat(t5.encode(embeds, mask), BEAMS, axis=0)
            hidden = t5.decode(shift_right(beams), encoded, jnp.repeat(mask, BEAMS, axis=0))
            return t5.logits(hidden + jnp.repeat(offset, BEAMS, axis=0)[:, None])

        return T5(config).apply({"params": params}, method=logits)

    @jax.jit
    def stepwise(params: Params) -> jax.Array:
        encoded = T5(config).apply({"params": params}, embeds, mask, method="encode")
        tokens_to_logits, cache = T5(config).start_decoding(
            params, encoded, mask, max_length=L, num_beams=BEAMS, hidden_offset=offset
        )

        def step(cache: Cache, x: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
            logits, cache = tokens_to_logits(x[0], cache, x[1])
            return cache, logits

        _, logits = jax.lax.scan(step, cache, (shift_right(beams).T, jnp.arange(L)))
        return jnp.swapaxes(logits, 0, 1)

    same(stepwise(params), full(params))
    unstacked = unstack_decoder(params)
    names = set(unstacked["decoder"]["layers"][0]["feed_forward"])
    assert {name.removesuffix(TRANSPOSED) for name in names} == set(params["decoder"]["layers"]["feed_forward"])
    assert jax.default_backend() != "cpu" or "wo" + TRANSPOSED in names
    assert unstack_decoder(unstacked)["decoder"]["layers"] is unstacked["decoder"]["layers"]
    same(stepwise(unstacked), full(params))


@both
def test_a_row_alone_equals_the_row_in_a_batch_and_padding_counts_for_nothing(config: T5Config) -> None:
    params, embeds, mask, labels = make(config)
    together = run(config, params, embeds, mask, labels)
    for i in range(B):
        same(run(config, params, embeds[i : i + 1], mask[i : i + 1], labels[i : i + 1])[0], together[i])
    spoiled = jnp.where(mask[:, :, None] != 0, embeds, 100.0)
    same(run(config, params, spoiled, mask, labels), together)


def test_the_future_is_not_seen() -> None:
    params, embeds, mask, labels = make(V1_0)
    changed = run(V1_0, params, embeds, mask, labels.at[:, 4:].set(3))
    same(changed[:, :5], run(V1_0, params, embeds, mask, labels)[:, :5])


@both
def test_bfloat16_is_close_and_gives_float32_logits(config: T5Config) -> None:
    params, embeds, mask, labels = make(config)
    exact = run(config, params, embeds, mask, labels)
    rounded = run(dataclasses.replace(config, dtype="bfloat16"), params, embeds, mask, labels)
    assert rounded.dtype == jnp.float32
    error = np.abs(np.asarray(rounded - exact))
    assert 0 < error.mean() < 0.03 * float(jnp.std(exact))


@functools.cache
def loss_and_gradient(config: T5Config) -> Any:
    params, *arrays = make(config)

    def loss(params: Params) -> jax.Array:
        return jnp.mean(jnp.square(run(config, params, *arrays)))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "dots"}, {"scan_unroll": 2}], ids=str)
def test_remat_and_unroll_change_no_value_and_no_gradient(change: dict[str, Any]) -> None:
    jax.tree.map(same, loss_and_gradient(dataclasses.replace(V1_0, **change)), loss_and_gradient(V1_0))


def test_dropout_needs_a_key_and_depends_on_it() -> None:
    params, *arrays = make(V1_0)
    none, first, again, second = (
        run(V1_0, params, *arrays, key) for key in (None, jax.random.key(0), jax.random.key(0), jax.random.key(1))
    )
    same(first, again, 0)
    assert float(jnp.abs(first - second).max()) > 0.01 < float(jnp.abs(first - none).max())
    same(run(dataclasses.replace(V1_0, dropout_rate=0.0), params, *arrays, jax.random.key(0)), none)
