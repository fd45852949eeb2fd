"""Pairs that the original trained (tests/oracle/upstream.py): their golden files, and how ours is compared with them.

A golden file holds a whole pair, so that default tests need neither torch nor the original: "text/PATH" the JSON files
of its folders, "state/inverter/KEY" and so on the weights (float16, exact in float32), and "record/NAME" what the
original did. Written anew, with `python tests/oracle/upstream.py`, by

    python -m tests.helpers.upstream_pair NAME=FOLDER ...        (in the environment of `make oracle`)
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.helpers.equivalence import GOLDEN, Case, close
from v2t_jax.config import Stage
from v2t_jax.interop.files import open_checkpoint
from v2t_jax.inversion.api import invert_embeddings
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.inverter import Inverter
from v2t_jax.vec2text.checkpoints import Pair, read_base, read_settings, read_vec2text

BEAMS = "vec2text_beams"
NAMES = ("vec2text_a", "vec2text_b", "vec2text_gtr")
LOGITS = 1e-4
T5_KEYS = "encoder_decoder."
TIED = tuple(f"{T5_KEYS}{name}.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"))
# Of whole searches, what is compared: every step's selection, and the candidates of the first.
SEARCHES = ((0, 1), (3, 1), (3, 2), (3, 4))  # (num_steps, sequence_beam_width) as ours are named


def embedder_of(folder: Path) -> Path:
    return next((folder / "sentence-transformers").iterdir())


def write_pair(case: Case, folder: Path, head: bool = False) -> Path:
    """A golden pair as the folders that the original's own save_pretrained makes of it, as safetensors.

    Those lack what is tied; from them the original restores a wrong model, unless the `head` is there. `t5-base` gets
    the inverter's weights: nobody reads them, but the original wants some.
    """
    for name, text in case.items():
        if name.startswith("text/"):
            file = folder / name.removeprefix("text/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(text), encoding="utf-8")
    for name in ("inverter", "corrector", "embedder"):
        start = f"state/{name}/"
        state = {
            key.removeprefix(start): np.asarray(value, np.float32)
            for key, value in case.items()
            if key.startswith(start)
        }
        if head and f"{T5_KEYS}shared.weight" in state:
            state[f"{T5_KEYS}lm_head.weight"] = state[f"{T5_KEYS}shared.weight"]
        target = embedder_of(folder) if name == "embedder" else folder / name
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    state = load_file(folder / "inverter" / "model.safetensors")
    base = {key.removeprefix(T5_KEYS): value for key, value in state.items() if key.startswith(T5_KEYS)}
    save_file(base, folder / "t5-base" / "model.safetensors", metadata={"format": "pt"})
    return folder


def record_of(case: Case) -> Case:
    return {key.removeprefix("record/"): value for key, value in case.items() if key.startswith("record/")}


def read_pair(folder: Path) -> Pair:
    t5, _ = read_base(str(folder / "t5-base"))
    folders: dict[Stage, Path] = {"inverter": folder / "inverter", "corrector": folder / "corrector"}
    settings = {stage: read_settings(stage, folder) for stage, folder in folders.items()}
    return read_vec2text(folders, settings, t5)


def check_logits(pair: Pair, record: Case) -> float:
    """Of both networks under teacher forcing; returns the largest difference."""
    inputs = ("e", "labels", "hypothesis", "e_hat")
    e, labels, hypothesis, e_hat = (jnp.asarray(record[name]) for name in inputs)
    params = jax.device_put(pair.params)
    logits = jax.jit(Inverter(pair.config).apply)({"params": params["inverter"]}, e, labels)
    close(logits, record["inverter_logits"], LOGITS, "inverter")
    corrector = jax.jit(Corrector(pair.config).apply)
    second = corrector({"params": params["corrector"]}, e, hypothesis, e_hat, labels)
    close(second, record["corrector_logits"], LOGITS, "corrector")
    differences = (logits - record["inverter_logits"], second - record["corrector_logits"])
    return max(float(np.abs(difference).max()) for difference in differences)


def selected(record: Case, num_steps: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
    """What the original selected at every step: ids [B, N + 1, 127], cosines [B, N + 1] (None of no steps)."""
    stem, batch = f"search/{num_steps}/{width if width > 1 else 0}", len(record["e"])
    ids, cosines = [], []
    for step in range(num_steps + 1):
        chosen = record[f"{stem}/{step}/{'chosen' if step else 'ids'}"]
        first = chosen.reshape(batch, -1, chosen.shape[1])[:, 0]  # the best of a beam comes first
        ids.append(np.pad(first, ((0, 0), (0, 127 - first.shape[1]))))
        if num_steps:
            cosines.append(record[f"{stem}/{step}/{'chosen_cosine' if step else 'cosine'}"].reshape(batch, -1)[:, 0])
    return np.stack(ids, axis=1), np.stack(cosines, axis=1) if cosines else None


def check_search(model: InversionPipeline, record: Case, num_steps: int, width: int) -> int:
    """Ids and cosines of every step, and the texts that come out at the end; returns the number of tokens compared."""
    e, batch = record["e"], len(record["e"])
    options: dict[str, Any] = {"num_steps": num_steps, "sequence_beam_width": width, "mode": "upstream"}
    found = invert_embeddings(model, e, **options)
    texts = record[f"search/{num_steps}/{width if width > 1 else 0}/texts"].tolist()
    assert [one.text for one in found] == texts
    filled = np.concatenate([e, np.repeat(e[-1:], 8 - batch, axis=0)])  # to the shape that is compiled already
    steps = model.correction_loop(width, "upstream")(model.loop_params(), filled, num_steps)
    ids, cosines = selected(record, num_steps, width)
    np.testing.assert_array_equal(steps.trace_ids[:batch], ids)
    if cosines is not None:
        close(steps.trace_similarity[:batch], cosines, LOGITS, "cosines")
        close([[step.cosine for step in one.trace] for one in found], cosines, LOGITS, "cosines of texts")
    return int((ids != 0).sum())


def read_recorded(folder: Path) -> Case:
    with np.load(folder / "record.npz", allow_pickle=False) as file:
        return dict(file)


def golden_of(folder: Path) -> Case:
    """The inverse of `write_pair`, of a folder where the original made and recorded a pair."""
    case: Case = {f"record/{name}": value for name, value in read_recorded(folder).items()}
    for path in sorted(folder.rglob("*.json")):
        if path.parent.name not in ("tmp_trainer", "bert"):
            case[f"text/{path.relative_to(folder)}"] = np.array(path.read_text(encoding="utf-8"))
    for name, source in {
        "inverter": folder / "inverter",
        "corrector": folder / "corrector",
        "embedder": embedder_of(folder),
    }.items():
        for key, tensor in open_checkpoint(source).items():
            if key not in TIED:
                value = tensor[:].astype(np.float16)
                np.testing.assert_array_equal(value.astype(np.float32), tensor[:], err_msg=key)
                case[f"state/{name}/{key}"] = value
    return case


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, _, source = argument.partition("=")
        file = GOLDEN / f"{name}.npz"
        np.savez_compressed(file, **golden_of(Path(source)))
        print(f"{file}  {file.stat().st_size / 1000:.0f} kB  {json.loads((Path(source) / 'spec.json').read_text())}")
