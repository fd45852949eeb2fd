"""Columns that training can read instead of computing them: embeddings, and inverters' hypotheses with theirs.

Both are columns of a built data set (`data/columns.py`), for embedders behind an API and to repeat a run exactly. By
default, training computes them in the step and needs neither.

    DIR/columns/NAME                    embeddings: float16 [N, E]
    DIR/columns/NAME, NAME.embedding    hypotheses: ids [N, L], ended and padded; and float16 [N, E]

The work is done piece by piece: a piece on disk is not computed again, so a kill at any moment loses the piece in hand.
Several hosts share a folder and the work: host i of n makes every n-th piece, without talking to the others.

An inverter's hypotheses of its own training texts are better than those that the corrector will meet. *Out of fold*, K
inverters are each trained without one K-th of the texts (`data.folds`), and each makes the hypotheses of those.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from v2t_jax import progress
from v2t_jax.data.columns import Column, ColumnWriter, open_column
from v2t_jax.data.dataset import TokenDataset, fold_of
from v2t_jax.decode.state import PAD
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, check_identity, embed_texts, shares_vocabulary
from v2t_jax.errors import InputError
from v2t_jax.interop.files import sha256_of
from v2t_jax.inversion.pipeline import InversionPipeline, check_length, load, locate_model, read_model
from v2t_jax.models.embedder import embed_model_ids
from v2t_jax.parallel.processes import Share
from v2t_jax.train.step import greedy_hypotheses

EMBEDDING = ".embedding"  # behind a column of guesses, the name of their embeddings'

Arrays = dict[str, np.ndarray]
"""for each column, the values [rows, ...]"""
Specs = dict[str, tuple[str, tuple[int, ...]]]
"""for each column, dtype and shape of a text's value"""
Compute = Callable[[slice], Arrays]
"""of some rows of the data set"""


def embed_column(
    dataset: TokenDataset,
    name: str,
    embedder: TextEmbedder,
    *,
    max_length: int,
    batch_size: int = 256,
    share: Share = Share(),
) -> bool:
    """Writes the embeddings of texts as a model reads them: of their first max_length - 1 ids.

    Args:
        embedder: one that runs here and has the data set's own tokenizer gets ids, as in training; any other gets the
            texts that they stand for.

    Returns:
        Whether the column is finished: with several hosts, the last one to end finishes it.
    Raises:
        InputError: a setting is out of range, the column is there and made by something else, or the disk is full.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    if max_length < 2:
        raise InputError(f"max_length is {max_length}; it must be at least 2: one id and the end.")
    made_by = {"kind": "embeddings", "embedder": _embedder_record(embedder), "max_length": max_length}
    specs: Specs = {name: ("float16", (embedder.width,))}
    vocabulary = dataset.vocabulary()
    if isinstance(embedder, JaxEmbedder) and shares_vocabulary(embedder, vocabulary.tokenizer):
        check_length(max_length, embedder)
        piece_map = embedder.token_map()

        def program(weights: Any, ids: jax.Array) -> tuple[jax.Array]:
            return (embed_model_ids(embedder.config, piece_map, weights["embedder"], weights["pieces"], ids),)

        run = OnAllDevices(program, {"embedder": embedder.params, "pieces": vocabulary.vocab_map}, batch_size)

        def compute(rows: slice) -> Arrays:
            (vectors,) = run(dataset.padded(rows, max_length))
            return {name: vectors}
    else:

        def compute(rows: slice) -> Arrays:
            texts = vocabulary.decode(dataset.padded(rows, max_length))
            return {name: embed_texts(embedder, texts, batch_size)}

    return _fill(dataset, specs, made_by, compute, "embedding texts", share)


def hypothesis_columns(
    dataset: TokenDataset,
    name: str,
    models: Sequence[str],
    embedder: str | TextEmbedder | None = None,
    *,
    embeddings: str | None = None,
    batch_size: int = 256,
    share: Share = Share(),
) -> bool:
    """Writes what inverters guess of the texts' embeddings, greedily, and the embeddings of the guesses.

    Args:
        models: one model, or K that were each trained without one K-th of the texts, in the order of their folds.
        embedder: where the models' embedder lies, or itself.
        embeddings: a column to read the embeddings from; without one, the models' embedder makes them on the fly.

    Returns:
        Whether the columns are finished: with several hosts, the last one to end finishes them.
    Raises:
        InputError: the models don't go together or with the data set, the columns are there and made by something
            else, or the disk is full.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")
    _check_folds(models)
    loaded = [load(model, embedder) for model in models]
    first = loaded[0]
    for other in loaded[1:]:
        if (other.config, _embedder_record(other.embedder)) != (first.config, _embedder_record(first.embedder)):
            raise InputError(f"{models[0]} and {other.name} have other sizes or embedders: give models of one recipe.")
    stored_pieces = dataset.vocabulary(first.vocabulary.tokenizer).vocab_map
    if not np.array_equal(stored_pieces, first.vocabulary.vocab_map):
        raise InputError(
            f"The ids of {dataset.folder} are of another vocabulary than {first.name}'s: give a model that was trained "
            "on this data set."
        )
    length = first.config.max_length
    column = None if embeddings is None else open_column(dataset, embeddings)
    victim, shared = first.embedder, first.shares_vocabulary
    if column is None and not shared:
        raise InputError(
            f"{first.name} takes its texts' embeddings from {victim.name} by way of the text: make them first with "
            "'v2t data embed', and name that column with --embeddings."
        )
    made_by: dict[str, Any] = {
        "kind": "hypotheses",
        "max_length": length,
        "inverters": [sha256_of([locate_model(model) / "inverter.safetensors"]) for model in models],
        "embedder": _embedder_record(victim),
        "decoding": {"method": "greedy", "dtype": first.config.t5.dtype},
        "of": "on the fly" if column is None else column.made_by,
    }
    if column is not None:
        check_column(column, "embeddings", victim, length)
    programs = [_guessing(model, column is None, batch_size) for model in loaded]

    def compute(rows: slice) -> Arrays:
        inputs = dataset.padded(rows, length) if column is None else column.values[rows].astype(np.float32)
        guesses = np.full((len(inputs), length), PAD, np.int32)
        vectors = np.zeros((len(inputs), victim.width), np.float32)
        folds = fold_of(np.arange(rows.start, rows.stop), len(programs))
        for fold, run in enumerate(programs):
            chosen = folds == fold
            if not chosen.any():
                continue
            guesses[chosen], *made = run(inputs[chosen])
            spelt = [] if made else first.vocabulary.decode(guesses[chosen])
            vectors[chosen] = made[0] if made else embed_texts(victim, spelt, batch_size)
        return {name: guesses, name + EMBEDDING: vectors}

    specs: Specs = {name: ("int32", (length,)), name + EMBEDDING: ("float16", (victim.width,))}
    return _fill(dataset, specs, made_by, compute, "guessing texts", share)


def _check_folds(models: Sequence[str]) -> None:
    """Holds what each model's recipe says of folds against its place among the models."""
    if not models:
        raise InputError("Give a model, or as many as there are folds.")
    for i, model in enumerate(models):
        data = read_model(model).record.get("recipe", {}).get("data", {})
        folds, fold = data.get("folds", 1), data.get("fold", 0)
        if (folds, fold if folds > 1 else i) != (len(models), i):
            trained = f"without fold {fold} of {folds}" if folds > 1 else "on all texts"
            raise InputError(
                f"{model} was trained {trained} and is model {i} of {len(models)} here: give one model that was "
                "trained on all texts, or those of all folds in their order (data.folds, data.fold)."
            )


def check_column(column: Column, kind: str, embedder: TextEmbedder, max_length: int) -> None:
    """Holds what a column is, and who made it, against what a recipe takes it for.

    Args:
        kind: embeddings or hypotheses.

    Raises:
        InputError: it holds something else, or what is another embedder's or of texts of another length.
    """
    if column.made_by.get("kind") != kind:
        raise InputError(
            f"The column {column.name} holds {column.made_by.get('kind')}, not {kind}: name another as data.{kind}."
        )
    check_identity(column.made_by.get("embedder", {}), embedder.identity, f"The column {column.name}")
    made_for = column.made_by.get("max_length")
    if made_for != max_length:
        raise InputError(
            f"The column {column.name} was made for texts of {made_for} tokens, not {max_length}: make it again, or "
            f"set model.max_length={made_for}."
        )


def _embedder_record(embedder: TextEmbedder) -> dict[str, Any]:
    """All that determines an embedder's vectors, as far as it can be seen."""
    identity = embedder.identity
    # The folder of an embedder may move; of others the name is all there is.
    return identity.to_dict() | ({"name": Path(identity.name).name} if identity.weights_sha256 else {})


def _guessing(model: InversionPipeline, on_the_fly: bool, batch_size: int) -> "OnAllDevices":
    """Texts' ids (on the fly) or embeddings -> guesses [n, L], and their embeddings where the embedder shares ids."""
    guess = functools.partial(greedy_hypotheses, model.config)
    embedder = model.embedder
    if not model.shares_vocabulary or not isinstance(embedder, JaxEmbedder):
        return OnAllDevices(lambda weights, e: (guess(weights, e),), model.params["inverter"], batch_size)
    embed = functools.partial(embed_model_ids, embedder.config, embedder.token_map())

    def program(weights: Any, given: jax.Array) -> tuple[jax.Array, ...]:
        e = embed(weights["embedder"], weights["pieces"], given) if on_the_fly else given
        guesses = guess(weights["inverter"], e)
        return guesses, embed(weights["embedder"], weights["pieces"], guesses)

    weights = {"inverter": model.params["inverter"], "embedder": embedder.params, "pieces": model.vocabulary.vocab_map}
    return OnAllDevices(program, weights, batch_size)


class OnAllDevices:
    """A program over many rows: in batches of one size, cut over all of this process's devices.

    Args:
        program: `program(weights, rows [B, ...])` -> arrays [B, ...]; what comes of a row depends on that row alone.
    """

    def __init__(self, program: Callable[[Any, jax.Array], tuple[jax.Array, ...]], weights: Any, batch_size: int):
        devices = jax.local_devices()
        mesh = Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))
        self._rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("rows",), ()))
        self._weights = jax.device_put(weights, whole)
        self._program = jax.jit(program, out_shardings=self._rows)
        self._batch_size = -(-batch_size // len(devices)) * len(devices)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """The program's arrays [n, ...] of rows [n, ...]."""
        parts = []
        for start in range(0, len(rows), self._batch_size):
            chosen = rows[start : start + self._batch_size]
            missing = self._batch_size - len(chosen)
            chosen = np.pad(chosen, [(0, missing), *[(0, 0)] * (rows.ndim - 1)], mode="edge")
            parts.append(self._program(self._weights, jax.device_put(chosen, self._rows)))
        return tuple(
            np.concatenate([np.asarray(part) for part in arrays])[: len(rows)] for arrays in zip(*parts, strict=True)
        )


def _fill(
    dataset: TokenDataset, specs: Specs, made_by: dict[str, Any], compute: Compute, doing: str, share: Share
) -> bool:
    """Writes columns, those of one text always together; True if no host has anything left to do."""
    try:
        writers = {name: ColumnWriter(dataset, name, dtype, shape, made_by) for name, (dtype, shape) in specs.items()}
        missing = sorted({piece for writer in writers.values() for piece in writer.missing()})
        some, done = next(iter(writers.values())), 0
        mine = [(piece, some.rows(piece)) for piece in missing if share.has(piece)]
        with progress.bar(sum(rows.stop - rows.start for _, rows in mine), doing, unit="texts") as update:
            for piece, rows in mine:
                arrays = compute(rows)
                if not all(np.isfinite(array).all() for array in arrays.values()):
                    raise InputError("The weights give NaN or infinite values: download them again.")
                for name, writer in writers.items():
                    writer.write(piece, arrays[name])
                done += rows.stop - rows.start
                update(done)
        if any(writer.missing() for writer in writers.values()):
            return False
        for writer in writers.values():
            writer.finish()
    except OSError as error:
        raise InputError(
            f"The work stopped at {error.filename or dataset.folder} ({error.strerror or error}); fix that or free "
            "space, then run the same command to go on."
        ) from error
    return True
