"""Compiled programs are kept in the user's cache folder, and a folder that can't be used is no error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from v2t_jax.parallel.compile_cache import user_cache_dir

SCRIPT = """
import jax, jax.numpy as jnp
from v2t_jax.parallel import compile_cache
compile_cache.MIN_COMPILE_SECONDS = 0.0
print(compile_cache.enable_compilation_cache())
jax.jit(lambda x: jnp.tanh(x @ x))(jnp.ones((8, 8))).block_until_ready()
"""


def run(**env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in {"JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"}}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    done = subprocess.run(command, env={**clean, **env}, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_programs_are_kept_in_the_users_cache_folder(tmp_path: Path) -> None:
    folder = Path(run(XDG_CACHE_HOME=str(tmp_path)))
    assert folder.parent == tmp_path / "v2t_jax" / "xla"
    assert list(folder.glob("*-cache"))


def test_jaxs_own_setting_goes_first(tmp_path: Path) -> None:
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"), XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "mine")


def test_a_folder_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "v2t_jax").write_text("a file where the folder should be")
    assert run(XDG_CACHE_HOME=str(tmp_path)) == "None"


def test_without_xdg_it_is_under_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert user_cache_dir() == tmp_path / ".cache" / "v2t_jax"
