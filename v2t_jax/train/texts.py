"""What a recipe's `data` names: training texts, in memory or a built data set, and texts held out from them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from v2t_jax import progress
from v2t_jax.config import Config
from v2t_jax.data.batches import Batches, Batching, TokenStore, tokenize
from v2t_jax.data.blocks import Column, StoredTexts, is_stored
from v2t_jax.data.dataset import StoredBatches
from v2t_jax.data.sources import read_texts
from v2t_jax.data.vocabulary import Vocabulary, frequent_pieces
from v2t_jax.errors import InputError

Stores = list[TokenStore] | StoredTexts  # texts in memory, or a built data set


def open_texts(config: Config, tokenizer: Tokenizer | None, num_held_out: int) -> tuple[Vocabulary, Stores, list[str]]:
    """The vocabulary, the training texts and the held-out texts, normalized and short enough for the model.

    Args:
        tokenizer: the embedder's; None takes that of a built data set.
        num_held_out: so many held-out texts will do.

    Raises:
        InputError: a source can't be read, or fields of `config.data` contradict each other.
    """
    data = config.data
    if any(is_stored(source) for source in data.sources):
        vocabulary, stores, held_out = _open_stored(config, tokenizer, num_held_out)
    elif tokenizer is None or data.embeddings or data.hypotheses or data.folds > 1:
        raise InputError(
            "data.embeddings, data.hypotheses and data.folds need a built data set in data.sources: v2t data build."
        )
    else:
        vocabulary, stores, held_out = _read_sources(config, tokenizer)
    # A text of unknown pieces alone comes back empty.
    held_out = [text for text in vocabulary.normalize(held_out, config.model.max_length) if text.strip()]
    if not held_out:
        raise InputError(
            f"No held-out text of {data.held_out} has fewer than model.max_length={config.model.max_length} "
            "pieces: use more text or a larger max_length."
        )
    return vocabulary, stores, held_out


def make_batches(
    config: Config, stores: Stores, batch_size: int, columns: Sequence[Column] = ()
) -> Batches | StoredBatches:
    """The training texts in batches.

    Args:
        columns: what else to read of each text of a built data set.

    Raises:
        InputError: too few texts, or settings that contradict each other.
    """
    data, max_length = config.data, config.model.max_length
    buckets = data.bucket_lengths or (max_length,)
    batching = Batching(batch_size, max_length, buckets, data.span_share, config.seed)
    if isinstance(stores, StoredTexts):
        return StoredBatches(stores, batching, columns, data.folds, data.fold)
    return Batches(stores, batching, data.weights or None)


def tokens_sha256(stores: Stores) -> str:
    """A hash of all training texts."""
    if isinstance(stores, StoredTexts):
        return stores.sha256
    tokens = hashlib.sha256()
    for store in stores:
        tokens.update(store.tokens.tobytes())
    return tokens.hexdigest()


def _read_sources(config: Config, tokenizer: Tokenizer) -> tuple[Vocabulary, Stores, list[str]]:
    with progress.stage("reading the text"):
        held_out = read_texts(config.data.held_out, "held_out")
        texts = [read_texts(source, "train", avoid=held_out) for source in config.data.sources]
    with progress.stage("tokenizing the text"):
        vocabulary = Vocabulary.full(tokenizer)
        if config.data.vocabulary_size:
            ids = (vocabulary.vocab_map[row[row >= 0]] for part in texts for row in vocabulary.encode(part))
            vocabulary = Vocabulary.of_pieces(tokenizer, frequent_pieces(ids, tokenizer, config.data.vocabulary_size))
        stores = [tokenize(part, vocabulary) for part in texts]
        fits = [len(row) < config.model.max_length for row in vocabulary.encode(held_out)]
        return vocabulary, stores, [text for text, ok in zip(held_out, fits, strict=True) if ok]


def _open_stored(
    config: Config, tokenizer: Tokenizer | None, num_held_out: int
) -> tuple[Vocabulary, Stores, list[str]]:
    """Its held-out texts are often passages: as in the original, the beginnings are used of those that are too long."""
    folder, data = config.data.sources[0], config.data
    if data.sources != (data.held_out,):
        built = next(source for source in data.sources if is_stored(source))
        raise InputError(
            f"{built} is a built data set, which is a recipe's only source and holds out its own texts: give the same "
            "folder as data.sources and as data.held_out."
        )
    if data.vocabulary_size or data.weights:
        field = "vocabulary_size" if data.vocabulary_size else "weights"
        raise InputError(f"data.{field} is for texts in memory; {folder} has what it was built with: leave it out.")
    stored = StoredTexts(Path(folder).expanduser())
    return stored.vocabulary(tokenizer), stored, stored.held_out(num_held_out)
