"""Texts to model token ids and back.

A model's ids aren't the tokenizer's: padding and end-of-sequence come first, and a vocabulary may hold only the tokens
that the training text uses (a 30k-token output layer is most of a small model's work).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from v2t_jax.decode.state import EOS, PAD
from v2t_jax.errors import InputError

_PAD_AND_END = (("[PAD]", "[SEP]"), ("<pad>", "</s>"))


def read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InputError(f"{path} is missing: save it with a fast tokenizer (transformers' save_pretrained).")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} is damaged ({error}); download it again.") from error


class Vocabulary:
    """A tokenizer and the model's own numbering of (some of) its tokens.

    Attributes:
        tokenizer: a private copy, with truncation and padding off.
        vocab_map: int32 [V], model id -> tokenizer id; first the tokenizer's own padding and end-of-sequence.
        size: V.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_map: np.ndarray | Sequence[int]):
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_map = np.asarray(vocab_map, np.int32)
        self.size = len(self.vocab_map)
        ends = _pad_and_end(tokenizer)
        total = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        if self.vocab_map.ndim != 1 or tuple(self.vocab_map[:2]) != ends:
            raise InputError(f"A vocabulary must begin with the tokenizer's pad and end pieces {ends}.")
        if self.vocab_map.min() < 0 or self.vocab_map.max() >= total or len(np.unique(self.vocab_map)) != self.size:
            raise InputError(f"A vocabulary's pieces must be distinct and below {total}, the tokenizer's size.")
        self._model_id = np.full(total, -1, np.int32)
        self._model_id[self.vocab_map] = np.arange(self.size, dtype=np.int32)
        # Special tokens and "unknown" inside a text can't be turned back into that text.
        special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
        unknown = [i for i in map(tokenizer.token_to_id, ("[UNK]", "<unk>")) if i is not None]
        self._no_text = {*special, *unknown, *ends}
        self._model_id[[*self._no_text]] = -1

    @property
    def writable(self) -> np.ndarray:
        """bool [V]: the ids that stand for a piece of text, not for an end, a special or an unknown token."""
        return self._model_id[self.vocab_map] >= 0

    @classmethod
    def full(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Every token. T5 keeps its tokenizer's ids; others are renumbered: pad, end, the rest."""
        ends = _pad_and_end(tokenizer)
        every = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()))
        return cls(tokenizer, [*ends, *(i for i in every if i not in ends)])

    def pruned(self, counts: np.ndarray, limit: int) -> Vocabulary:
        """Only pad, end and the most common tokens, at most `limit`, by how often `encode` gave each id: [V]."""
        order = np.argsort(-counts, kind="stable")[: min(limit, int((counts > 0).sum()))]
        return Vocabulary(self.tokenizer, self.vocab_map[[PAD, EOS, *order]])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Model ids of each text, int32, without end-of-sequence; -1 as in `model_ids`."""
        return [self.model_ids(np.array(ids, np.int64)) for ids in self._tokenizer_ids(texts)]

    def model_ids(self, token_ids: np.ndarray) -> np.ndarray:
        """Model ids of tokenizer ids, int32; -1 for a token that the vocabulary lacks, or an unknown or special one."""
        return self._model_id[token_ids]

    def decode(self, ids: np.ndarray) -> list[str]:
        """Texts of model ids [..., L], flattened in order, up to end-of-sequence; without padding and unknown ids."""
        rows = np.asarray(ids).reshape(-1, np.shape(ids)[-1])
        keep = (np.cumsum(rows == EOS, -1) == 0) & (rows != PAD) & (rows >= 0) & (rows < self.size)
        token_ids = self.vocab_map[np.where(keep, rows, PAD)]
        return self.tokenizer.decode_batch([row[kept].tolist() for row, kept in zip(token_ids, keep, strict=True)])

    def normalize(self, texts: Sequence[str], max_length: int) -> list[str]:
        """The form in which texts are compared for an "exact match": text -> first `max_length - 1` tokens -> text."""
        return self.tokenizer.decode_batch([ids[: max_length - 1] for ids in self._tokenizer_ids(texts)])

    def left_out(self, text: str, max_length: int) -> str:
        """What `normalize` leaves out of the tokens that it takes: unknown words or characters, and special tokens."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        pairs = list(zip(encoding.ids, encoding.offsets, strict=True))[: max_length - 1]
        return " ".join(text[slice(*place)] for i, place in pairs if i in self._no_text)

    def _tokenizer_ids(self, texts: Sequence[str]) -> list[list[int]]:
        # The "fast" form leaves out character offsets, which nothing here needs.
        return [item.ids for item in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _pad_and_end(tokenizer: Tokenizer) -> tuple[int, int]:
    for pad, end in _PAD_AND_END:
        pad_id, end_id = tokenizer.token_to_id(pad), tokenizer.token_to_id(end)
        if pad_id is not None and end_id is not None:
            return pad_id, end_id
    raise InputError(f"The tokenizer has no padding and end pieces: one of the pairs {_PAD_AND_END} must exist.")
