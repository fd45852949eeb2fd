"""What training can read of each text instead of computing it: embeddings, and inverters' guesses with theirs.

Both are columns of a built data set (`data/blocks.py`), for embedders behind an API, and to repeat a run exactly. On
the fly, the default, needs neither.

    DIR/columns/NAME                    embeddings: float16 [E]
    DIR/columns/NAME, NAME.embedding    guesses: ids [L] with their end, padded; and float16 [E]

The work goes piece by piece: a piece is written whole or not at all, and one that is there is not made again. So a kill
at any moment loses the piece in hand. Several hosts share a folder and the work, each its shards, without talking.

An inverter's guesses at its own training texts are better than those that the corrector will meet. *Out of fold*, K
inverters each learn without one K-th of the texts (`data.folds`), and each guesses those.
"""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from v2t_jax import progress
from v2t_jax.data.batches import fill
from v2t_jax.data.blocks import Column, ColumnWriter, StoredTexts, fold_of, write_file
from v2t_jax.data.vocabulary import PAD
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, check_identity, embed_texts, shares_vocabulary
from v2t_jax.errors import InputError
from v2t_jax.interop.files import sha256_of
from v2t_jax.inversion.pipeline import InversionPipeline, check_length, load, locate_model, read_model
from v2t_jax.models.embedder import embed_model_ids
from v2t_jax.parallel.processes import Share
from v2t_jax.train.step import greedy_hypotheses

PIECE_BLOCKS = 16  # blocks that are computed, and kept, at a time
EMBEDDING = ".embedding"  # behind a column of guesses, the name of their embeddings'

Arrays = dict[str, np.ndarray]
"""for each column, an array of each text"""
Specs = dict[str, tuple[str, tuple[int, ...]]]
"""for each column, dtype and shape of a text's array"""
Compute = Callable[[list[np.ndarray], np.ndarray], Arrays]
"""of texts (ids without their end) and their row numbers in the data set"""


def embed_column(
    stored: StoredTexts,
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
    vocabulary = stored.vocabulary()
    if isinstance(embedder, JaxEmbedder) and shares_vocabulary(embedder, vocabulary.tokenizer):
        check_length(max_length, embedder)
        piece_map = embedder.token_map()

        def program(weights: Any, ids: jax.Array) -> tuple[jax.Array]:
            return (embed_model_ids(embedder.config, piece_map, weights["embedder"], weights["pieces"], ids),)

        run = OnAllDevices(program, {"embedder": embedder.params, "pieces": vocabulary.vocab_map}, batch_size)

        def compute(texts: list[np.ndarray], rows: np.ndarray) -> Arrays:
            (vectors,) = run(padded(texts, max_length))
            return {name: vectors}
    else:

        def compute(texts: list[np.ndarray], rows: np.ndarray) -> Arrays:
            return {name: embed_texts(embedder, vocabulary.decode(padded(texts, max_length)), batch_size)}

    return _fill(stored, specs, made_by, compute, "embedding texts", share)


def hypothesis_columns(
    stored: StoredTexts,
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
    stored_pieces = stored.vocabulary(first.vocabulary.tokenizer).vocab_map
    if not np.array_equal(stored_pieces, first.vocabulary.vocab_map):
        raise InputError(
            f"The ids of {stored.folder} are of another vocabulary than {first.name}'s: give a model that was trained "
            "on this data set."
        )
    length = first.config.max_length
    column = None if embeddings is None else stored.column(embeddings)
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
    ends = np.cumsum(stored.block_rows)
    programs = [_guessing(model, column is None, batch_size) for model in loaded]

    def compute(texts: list[np.ndarray], rows: np.ndarray) -> Arrays:
        blocks = np.searchsorted(ends, rows, side="right")
        # A piece is whole blocks.
        inputs = padded(texts, length) if column is None else column.read(np.unique(blocks)).astype(np.float32)
        guesses = np.full((len(rows), length), PAD, np.int32)
        vectors = np.zeros((len(rows), victim.width), np.float32)
        for fold, run in enumerate(programs):
            chosen = fold_of(blocks, len(programs)) == fold
            if not chosen.any():
                continue
            guesses[chosen], *made = run(inputs[chosen])
            spelt = [] if made else first.vocabulary.decode(guesses[chosen])
            vectors[chosen] = made[0] if made else embed_texts(victim, spelt, batch_size)
        return {name: guesses, name + EMBEDDING: vectors}

    specs: Specs = {name: ("int32", (length,)), name + EMBEDDING: ("float16", (victim.width,))}
    return _fill(stored, specs, made_by, compute, "guessing texts", share)


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


def padded(texts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Ids int32 [n, length]: what fits with its end, padded."""
    lengths = np.array([len(text) for text in texts], np.int64)
    return fill(np.concatenate(texts), np.cumsum(lengths) - lengths, np.minimum(lengths, length - 1), length)


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
    stored: StoredTexts, specs: Specs, made_by: dict[str, Any], compute: Compute, doing: str, share: Share
) -> bool:
    """Writes columns, those of one text always together; True if no host has anything left to do."""
    writers = {name: ColumnWriter(stored, name, dtype, shape, made_by) for name, (dtype, shape) in specs.items()}
    shards = {shard for writer in writers.values() for shard in writer.missing()}
    mine = [shard for shard in sorted(shards) if share.has(shard)]
    first_row = np.concatenate([[0], np.cumsum(stored.block_rows)])
    work = stored.folder / "columns" / f".{next(iter(specs))}.pieces"
    total = sum(int(first_row[stored.first_block[shard + 1]] - first_row[stored.first_block[shard]]) for shard in mine)
    done = 0
    try:
        with progress.bar(total, doing, unit="texts") as update:
            for shard in mine:
                pieces = []
                for piece, (block, texts) in enumerate(_pieces(stored, shard)):
                    file = work / f"{shard:05d}-{piece:05d}.npz"
                    rows = np.arange(first_row[block], first_row[block] + len(texts))
                    if not file.is_file():
                        arrays = compute(texts, rows)
                        if not all(np.isfinite(array).all() for array in arrays.values()):
                            raise InputError(
                                "The weights give NaN or infinite values; they are damaged: fetch them again."
                            )
                        buffer = io.BytesIO()
                        np.savez(buffer, allow_pickle=False, **arrays)
                        write_file(file, buffer.getvalue())
                    pieces.append(file)
                    done += len(texts)
                    update(done)
                for name, writer in writers.items():
                    if shard in writer.missing():
                        writer.write(shard, _blocks(stored, shard, pieces, name))
                for file in pieces:
                    file.unlink()
        if any(writer.missing() for writer in writers.values()):
            return False
        for writer in writers.values():
            writer.finish()
        if work.is_dir():
            for left in work.iterdir():  # by those who were killed while they wrote
                left.unlink(missing_ok=True)
            work.rmdir()
    except OSError as error:
        raise InputError(
            f"The work stopped at {error.filename or work} ({error.strerror or error}); mend that, or free space, then "
            "run the same command to go on."
        ) from error
    return True


def _pieces(stored: StoredTexts, shard: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """First block and texts of each piece of a shard."""
    block, texts = int(stored.first_block[shard]), []
    for i, rows in enumerate(stored.texts(shard), 1):
        texts += rows
        if i % PIECE_BLOCKS == 0:
            yield block, texts
            block, texts = block + PIECE_BLOCKS, []
    if texts:
        yield block, texts


def _blocks(stored: StoredTexts, shard: int, pieces: list[Path], name: str) -> Iterator[np.ndarray]:
    """A column of a shard's pieces, a block at a time."""
    sizes = stored.block_rows[stored.first_block[shard] : stored.first_block[shard + 1]]
    for i, file in enumerate(pieces):
        with np.load(file, allow_pickle=False) as arrays:
            values = arrays[name]
        ends = np.cumsum(sizes[i * PIECE_BLOCKS : (i + 1) * PIECE_BLOCKS])
        yield from np.split(values, ends[:-1])
