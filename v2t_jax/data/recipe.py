"""What a recipe's `data` names: training texts, in memory or a built data set, and texts held out from them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.config import Config
from v2t_jax.data.batches import Batches, Batching
from v2t_jax.data.columns import Column
from v2t_jax.data.dataset import TokenDataset, is_built
from v2t_jax.data.split import read_texts
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.errors import InputError

Opened = tuple[Vocabulary, list[TokenDataset], list[str]]


def open_texts(
    config: Config, tokenizer: Tokenizer | None, num_held_out: int, vocab_map: np.ndarray | None = None
) -> Opened:
    """The vocabulary, the data sets, and the held-out texts, normalized and short enough for the model.

    Args:
        tokenizer: the one that the recipe names; None takes that of a built data set.
        num_held_out: how many held-out texts of a built data set are needed at most.
        vocab_map: the vocabulary of the model that training goes on with; None makes one of texts in memory.
    """
    data, max_length = config.data, config.model.max_length
    if any(is_built(source) for source in data.sources):
        vocabulary, datasets, held_out = _open_built(config, tokenizer, num_held_out)
    elif tokenizer is None or data.embeddings or data.hypotheses or data.folds > 1:
        raise InputError(
            "data.embeddings, data.hypotheses and data.folds need a built data set in data.sources: v2t data build."
        )
    else:
        vocabulary, datasets, held_out = _read_sources(config, tokenizer, vocab_map)
    # A text of unknown tokens alone comes back empty.
    held_out = [text for text in vocabulary.normalize(held_out, max_length) if text.strip()]
    if not held_out:
        raise InputError(
            f"No held-out text of {data.held_out} has fewer than model.max_length={max_length} tokens: use more text "
            "or a larger max_length."
        )
    return vocabulary, datasets, held_out


def make_batches(
    config: Config, datasets: Sequence[TokenDataset], batch_size: int, columns: Sequence[Column] = ()
) -> Batches:
    """The training texts in batches; `columns` are what else to read of each text of a built data set."""
    data, max_length = config.data, config.model.max_length
    batching = Batching(batch_size, max_length, data.bucket_lengths or (max_length,), data.span_share, config.seed)
    return Batches(datasets, batching, data.weights, columns, data.folds, data.fold)


def texts_sha256(datasets: Sequence[TokenDataset]) -> str:
    """A hash of all training texts."""
    if datasets[0].manifest:
        return datasets[0].manifest_sha256
    return hashlib.sha256(b"".join(dataset.tokens.tobytes() for dataset in datasets)).hexdigest()


def _read_sources(config: Config, tokenizer: Tokenizer, vocab_map: np.ndarray | None) -> Opened:
    with progress.stage("reading the text"):
        held_out = read_texts(config.data.held_out, "held_out")
        texts = [read_texts(source, "train", avoid=held_out) for source in config.data.sources]
    with progress.stage("tokenizing the text"):
        vocabulary = Vocabulary.full(tokenizer) if vocab_map is None else Vocabulary(tokenizer, vocab_map)
        if vocab_map is None and config.data.vocabulary_size:
            ids = np.concatenate([row for part in texts for row in vocabulary.encode(part)])
            counts = np.bincount(ids[ids >= 0], minlength=vocabulary.size)
            vocabulary = vocabulary.pruned(counts, config.data.vocabulary_size)
        datasets = [TokenDataset.from_texts(part, vocabulary) for part in texts]
        fits = [len(row) < config.model.max_length for row in vocabulary.encode(held_out)]
        return vocabulary, datasets, [text for text, ok in zip(held_out, fits, strict=True) if ok]


def _open_built(config: Config, tokenizer: Tokenizer | None, num_held_out: int) -> Opened:
    """Its held-out texts, often passages, are cut to their beginnings, as in the original."""
    folder, data = config.data.sources[0], config.data
    if data.sources != (data.held_out,):
        built = next(source for source in data.sources if is_built(source))
        raise InputError(
            f"{built} is a built data set, which is a recipe's only source and holds out its own texts: give the same "
            "folder as data.sources and as data.held_out."
        )
    if data.vocabulary_size or data.weights:
        field = "vocabulary_size" if data.vocabulary_size else "weights"
        raise InputError(f"data.{field} is for texts in memory; {folder} has what it was built with: leave it out.")
    dataset = TokenDataset.open(Path(folder).expanduser())
    return dataset.vocabulary(tokenizer), [dataset], dataset.held_out(num_held_out)
