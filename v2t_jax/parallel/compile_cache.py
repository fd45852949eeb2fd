"""Keep compiled programs between runs, so that only the first run of a shape waits for the compiler."""

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

import jax

MAX_BYTES = 4 * 1024**3  # least recently used programs are dropped beyond this
MIN_COMPILE_SECONDS = 0.3  # quicker compilations cost less than a look at the disk
_OPTION = "jax_compilation_cache_dir"


def user_cache_dir() -> Path:
    """The project's folder under the user's cache folder: $XDG_CACHE_HOME/v2t_jax or ~/.cache/v2t_jax."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "v2t_jax"


def enable_compilation_cache(folder: Path | None = None) -> Path | None:
    """Make JAX keep its compiled programs on disk; call it before the first compilation.

    Whoever set JAX's own cache folder (JAX_COMPILATION_CACHE_DIR) keeps it. A folder that can't be written is
    no error: the run goes on without a cache.

    Args:
        folder: where to keep them; by default `user_cache_dir() / "xla"`.

    Returns:
        The folder in use, or None where there is no cache.
    """
    if configured := getattr(jax.config, _OPTION):
        return Path(configured)
    try:
        # Home folders are shared between machines; programs compiled for one CPU can crash on another.
        folder = (folder or user_cache_dir() / "xla") / _cpu_fingerprint()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # cached programs are code: the user's alone
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update(_OPTION, str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)  # also locks it between processes
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder


def _cpu_fingerprint() -> str:
    """A short name for the kind of CPU: the architecture and, where Linux tells, its instruction sets."""
    features = ""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:  # only Linux has it
        features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
