"""A small lower-casing word-piece tokenizer, set up as awkwardly as published ones are."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", ",", ".", "'", "##s", "##ing", "##ed"]
WORDS = ["the", "cat", "dog", "sleep", "jump", "over", "under", "red", "blue", "house"]


def make_tokenizer():
    vocabulary = {piece: i for i, piece in enumerate([*PIECES, *WORDS])}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    made.add_special_tokens(PIECES[:5])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.enable_truncation(4)
    made.enable_padding(length=12)
    return made


@pytest.fixture
def tokenizer():
    return make_tokenizer()
