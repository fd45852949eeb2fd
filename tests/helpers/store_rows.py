"""A thousand rows, as every store is written with."""

import hashlib
from pathlib import Path

import numpy as np

N, WIDTH = 1000, 16
E = np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32)
E[17] = 0
UNIT = E / np.maximum(np.linalg.norm(E, axis=1, keepdims=True), 1e-30)
NAMES = [f"r{i}" for i in range(N)]
TEXTS = [f"the text, 'number' {i} ☃" * (1 + i % 3) for i in range(N)]
META = [{"page": i, "lang": "en"} for i in range(N)]


def hashes(path: Path) -> dict[str, str]:
    """Of every file in a folder, or of the folder that a file is in."""
    files = sorted(file for file in (path if path.is_dir() else path.parent).rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
