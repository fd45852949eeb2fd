"""Weak scaling is measured on whole processes, and the traffic of a step is what data parallelism needs."""

import pytest

from v2t_jax.bench.scaling import Scaling, compare
from v2t_jax.errors import InputError


@pytest.mark.slow
@pytest.mark.multihost
def test_one_device_sends_nothing_and_more_send_the_gradients():
    one, two = compare(Scaling(rows=2, num_tokens=8, steps=1), layouts=((1, 1), (2, 1)))
    assert (one["processes"], one["devices"], two["processes"], two["devices"]) == (1, 1, 2, 2)
    assert one["overhead"] == 1 and two["overhead"] > 0 and one["collectives"] == {}
    # Every parameter's gradient is summed over devices, once, at least: 1.4 million of float32.
    assert two["collectives"]["all-reduce"]["bytes"] > 4e6


def test_settings_out_of_range():
    with pytest.raises(InputError, match="rows is 0; it must be at least 1"):
        Scaling(rows=0)
