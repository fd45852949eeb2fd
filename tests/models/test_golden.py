"""Our networks against the committed outputs of torch, transformers and sentence-transformers."""

from collections.abc import Callable

import pytest

from tests.helpers import upstream_pair
from tests.helpers.equivalence import CHECKS, GOLDEN, Case, load

PAIRS = [
    pytest.param(name, check, id=f"{name}-{check.__name__}") for name, checks in CHECKS.items() for check in checks
]


@pytest.mark.parametrize(("name", "check"), PAIRS)
def test_equals_torch(name: str, check: Callable[[Case], None]) -> None:
    check(load(name))


def test_every_golden_file_is_checked_and_small() -> None:
    files = {path.stem: path.stat().st_size for path in GOLDEN.glob("*.npz")}
    pairs = {name: files.pop(name) for name in upstream_pair.NAMES}  # checked by tests/interop/test_vec2text.py
    assert files.pop(upstream_pair.BEAMS) < 50_000  # there too
    assert set(files) == set(CHECKS)
    assert max(files.values()) < 150_000
    assert max(pairs.values()) < 400_000
