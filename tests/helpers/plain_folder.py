"""Embedder folders as transformers writes them, from the golden cases."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from tests.helpers.equivalence import load, state_dict
from tests.helpers.tiny_run import make_tokenizer


def plain(folder: Path, name: str = "bert", tokenizer: Tokenizer | None = None) -> Path:
    """config.json, model.safetensors and tokenizer.json of a golden case."""
    case = load(name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(str(case["config"]))
    save_file({key: value.astype(np.float32) for key, value in state_dict(case).items()}, folder / "model.safetensors")
    (tokenizer or make_tokenizer()).save(str(folder / "tokenizer.json"))
    return folder
