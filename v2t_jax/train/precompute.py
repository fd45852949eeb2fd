"""Columns that training can read instead of computing them in its step: embeddings, and inverters' hypotheses.

    DIR/columns/NAME                    embeddings: float16 [N, E], made here or imported
    DIR/columns/NAME, NAME.embedding    hypotheses: ids [N, L], ended and padded; and float16 [N, E]

A piece on disk (`data/columns.py`) is not computed again, so a kill at any moment loses the piece in hand. Several
hosts share a folder and the work: host i of n makes every n-th piece, without talking to the others.

An inverter's hypotheses of its own training texts are better than those that the corrector will meet. *Out of fold*, K
inverters are each trained without one K-th of the texts (`data.folds`), and each makes the hypotheses of those.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from v2t_jax import progress
from v2t_jax.config import MeshConfig
from v2t_jax.data import columns
from v2t_jax.data.columns import Column, ColumnWriter, open_column
from v2t_jax.data.dataset import TokenDataset, fold_of, resumable
from v2t_jax.data.matching import match
from v2t_jax.data.vectors import open_vectors
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.base import JaxEmbedder, TextEmbedder, check_identity, embed_texts, shares_vocabulary
from v2t_jax.errors import InputError, check_whole
from v2t_jax.interop.files import sha256_of
from v2t_jax.inversion.pipeline import check_length, load, locate_model, read_model
from v2t_jax.models.embedder import embed_model_ids
from v2t_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from v2t_jax.parallel.processes import Share
from v2t_jax.train.step import greedy_hypotheses

EMBEDDING = ".embedding"  # behind a column of guesses, the name of their embeddings'
COMPARED = 32  # imported vectors, with those of the embedder that is said to have made them
LEAST_COSINE = 0.7  # their median: other rounding, cutting or letter case cost less, another embedder leaves about 0

OnRows = Callable[[np.ndarray], np.ndarray]  # [n, ...] -> [n, ...], row by row


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

    Returns:
        Whether the column is finished: with several hosts, the last one to end finishes it.
    """
    check_whole("batch_size", batch_size, 1)
    check_whole("max_length", max_length, 2)  # one id and the end
    made_by = {"kind": "embeddings", "embedder": _embedder_record(embedder), "max_length": max_length}
    embed = _embed_ids(embedder, dataset.vocabulary(), max_length, batch_size)

    def compute(rows: slice) -> dict[str, np.ndarray]:
        return {name: embed(dataset.padded(rows, max_length))}

    return _fill(dataset, {name: ("float16", embedder.width)}, made_by, compute, "embedding texts", share)


def import_column(
    dataset: TokenDataset,
    name: str,
    vectors: str,
    embedder: TextEmbedder,
    *,
    max_length: int,
    texts: str | None = None,
) -> int:
    """Writes the texts' vectors out of a file (`data/matching.py`), which are of whole texts, as embeddings.

    Args:
        embedder: the one that made them. It is asked for nothing but, if it runs here, a few vectors to compare.

    Returns:
        Rows of the file that belong to no text of the data set.
    """
    check_whole("max_length", max_length, 2)
    found, size = match(dataset, vectors, texts, embedder.identity.width), columns.PIECE_ROWS
    # In what arithmetic they were made isn't known.
    record = {field: value for field, value in _embedder_record(embedder).items() if field != "dtype"}
    made_by = {"kind": "embeddings", "embedder": record, "max_length": max_length, "vectors": found.sha256}
    if longer := int((np.diff(dataset.offsets) >= max_length).sum()):
        progress.note(
            f"{longer:,} of {len(dataset):,} texts have more than {max_length - 1} tokens: the model learns their "
            "beginnings from the vectors of the whole"
        )
    with resumable("The import", dataset.folder):
        num_pieces = -(-found.num_rows // size)
        writer = ColumnWriter(dataset, name, "float16", (found.width,), made_by, num_pieces)
        missing, in_file = writer.missing(), np.argsort(found.rows, kind="stable")
        start = missing[0] if missing else num_pieces
        batches = open_vectors(vectors).batches(size, start * size) if missing else iter(())
        with progress.bar(found.num_rows, "importing vectors", unit="vectors", start=start * size) as update:
            for piece, batch in enumerate(batches, start):
                first, end = np.searchsorted(found.rows, [piece * size, (piece + 1) * size], sorter=in_file)
                rows = np.sort(in_file[first:end])
                writer.write(piece, batch.vectors[found.rows[rows] - piece * size], rows)
                update(piece * size + len(batch.vectors))
        writer.finish()
    if isinstance(embedder, JaxEmbedder):
        _compare(dataset, open_column(dataset, name), vectors, embedder)
    return found.num_rows - len(np.unique(found.rows))


def _compare(dataset: TokenDataset, column: Column, vectors: str, embedder: JaxEmbedder) -> None:
    """Warns of vectors that another embedder has made."""
    rows = slice(0, COMPARED)
    ids = dataset.padded(rows, 1 + int(np.diff(dataset.offsets[: COMPARED + 1]).max()))
    ours, theirs = embed_texts(embedder, dataset.vocabulary().decode(ids)), column.values[rows].astype(np.float32)
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    if (cosine := float(np.median((ours * theirs).sum(axis=1) / np.maximum(norms, 1e-12)))) < LEAST_COSINE:
        warnings.warn(
            f"The vectors of {vectors} hardly come from {embedder.name} (cosine {cosine:.2f} to its own, in the middle "
            f"of {len(ours)} texts): check the embedder, and that texts and vectors belong together.",
            stacklevel=3,
        )


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
        Whether the columns are finished, as in `embed_column`.
    """
    check_whole("batch_size", batch_size, 1)
    _check_folds(models)
    first, *others = loaded = [load(model, embedder) for model in models]
    victim, length = first.embedder, first.config.max_length
    for other in others:
        if (other.config, _embedder_record(other.embedder)) != (first.config, _embedder_record(victim)):
            raise InputError(f"{models[0]} and {other.name} have other sizes or embedders: give models of one recipe.")
    if not np.array_equal(dataset.vocabulary(first.vocabulary.tokenizer).vocab_map, first.vocabulary.vocab_map):
        raise InputError(
            f"The ids of {dataset.folder} are of another vocabulary than {first.name}'s: give a model that was trained "
            "on this data set."
        )
    column = None if embeddings is None else open_column(dataset, embeddings)
    if column is not None:
        check_column(column, "embeddings", victim, length)
    elif not first.shares_vocabulary:
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
    embed = _embed_ids(victim, first.vocabulary, length, batch_size)
    greedy = functools.partial(greedy_hypotheses, first.config)
    programs = [_on_all_devices(greedy, model.params["inverter"], batch_size) for model in loaded]

    def compute(rows: slice) -> dict[str, np.ndarray]:
        e = embed(dataset.padded(rows, length)) if column is None else column.values[rows].astype(np.float32)
        guesses = np.empty((len(e), length), np.int32)
        folds = fold_of(np.arange(rows.start, rows.stop), len(programs))
        for fold in np.unique(folds):
            guesses[folds == fold] = programs[fold](e[folds == fold])
        return {name: guesses, name + EMBEDDING: embed(guesses)}

    specs = {name: ("int32", length), name + EMBEDDING: ("float16", victim.width)}
    return _fill(dataset, specs, made_by, compute, "guessing texts", share)


def _check_folds(models: Sequence[str]) -> None:
    if not models:
        raise InputError("Give a model, or as many as there are folds.")
    for i, model in enumerate(models):
        data = read_model(model).header.record.get("recipe", {}).get("data", {})
        folds, fold = data.get("folds", 1), data.get("fold", 0)
        if (folds, fold if folds > 1 else i) != (len(models), i):
            trained = f"without fold {fold} of {folds}" if folds > 1 else "on all texts"
            raise InputError(
                f"{model} was trained {trained} and is model {i} of {len(models)} here: give one model that was "
                "trained on all texts, or those of all folds in their order (data.folds, data.fold)."
            )


def check_column(column: Column, kind: str, embedder: TextEmbedder, max_length: int) -> None:
    """Refuses a column that isn't of this kind (embeddings or hypotheses), embedder and length of texts."""
    made_by, whose = column.made_by, f"The column {column.name}"
    if (found := made_by.get("kind")) != kind:
        raise InputError(f"{whose} holds {found}, not {kind}: name another as data.{kind}.")
    check_identity(made_by.get("embedder", {}), embedder.identity, whose)
    if (found := made_by.get("max_length")) != max_length:
        raise InputError(
            f"{whose} was made for texts of {found} tokens, not {max_length}: make it again, or set "
            f"model.max_length={found}."
        )


def _embedder_record(embedder: TextEmbedder) -> dict[str, Any]:
    """All that is known to determine an embedder's vectors; the folder of one with known weights may move."""
    identity = embedder.identity
    return identity.to_dict() | ({"name": Path(identity.name).name} if identity.weights_sha256 else {})


def _embed_ids(embedder: TextEmbedder, vocabulary: Vocabulary, max_length: int, batch_size: int) -> OnRows:
    """Ids [n, L] -> embeddings [n, E]: of the ids where the embedder has their tokenizer, otherwise of their texts."""
    if not (isinstance(embedder, JaxEmbedder) and shares_vocabulary(embedder, vocabulary.tokenizer)):
        return lambda ids: embed_texts(embedder, vocabulary.decode(ids), batch_size)
    check_length(max_length, embedder)
    embed: Callable[..., jax.Array] = functools.partial(embed_model_ids, embedder.config, embedder.token_map())
    return _on_all_devices(
        lambda weights, ids: embed(*weights, ids), (embedder.params, vocabulary.vocab_map), batch_size
    )


def _on_all_devices(program: Callable[[Any, jax.Array], jax.Array], weights: Any, batch_size: int) -> OnRows:
    """`program(weights, rows)` over any number of rows: in batches of one size, cut over this process's devices."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    cut, size = batch_sharding(mesh), -(-batch_size // mesh.size) * mesh.size
    weights, jitted = jax.device_put(weights, replicated(mesh)), jax.jit(program, out_shardings=cut)

    def run(rows: np.ndarray) -> np.ndarray:
        filled = np.pad(rows, [(0, -len(rows) % size), *[(0, 0)] * (rows.ndim - 1)], mode="edge")
        parts = [jitted(weights, jax.device_put(part, cut)) for part in np.split(filled, len(filled) // size)]
        return np.concatenate([np.asarray(part) for part in parts])[: len(rows)]

    return run


def _fill(
    dataset: TokenDataset,
    specs: dict[str, tuple[str, int]],
    made_by: dict[str, Any],
    compute: Callable[[slice], dict[str, np.ndarray]],
    doing: str,
    share: Share,
) -> bool:
    """Writes columns of (dtype, width), those of one text always together; True if no host has anything left to do."""
    with resumable("The work", dataset.folder):
        writers = {name: ColumnWriter(dataset, name, dtype, (n,), made_by) for name, (dtype, n) in specs.items()}
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
    return True
