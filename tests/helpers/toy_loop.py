"""A correction loop over toy callables: a position-dependent bag of random vectors is the embedder."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.inversion.correction import CorrectionLoop, CorrectionSettings, cosine_similarity
from v2t_jax.inversion.upstream import topk_order

VOCAB, LENGTH, WIDTH, BATCH = 12, 6, 24, 10


def toy_params(seed=0):
    return {"table": jax.random.normal(jax.random.key(seed), (LENGTH, VOCAB, WIDTH))}


def toy_texts(seed, rows):
    """ids [rows, L]: random tokens, eos somewhere, pad after it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, VOCAB, (rows, LENGTH))
    end = rng.integers(2, LENGTH, rows)[:, None]
    position = np.arange(LENGTH)[None]
    return np.where(position < end, ids, np.where(position == end, 1, 0)).astype(np.int32)


@jax.jit
def embed(params, ids):
    vectors = jnp.take_along_axis(params["table"][None], ids[:, :, None, None], axis=2)[:, :, 0]
    return jnp.sum(jnp.where((ids == 0)[:, :, None], 0.0, vectors), axis=1)


@partial(jax.jit, static_argnums=2)
def hypothesize(params, e, k):
    """The k candidates differ in their first token; the first of them is the greedy one."""
    scores = jnp.sum(e[:, None, None, :] * params["table"][None], axis=-1)  # [B, L, V]
    ids = 2 + jnp.argmax(scores[:, :, 2:], axis=-1)
    ids = jnp.repeat(ids[:, None, :], k, axis=1)
    shift = jnp.arange(k)[None, :]
    ids = ids.at[:, :, 0].set(2 + (ids[:, :, 0] - 2 + shift) % (VOCAB - 2))
    return ids.astype(jnp.int32)


def after_eos(ids):
    is_eos = (ids == 1).astype(jnp.int32)
    return jnp.cumsum(is_eos, axis=-1) - is_eos > 0


def propose_greedy(params, given, k):
    """The k single-token changes that bring the embedding closest to e: converges; pads after eos."""
    e, ids, emb, _ = given
    table = params["table"] * (jnp.arange(VOCAB) > 0)[None, :, None]
    current = jnp.take_along_axis(table[None], ids[:, :, None, None], axis=2)
    moved = emb[:, None, None, :] + table[None] - current - e[:, None, None, :]  # [rows, L, V, E]
    same = ids[:, :, None] == jnp.arange(VOCAB)[None, None]
    distance = jnp.where(after_eos(ids)[:, :, None] | same, jnp.inf, jnp.sum(moved**2, axis=-1))
    _, flat = jax.lax.top_k(-distance.reshape(ids.shape[0], -1), k)
    rows, which = jnp.arange(ids.shape[0])[:, None], jnp.arange(k)[None]
    out = jnp.repeat(ids[:, None, :], k, axis=1)
    out = out.at[rows, which, flat // VOCAB].set((flat % VOCAB).astype(jnp.int32))
    return jnp.where(after_eos(out), 0, out)


def propose_hashed(params, given, k):
    """Changes that know nothing of e, decided by hashing ids: wanders, repeats itself, gets worse."""
    ids = given.ids
    weights = jnp.asarray([7, 31, 3, 17, 11, 5])
    mixed = (jnp.sum(ids * weights[None], axis=1)[:, None] * 13 + jnp.arange(k)[None] * 29) % 1009
    position, token = mixed % LENGTH, 2 + (mixed // LENGTH) % (VOCAB - 2)
    hit = jnp.arange(LENGTH)[None, None] == position[:, :, None]
    return jnp.where(hit, token[:, :, None], ids[:, None, :]).astype(jnp.int32)


def propose_same(params, given, k):
    """Nothing new, ever."""
    return jnp.repeat(given.ids[:, None, :], k, axis=1)


@cache  # tests with the same settings share a compiled program
def shared_loop(propose, settings):
    return CorrectionLoop(hypothesize, (propose,), embed, settings, rank=topk_order)


def make_loop(propose=propose_greedy, **settings):
    return shared_loop(propose, CorrectionSettings(**settings))


cosine = jax.jit(cosine_similarity)


def assert_same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        if name.endswith("similarity") or name == "runner_up":
            np.testing.assert_allclose(x, y, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(x, y, err_msg=name)
