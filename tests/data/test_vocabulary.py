"""Model ids and tokenizer ids, there and back."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.decode.state import EOS, PAD
from v2t_jax.errors import InputError

from .conftest import WORDS

TEXT = "The dogs sleep under the blue house, a cat jumped over."


def row(ids, length=20):
    return np.pad(np.append(ids, EOS), (0, length - len(ids) - 1))


def test_full_vocabulary_round_trip(tokenizer):
    full = Vocabulary.full(tokenizer)
    assert full.size == tokenizer.get_vocab_size() and full.vocab_map[:2].tolist() == [0, 3]
    (ids,) = full.encode([TEXT])
    assert ids.dtype == np.int32 and len(ids) == 15 and ids.min() > EOS
    assert full.decode(row(ids)) == ["the dogs sleep under the blue house, a cat jumped over."]
    # The caller's tokenizer keeps its truncation: the vocabulary works on a copy.
    assert len(tokenizer.encode(TEXT).ids) == 12 and tokenizer.truncation["max_length"] == 4


def test_decode_stops_at_end_and_skips_what_is_no_piece(tokenizer):
    full = Vocabulary.full(tokenizer)
    (ids,) = full.encode(["red cat"])
    rows = np.array([[*ids, EOS, *ids], [PAD, ids[0], full.size + 7, ids[1], -1], [EOS, 0, 0, 0, 0]])
    assert full.decode(rows) == ["red cat", "red cat", ""]
    assert full.decode(rows[None]) == full.decode(rows)
    assert full.decode(np.zeros((0, 5), np.int32)) == []


def test_pruned_vocabulary_marks_missing_pieces(tokenizer):
    full = Vocabulary.full(tokenizer)
    counts = np.bincount(np.concatenate(full.encode(["the cat", "the red cat", "the dog"])), minlength=full.size)
    assert full.pruned(counts, 99).size == 2 + 4
    pruned = full.pruned(counts, 3)
    assert [tokenizer.id_to_token(int(i)) for i in pruned.vocab_map] == ["[PAD]", "[SEP]", "the", "cat", "dog"]
    assert [ids.tolist() for ids in pruned.encode(["the cat", "the red dog", ""])] == [[2, 3], [2, -1, 4], []]
    assert pruned.decode(row(pruned.encode(["dog the cat"])[0])) == ["dog the cat"]


def test_special_and_unknown_text_is_marked(tokenizer):
    full = Vocabulary.full(tokenizer)
    for text in ("the [SEP] cat", "[PAD]", "the zebra", "[CLS] the"):
        assert full.encode([text])[0].min() == -1


def test_lengths_leave_room_for_the_end(tokenizer):
    full = Vocabulary.full(tokenizer)
    assert full.normalize([TEXT], max_length=6) == ["the dogs sleep under"]
    assert full.normalize([TEXT, "Cat"], 99) == [
        "the dogs sleep under the blue house, a cat jumped over.",
        "cat",
    ]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from([*WORDS, "dogs", "jumping", ",", ".", "a"]), max_size=10))
def test_normalized_text_is_what_decoding_gives(tokenizer, words):
    full, text = Vocabulary.full(tokenizer), " ".join(words)
    (ids,) = full.encode([text])
    assert full.decode(row(ids[:16])) == full.normalize([text], 17)
    assert full.normalize(full.normalize([text], 17), 17) == full.normalize([text], 17)


def test_t5_ids_are_the_tokenizers():
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -3.0),
        ("▁the", -2.0),
        ("▁cat", -2.0),
        ("s", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    full = Vocabulary.full(tokenizer)
    np.testing.assert_array_equal(full.vocab_map, np.arange(7))
    assert full.encode(["the cats", "the zoo"])[0].tolist() == [4, 5, 6]
    assert full.encode(["the zoo"])[0].min() == -1
    assert full.decode(np.array([[4, 5, 6, 1, 0]])) == ["the cats"]


def test_bad_vocabularies_are_refused(tokenizer):
    for pieces in ([3, 0, 5], [0, 3, 5, 5], [0, 3, 999], [0]):
        with pytest.raises(InputError):
            Vocabulary(tokenizer, pieces)
    with pytest.raises(InputError, match="no padding and end"):
        Vocabulary.full(Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
