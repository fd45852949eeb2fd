"""Batches in parts: what is expanded, and that a search finds the same however its batch is split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.toy_loop import BATCH, assert_same, embed, hypothesize, propose_hashed
from v2t_jax.config import MeshConfig
from v2t_jax.inversion.correction import CorrectionLoop, CorrectionSettings
from v2t_jax.inversion.parts import CORRECTED, EDITED, by_parts
from v2t_jax.parallel.mesh import batch_sharding, make_mesh


@pytest.mark.parametrize(
    ("rows", "devices", "expanded"),
    [
        (2, 1, [0, 3]),  # the two that aren't done make one part
        (4, 1, [0, 1, 2, 3]),
        (2, 2, [0, 3, 4, 5]),  # two of each device
        (None, 1, range(8)),
        (3, 1, range(8)),  # doesn't divide 8
        (1, 3, range(8)),  # the batch lies on fewer devices than there are
        (8, 1, range(8)),
    ],
)
def test_the_parts_are_those_that_have_rows_to_expand(rows, devices, expanded) -> None:
    done = jnp.array([0, 1, 1, 0, 1, 1, 1, 1], bool)
    given, state = jnp.arange(1, 9), {"a": jnp.zeros((8, 3)), "b": jnp.arange(8)}

    def expand(given, state):
        return {"a": state["a"] + given[:, None], "b": -state["b"]}

    after = jax.jit(functools.partial(by_parts, expand, rows, devices))(done, given, state)
    chosen = np.isin(np.arange(8), list(expanded))
    np.testing.assert_array_equal(after["a"], np.where(chosen[:, None], np.arange(1, 9)[:, None], 0) * np.ones(3))
    np.testing.assert_array_equal(after["b"], np.where(chosen, -1, 1) * np.arange(8))


def test_parts_have_rows_of_every_device() -> None:
    """What lies on eight devices stays there."""
    place = batch_sharding(make_mesh(MeshConfig(), jax.devices()))
    given, state, done = (jax.device_put(x, place) for x in (jnp.arange(32), jnp.zeros(32), jnp.arange(32) % 4 > 1))
    run = jax.jit(lambda done, given, state: by_parts(jnp.add, 1, 8, done, given, state))
    after = run(done, given, state)
    np.testing.assert_array_equal(after, jnp.where(done, 0, given))
    assert after.sharding.is_equivalent_to(place, 1)
    assert "all-gather" not in run.lower(done, given, state).compile().as_text()


@pytest.mark.parametrize("settings", [{}, {"patience": 1}, {"sequence_beam_width": 1}])
def test_a_search_finds_the_same_part_by_part(params, targets, settings) -> None:
    settings = CorrectionSettings(**settings)
    functions = hypothesize, (propose_hashed,), embed, settings
    whole = CorrectionLoop(*functions)(params, targets, 6)
    for rows in (1, BATCH // 2):
        assert_same(CorrectionLoop(*functions, step_rows=rows)(params, targets, 6), whole)


def test_rows_at_once_are_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [CORRECTED.rows(each) for each in (1, 16, 60, 100)] == [64, 4, 1, 1]  # on a CPU
    assert EDITED.rows(143) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [CORRECTED.rows(each) for each in (1, 16, 81)] == [4096, 256, 32] and EDITED.rows(143) == 4
