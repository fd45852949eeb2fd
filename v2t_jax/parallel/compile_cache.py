"""Compiled programs are kept on disk, so that only the first run of a shape waits for the compiler."""

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

import jax

MAX_BYTES = 4 * 1024**3  # beyond this, the least recently used programs are dropped
MIN_COMPILE_SECONDS = 0.3  # faster compilations cost less than reading the cache


def user_cache_dir() -> Path:
    """$XDG_CACHE_HOME/v2t_jax or ~/.cache/v2t_jax."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "v2t_jax"


def enable_compilation_cache(folder: Path | None = None) -> Path | None:
    """Makes JAX keep its compiled programs in a folder, by default the user's, and returns the one in use, if any.

    JAX_COMPILATION_CACHE_DIR goes first. Call it before the first compilation.
    """
    if configured := jax.config.values["jax_compilation_cache_dir"]:
        return Path(configured)
    features = ""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:  # Linux only
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    try:
        # Home folders are shared between machines; programs compiled for one CPU can crash on another.
        cpu = f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
        folder = (folder or user_cache_dir() / "xla") / cpu
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # cached programs are code: private
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)  # also locks it between processes
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder
