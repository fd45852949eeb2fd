"""Peaks are measured on little, and programs are cached again after a command."""

from collections.abc import Iterator

import jax
import pytest

from v2t_jax.bench import peaks


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(peaks, "MATRIX", 128)
    monkeypatch.setattr(peaks, "READ", 2**20)
    peaks._measured.cache_clear()
    yield
    peaks._measured.cache_clear()
    jax.config.update("jax_enable_compilation_cache", True)
