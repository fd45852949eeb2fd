"""Reading an embedder's folder: what it asks for is done, or refused in a sentence."""

import io
import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import processors

from tests.helpers.equivalence import encode
from tests.helpers.plain_folder import plain
from tests.helpers.tiny_run import PIECES, make_embedder, make_static_embedder, make_texts, make_tokenizer
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.base import check_identity
from v2t_jax.embedders.load import KNOWN, load_embedder, load_tokenizer, locate
from v2t_jax.errors import InputError
from v2t_jax.inversion.pipeline import check_length
from v2t_jax.models.embedder import TokenMap, embed_model_ids, token_gradient

TYPE = "sentence_transformers.models."


@pytest.fixture
def folder(tmp_path):
    return make_embedder(tmp_path / "embedder")


def change(file, **values):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def add_dense(folder, activation="torch.nn.modules.linear.Identity"):
    """A dense layer that doubles the first 8 of 16 dimensions, without normalization behind it."""
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": 2 * np.eye(8, 16, dtype=np.float32)}, folder / "2_Dense" / "model.safetensors")
    sizes = {"in_features": 16, "out_features": 8}
    change(folder / "2_Dense" / "config.json", activation_function=activation, bias=False, **sizes)
    modules = json.loads((folder / "modules.json").read_text())[:2]
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": f"{TYPE}Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder / "2_Dense" / "model.safetensors"


def test_a_default_prompt_stands_before_every_text(folder):
    plain = load_embedder(str(folder))
    prompts = {"query": "the cat sees ", "passage": "a dog"}
    change(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name="query")
    prompted = load_embedder(str(folder))
    np.testing.assert_allclose(prompted.embed(["a bird"]), plain.embed(["the cat sees a bird"]), atol=1e-6)
    assert prompted.token_map().before[1:] == tuple(prompted.tokenizer.encode("the cat sees").ids[1:-1])
    assert load_embedder(f"mean@{folder}").config.prefix == "", "an encoder alone has no prompts"


def test_the_prompt_for_documents_stands_before_every_text_where_none_is_the_default(folder):
    file = folder / "config_sentence_transformers.json"
    for prompts, expected in (
        ({"query": "the cat ", "document": "a dog ", "passage": "a bird "}, "a dog "),
        ({"corpus": "one ", "passage": "a bird "}, "a bird "),
        ({"query": "the cat ", "document": None}, ""),
        ({"query": "the cat "}, ""),
        ({}, ""),
    ):
        change(file, prompts=prompts, default_prompt_name=None)
        assert load_embedder(str(folder)).config.prefix == expected, prompts


def test_a_prompt_by_its_name(folder):
    change(folder / "config_sentence_transformers.json", prompts={"query": "the cat ", "document": "a dog ", "sts": ""})
    for name, expected in (("query", "the cat "), ("document", "a dog "), ("sts", ""), (None, "a dog ")):
        assert load_embedder(str(folder), prompt=name).config.prefix == expected
    assert load_embedder(str(folder), prefix="").config.prefix == ""
    with pytest.raises(
        InputError, match="has no prompt 'qeury'; it has query, document, sts, and any text can be given"
    ):
        load_embedder(str(folder), prompt="qeury")
    with pytest.raises(InputError, match="has no prompt 'query'; it has none"):
        load_embedder(f"mean@{folder}", prompt="query")
    with pytest.raises(InputError, match="Both a prompt's name and a prefix were given"):
        load_embedder(str(folder), prompt="query", prefix="a ")
    e5 = f"e5-base-v2@{folder}"
    prefixes = [load_embedder(e5, prompt=prompt).config.prefix for prompt in ("query", "document", "sts")]
    assert prefixes == ["query: ", "passage: ", ""], "the table's come first"


def without_normalization(folder):
    modules = json.loads((folder / "modules.json").read_text())[:2]
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_dense_layer(folder):
    without_normalization(folder)
    pooled = load_embedder(str(folder)).embed(["a bird sees the cat"])
    add_dense(folder)
    dense = load_embedder(str(folder))
    assert dense.width == 8
    np.testing.assert_allclose(dense.embed(["a bird sees the cat"]), 2 * pooled[:, :8], atol=1e-5)
    change(folder / "2_Dense" / "config.json", activation_function="torch.nn.modules.activation.Tanh")
    tanh = load_embedder(str(folder)).embed(["a bird sees the cat"])
    np.testing.assert_allclose(tanh, np.tanh(2 * pooled[:, :8]), atol=1e-5)
    change(folder / "2_Dense" / "config.json", activation_function="torch.nn.modules.activation.SiLU")
    silu = load_embedder(str(folder)).embed(["a bird sees the cat"])
    np.testing.assert_allclose(silu, 2 * pooled[:, :8] / (1 + np.exp(-2 * pooled[:, :8])), atol=1e-5)


def add_module(folder, kind, tensors=None, **settings):
    modules = json.loads((folder / "modules.json").read_text())
    path = folder / f"{len(modules)}_{kind}"
    modules.append({"idx": len(modules), "name": "", "path": path.name, "type": f"{TYPE}{kind}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    path.mkdir(exist_ok=True)
    change(path / "config.json", **settings)
    if tensors:
        save_file(tensors, path / "model.safetensors")


def test_modules_behind_the_pooling_in_their_order(folder):
    without_normalization(folder)
    text = ["a bird sees the cat"]
    x = load_embedder(str(folder)).embed(text)
    add_module(folder, "Normalize")
    add_module(folder, "Dropout", dropout=0.5)
    scale, bias = np.linspace(1, 2, 16, dtype=np.float32), np.linspace(-1, 0, 16, dtype=np.float32)
    add_module(folder, "LayerNorm", {"norm.weight": scale, "norm.bias": bias}, dimension=16)
    embedder = load_embedder(str(folder))
    x /= np.linalg.norm(x)
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale + bias
    np.testing.assert_allclose(embedder.embed(text), x, atol=1e-5)
    assert (embedder.normalized, embedder.identity.dense) == (False, ("normalize", "layer_norm"))
    before = embedder.weights_sha256
    add_module(folder, "Normalize")
    embedder = load_embedder(str(folder))
    np.testing.assert_allclose(embedder.embed(text), x / np.linalg.norm(x), atol=1e-6)
    assert embedder.normalized and embedder.identity.to_dict()["dense"] == ["normalize", "layer_norm"]
    save_file({"norm.weight": 2 * scale, "norm.bias": bias}, folder / "4_LayerNorm" / "model.safetensors")
    assert load_embedder(str(folder)).weights_sha256 != before, "they are weights of the embedder too"
    save_file({"norm.weight": scale[:9], "norm.bias": bias[:9]}, folder / "4_LayerNorm" / "model.safetensors")
    with pytest.raises(InputError, match="layer 2 behind the pooling, 'layer_norm', takes vectors of 9, but it is giv"):
        load_embedder(str(folder))


def test_several_poolings_are_concatenated(folder):
    without_normalization(folder)
    texts, file = ["a bird", "the old river sees one cat"], folder / "1_Pooling" / "config.json"
    embedder = load_embedder(str(folder))
    ids, mask = embedder.tokenize(texts)
    hidden = np.asarray(encode(embedder.config.encoder, embedder.params["encoder"], ids, mask))
    kept = [row[: int(length)] for row, length in zip(hidden, mask.sum(axis=1), strict=True)]
    mean = np.stack([row.mean(axis=0) for row in kept])
    by_place = np.stack([np.average(row, axis=0, weights=np.arange(1, 1 + len(row))) for row in kept])
    by_sqrt = np.stack([row.sum(axis=0) / len(row) ** 0.5 for row in kept])
    change(file, pooling_mode=["weightedmean", "mean"])
    embedder = load_embedder(str(folder))
    np.testing.assert_allclose(embedder.embed(texts), np.concatenate([by_place, mean], axis=1), atol=1e-5)
    assert embedder.width == 32 and embedder.identity.to_dict()["pooling"] == ["weightedmean", "mean"]
    check_identity(json.loads(json.dumps(embedder.identity.to_dict())), embedder.identity, "The model")
    file.unlink()  # older files name each; their order is always the same
    change(file, pooling_mode_mean_sqrt_len_tokens=True, pooling_mode_max_tokens=True, pooling_mode_lasttoken=False)
    expected = np.concatenate([np.stack([row.max(axis=0) for row in kept]), by_sqrt], axis=1)
    np.testing.assert_allclose(load_embedder(str(folder)).embed(texts), expected, atol=1e-5)
    np.testing.assert_allclose(load_embedder(f"weightedmean@{folder}").embed(texts), by_place, atol=1e-5)


def test_static_embeddings(tmp_path):
    table = make_static_embedder(tmp_path / "static", "Normalize")
    embedder = load_embedder(str(tmp_path / "static"))
    texts = ["a dog", " ".join(make_texts(60)), "zebra"]
    rows = [[PIECES.index(piece) for piece in text.split() if piece in PIECES] for text in texts[:2]]
    x = np.stack([table[row].mean(axis=0) for row in (*rows, [1])])  # without [CLS] and [SEP]; zebra is unknown
    np.testing.assert_allclose(embedder.embed(texts), x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-6)
    assert (embedder.width, embedder.normalized, embedder.config.state_width) == (16, True, 16)
    assert load_tokenizer(str(tmp_path / "static")).encode("a dog").tokens == ["a", "dog"]
    vocabulary = Vocabulary.full(embedder.tokenizer)
    ids = np.zeros((3, 6), np.int32)
    for row, pieces in zip(ids, vocabulary.encode(["a dog", "the cat sees a big dog", ""]), strict=True):
        row[: len(pieces)], row[len(pieces) : len(pieces) + 1] = pieces, 1
    assert embedder.token_map() == TokenMap((), None)
    vocab_map = jnp.asarray(vocabulary.vocab_map)
    made = embed_model_ids(embedder.config, embedder.token_map(), embedder.params, vocab_map, jnp.asarray(ids))
    np.testing.assert_allclose(made[:2], embedder.embed(["a dog", "the cat sees a big dog"]), atol=1e-6)
    np.testing.assert_array_equal(made[2], np.zeros(16), err_msg="no tokens, no direction")


def test_what_a_token_of_a_static_embedding_changes(tmp_path):
    """The mean of token vectors is linear in each: to first order is exactly."""
    table = make_static_embedder(tmp_path / "static")
    embedder = load_embedder(str(tmp_path / "static"))
    vocabulary, target = Vocabulary.full(embedder.tokenizer), table[7]
    (pieces,) = vocabulary.encode(["the cat sees a dog"])
    ids = np.pad(pieces, (0, 3))[None]
    made_of = embedder.config, embedder.token_map(), embedder.params, jnp.asarray(vocabulary.vocab_map)
    gain, states = token_gradient(*made_of, jnp.asarray(ids), lambda e: jnp.sum(e * target[None], axis=1))
    np.testing.assert_array_equal(states[0, :5], table[vocabulary.vocab_map[pieces]])
    for place, piece in ((0, 30), (4, 12)):
        changed = ids.copy()
        changed[0, place] = piece
        before, after = (np.asarray(embed_model_ids(*made_of, jnp.asarray(x))) for x in (ids, changed))
        np.testing.assert_allclose(gain[0, place, piece], (after - before) @ target, rtol=1e-4)


def test_a_static_table_that_cannot_be_read(tmp_path):
    make_static_embedder(tmp_path / "static", "Pooling")
    with pytest.raises(
        InputError, match="holds StaticEmbedding, Pooling; supported are Transformer and Pooling, or St"
    ):
        load_embedder(str(tmp_path / "static"))
    file = tmp_path / "static" / "0_StaticEmbedding" / "model.safetensors"
    state = load_file(file)
    save_file({**state, "mapping": np.zeros(9, np.int64)}, file)  # model2vec's, which sentence-transformers ignores
    with pytest.raises(InputError, match="static weights hold the unknown key 'mapping'"):
        load_embedder(f"mean@{tmp_path / 'static'}")
    save_file({"table": state["embedding.weight"]}, file)
    with pytest.raises(InputError, match="static weights lack 'embedding.weight'"):
        load_embedder(f"mean@{tmp_path / 'static'}")


def test_dimensions_that_the_folder_itself_truncates(folder):
    """sentence-transformers cuts behind its modules, so that what is left isn't normalized again."""
    texts = ["a bird", "the old river sees one cat"]
    whole = load_embedder(str(folder)).embed(texts)
    change(folder / "config_sentence_transformers.json", truncate_dim=6)
    part = load_embedder(str(folder))
    np.testing.assert_allclose(part.embed(texts), whole[:, :6], atol=1e-6)
    assert (part.width, part.normalized, part.identity.dense) == (6, False, ("normalize",))
    change(folder / "config_sentence_transformers.json", truncate_dim=99)
    assert load_embedder(str(folder)).identity.dense == ()


def as_sentence_transformers_6(folder, **settings):
    """What version 6 writes: classes that moved, a mode by its name, the tokenizer's length, settings of Normalize."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        part = "sentence_transformer" if kind == "Pooling" else "base"
        module["type"] = f"sentence_transformers.{part}.modules.{kind.lower()}.{kind}"
    (folder / "modules.json").write_text(json.dumps(modules))
    pooling = {"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "2_Normalize").mkdir()
    names = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    change(folder / "2_Normalize" / "config.json", **names)
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    settings = {"transformer_task": "feature-extraction", "modality_config": {"text": text}, **settings}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    change(folder / "tokenizer_config.json", model_max_length=24)


def test_the_format_of_sentence_transformers_6(folder):
    old = load_embedder(str(folder))
    as_sentence_transformers_6(folder)
    new = load_embedder(str(folder))
    assert (old.config.max_length, new.config.max_length) == (32, 24)
    np.testing.assert_array_equal(new.embed(["a bird sees the cat"]), old.embed(["a bird sees the cat"]))
    change(folder / "sentence_bert_config.json", query_length=8, document_length=12)
    assert load_embedder(str(folder)).config.max_length == 12
    change(folder / "tokenizer_config.json", model_max_length=10**30)
    (folder / "sentence_bert_config.json").unlink()
    assert load_embedder(str(folder)).config.max_length == 32, "the network's positions"


def test_weights_in_several_files(folder):
    whole = load_embedder(str(folder))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, keys in files.items():
        save_file({key: state[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    change(folder / "model.safetensors.index.json", **index)
    parts = load_embedder(str(folder))
    np.testing.assert_array_equal(parts.embed(["a dog"]), whole.embed(["a dog"]))
    assert len(parts.weights_sha256) == 64 and parts.weights_sha256 != whole.weights_sha256
    (folder / "b.safetensors").unlink()
    with pytest.raises(InputError, match="lacks b.safetensors, which its index names"):
        load_embedder(str(folder))
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        load_embedder(str(folder))


def test_pooling_of_a_folder_without_modules(tmp_path):
    bert = plain(tmp_path / "bert")
    assert load_embedder(str(bert)).config.pooling == "pooler"
    assert load_embedder(f"cls@{bert}").config.pooling == "cls"
    state = load_file(bert / "model.safetensors")
    save_file({key: value for key, value in state.items() if "pooler" not in key}, bert / "model.safetensors")
    assert load_embedder(str(bert)).config.pooling == "mean"
    with pytest.raises(InputError, match="has no pooler"):
        load_embedder(f"pooler@{bert}")
    for name, pooling in (("dpr_context", "cls"), ("clip", "last"), ("t5_encoder", "mean"), ("modernbert", "mean")):
        config = load_embedder(str(plain(tmp_path / name, name))).config
        assert (config.pooling, config.normalize) == (pooling, False), name
    llama = plain(tmp_path / "llama", "llama")
    with pytest.raises(InputError, match="causal model without modules.json.* give last@"):
        load_embedder(str(llama))
    assert load_embedder(f"last@{llama}").config.pooling == "last"


def test_a_known_embedder_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("v2t_jax.progress.note", said.append)
    bert = plain(tmp_path / "bert")
    e5 = load_embedder(f"e5-base-v2@{bert}")
    assert "gives vectors of 16, but intfloat/e5-base-v2 of 768" in said[0]
    assert (e5.config.prefix, e5.config.pooling, e5.config.normalize) == ("passage: ", "mean", True)
    assert e5.name == f"e5-base-v2@{bert}"
    assert load_embedder(f"e5-base-v2@{bert}", prefix="query: ").config.prefix == "query: "
    with pytest.raises(InputError, match="is not the published sentence-transformers/all-MiniLM-L6-v2"):
        load_embedder(f"all-MiniLM-L6-v2@{bert}")


@pytest.mark.parametrize("name", ["roberta", "mpnet", "modernbert", "mistral"])
def test_a_models_pieces_are_embedded_as_their_text_is(tmp_path, name):
    """The way inside the compiled loop: padding of another length and id must change nothing."""
    embedder = load_embedder(f"mean@{plain(tmp_path / name, name)}")
    vocabulary, texts = Vocabulary.full(embedder.tokenizer), ["a dog", "the old river sees one cat"]
    ids = np.zeros((2, 9), np.int32)
    for row, pieces in zip(ids, vocabulary.encode(texts), strict=True):
        row[: len(pieces)], row[len(pieces)] = pieces, 1
    made = embed_model_ids(
        embedder.config, embedder.token_map(), embedder.params, jnp.asarray(vocabulary.vocab_map), jnp.asarray(ids)
    )
    np.testing.assert_allclose(made, embedder.embed(texts), atol=2e-5)


def test_texts_at_the_very_limit_of_the_embedder(folder):
    """A model of the most tokens that the embedder has room for, [CLS] counted: its ids are cut so that [SEP] fits."""
    embedder = load_embedder(str(folder))
    check_length(31, embedder)
    with pytest.raises(InputError, match="model.max_length is 32, but .* reads texts of 31 at most"):
        check_length(32, embedder)
    vocabulary, texts = Vocabulary.full(embedder.tokenizer), [" ".join(["a dog sees"] * n) for n in (20, 10)]
    ids = np.zeros((3, 31), np.int32)
    rows = [pieces[:31] for pieces in vocabulary.encode(texts)]
    for row, pieces in zip(ids, [*rows, [*rows[1], 1]], strict=True):  # the last with its end token
        row[: len(pieces)] = pieces
    made = embed_model_ids(
        embedder.config, embedder.token_map(), embedder.params, jnp.asarray(vocabulary.vocab_map), jnp.asarray(ids)
    )
    np.testing.assert_allclose(made, embedder.embed([*texts, texts[1]]), atol=2e-5)


def test_a_vocabulary_without_tokenizer_json(folder):
    expected = load_embedder(str(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    texts = ["A cat", "the boats near one house"]
    np.testing.assert_array_equal(load_embedder(str(folder)).embed(texts), expected.embed(texts))
    assert load_tokenizer(str(folder)).encode("A cats").tokens == ["[CLS]", "a", "cat", "##s", "[SEP]"]


@pytest.mark.parametrize(
    ("name", "file", "options", "before", "shift"),
    [
        ("t5_encoder", "spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, [], 0),
        ("xlm_roberta", "sentencepiece.bpe.model", {}, [0], 1),  # fairseq's numbering
    ],
)
def test_a_sentencepiece_model_without_tokenizer_json(tmp_path, name, file, options, before, shift):
    folder, content = plain(tmp_path / name, name), io.BytesIO()
    (folder / "tokenizer.json").unlink()
    options = {"model_writer": content, "vocab_size": 60, "hard_vocab_limit": False, "minloglevel": 2, **options}
    SentencePieceTrainer.train(sentence_iterator=iter(make_texts(300)), **options)
    (folder / file).write_bytes(content.getvalue())
    owner = SentencePieceProcessor(model_proto=content.getvalue())
    embedder = load_embedder(f"mean@{folder}")
    for text in ("the red cat sees a dog", "two  boats"):
        end = [2] if before else [1]
        expected = [*before, *(piece + shift for piece in owner.encode(text)), *end]
        assert embedder.tokenizer.encode(text).ids == expected
    assert np.isfinite(embedder.embed(["the red cat"])).all()
    (folder / file).write_bytes(b"no model")
    with pytest.raises(InputError, match="The tokenizer in .* can't be converted: .*; save a tokenizer.json there"):
        load_embedder(f"mean@{folder}")


def test_the_first_dimensions(folder):
    texts = ["a bird", "the old river sees one cat"]
    whole, part = load_embedder(str(folder)).embed(texts), load_embedder(str(folder), dimensions=6)
    expected = whole[:, :6] / np.linalg.norm(whole[:, :6], axis=1, keepdims=True)
    np.testing.assert_allclose(part.embed(texts), expected, atol=1e-6)
    assert (part.name, part.width) == (f"{folder}:6", 6)
    np.testing.assert_array_equal(load_embedder(part.name).embed(texts), part.embed(texts))
    for dimensions in (17, 0):
        with pytest.raises(InputError, match="has 16 dimensions"):
            load_embedder(f"{folder}:{dimensions}")
    with pytest.raises(InputError, match="dimensions is -1; give at least 1"):
        load_embedder(str(folder), dimensions=-1)
    with pytest.raises(InputError, match="There is no embedder '.*:6:6'"):
        load_embedder(part.name, dimensions=6)


def test_matrices_are_kept_in_the_arithmetics_dtype(folder):
    exact, rounded = load_embedder(str(folder)), load_embedder(str(folder), "bfloat16")
    layers = rounded.params["encoder"]["layers"]
    layer = layers[0] if isinstance(layers, list) else layers
    assert (layer["query"]["kernel"].dtype, layer["query"]["bias"].dtype) == ("bfloat16", "float32")
    np.testing.assert_allclose(rounded.embed(["a dog"]), exact.embed(["a dog"]), atol=0.05)
    with pytest.raises(InputError, match="dtype is 'float99'; choose float32 or bfloat16"):
        load_embedder(str(folder), "float99")


def test_the_end_token_that_only_the_settings_ask_for(tmp_path):
    """Llama's tokenizers have it in tokenizer_config.json, and tokenizer.json may not know."""
    llama = plain(tmp_path / "llama", "llama")
    bare = make_tokenizer()
    bare.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    bare.save(str(llama / "tokenizer.json"))
    assert load_embedder(f"last@{llama}").token_map() == TokenMap((2,), None)
    ends = {"bos_token": "[CLS]", "eos_token": {"content": "[SEP]"}, "add_bos_token": True, "add_eos_token": True}
    change(llama / "tokenizer_config.json", **ends)
    embedder = load_embedder(f"last@{llama}")
    assert embedder.tokenize(["a"])[0][0, :4].tolist() == [2, 4, 3, 0]
    assert embedder.token_map() == TokenMap((2,), 3)
    bare.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP] [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    bare.save(str(llama / "tokenizer.json"))
    change(llama / "tokenizer_config.json", add_eos_token=False)
    with pytest.raises(InputError, match="ends a text with several tokens of its own"):
        load_embedder(f"last@{llama}").token_map()
    for missing in (None, "</s>"):
        change(llama / "tokenizer_config.json", eos_token=missing, add_eos_token=True)
        with pytest.raises(InputError, match=f"asks for the end token {missing!r}, which the tokenizer lacks"):
            load_embedder(f"last@{llama}")


def test_lower_case_is_made_where_it_is_asked_for(folder):
    tokenizer = make_tokenizer()
    tokenizer.normalizer = None
    tokenizer.save(str(folder / "tokenizer.json"))
    kept = load_embedder(str(folder)).embed(["A CAT", "a cat"])
    assert np.abs(kept[0] - kept[1]).max() > 1e-3
    change(folder / "sentence_bert_config.json", do_lower_case=True)
    np.testing.assert_array_equal(load_embedder(str(folder)).embed(["A CAT"]), kept[1:])


def no_pooling(folder):
    change(folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False)


def two_poolings(folder):
    change(folder / "1_Pooling" / "config.json", pooling_mode=["mean", "splade"])


def another_order(folder):
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[::-1]))


def narrow_dense(file):
    save_file({"linear.weight": np.eye(8, 15, dtype=np.float32)}, file)


def change_dense(**settings):
    def damage(folder):
        add_dense(folder)
        change(folder / "2_Dense" / "config.json", **settings)

    return damage


def change_weights(change):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return damage


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def prompt_left_out(folder):
    change(folder / "config_sentence_transformers.json", prompts={"q": "a dog "}, default_prompt_name="q")
    change(folder / "1_Pooling" / "config.json", include_prompt=False)


def config(**values):
    return lambda folder: change(folder / "config.json", **values)


QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: add_dense(folder, "torch.nn.modules.activation.PReLU"), "the activation 'prelu'; sup"),
        (lambda folder: add_dense(folder, "mine.Tanh"), "the activation 'mine.Tanh'; supported are identity, tanh, "),
        (
            lambda folder: narrow_dense(add_dense(folder)),
            "layer 1 behind the pooling, 'identity', takes vectors of 15, but it is given 16",
        ),
        (change_dense(use_residual=True), "use_residual"),
        (change_dense(module_input_name="token_embeddings"), "module_input_name 'token_embeddings'"),
        (config(hidden_act="relu"), "hidden_act = 'relu'; only 'gelu' is supported"),
        (config(position_embedding_type="relative_key"), "'relative_key'"),
        (config(model_type="gpt2"), "model_type 'gpt2'; supported are bert, "),
        (config(hidden_size=None), "'hidden_size' expected int, got NoneType"),
        (config(hidden_size="16"), "'hidden_size' expected int, got str"),
        (config(num_attention_heads=3), "3 heads"),
        (config(layer_norm_eps=-1.0), "layer_norm_eps = -1.0; it must be a positive number"),
        (config(hidden_size=18), "bert weight '.*' has shape .*; its config implies"),
        (config(num_hidden_layers=2), "bert weights lack 'encoder.layer.1."),
        (change_weights(lambda state: state.pop(QUERY)), f"bert weights lack '{QUERY}'"),
        (
            change_weights(lambda state: state.update(adapter=np.zeros(2))),
            "bert weights hold the unknown key 'adapter'",
        ),
        (
            change_weights(lambda state: state.update({QUERY: state[QUERY].astype(np.int8)})),
            f"bert weight '{QUERY}' is of dtype int8; quantized weights aren't read",
        ),
        (config(intermediate_size=10**30), "intermediate_size = 10*; it must be a whole number from 1 to 2"),
        (config(intermediate_size=2 * 10**9), "has shape .*; its config implies"),
        (config(max_position_embeddings=2 * 10**9), "has shape .*; its config implies"),
        (pickled, r"pytorch_model.bin is damaged, or older than torch 1.6|more than weights"),
        (another_order, "holds Normalize, Pooling, Transformer; supported are"),
        (no_pooling, r"asks for pooling \[\]; supported are cls, max, mean, mean_sqrt_len_tokens, weightedmean, last"),
        (two_poolings, r"asks for pooling \['mean', 'splade'\]; supported are cls, max, mean, "),
        (prompt_left_out, "include_prompt"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "weights lack 'encoder.layer"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda folder: (folder / "modules.json").write_text('[{"path": ""}]'), "missing or malformed at 'type'"),
        (lambda folder: (folder / "modules.json").write_text("[1]"), "missing or malformed"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is damaged"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer: neither tokenizer.json nor vocab.txt"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights: neither model.safetensors nor"),
        (lambda folder: os.truncate(folder / "model.safetensors", 500), "damaged or no safetensors file"),
        (lambda folder: change(folder / "sentence_bert_config.json", max_seq_length=2), "cut to 2 tokens"),
    ],
)
def test_folders_that_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_embedder(str(folder))


def test_a_tokenizer_with_more_pieces_than_the_network(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save(str(folder / "tokenizer.json"))
    embedder = load_embedder(str(folder))
    embedder.embed(["a dog"])  # pieces that no text uses do no harm
    with pytest.raises(InputError, match="gives the id 60, but its network's vocab_size is 60: they don't belong"):
        embedder.embed(["a dog", "a zebra"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite(folder, value):
    change_weights(lambda state: state[QUERY].__setitem__((0, 0), value))(folder)
    with pytest.raises(InputError, match="gives NaN or infinite values; its weights are damaged: download it again"):
        load_embedder(str(folder)).embed(["a dog"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}},
            "rotary positions of type 'yarn'",
        ),
        ("llama", {"attention_bias": True}, "attention_bias = True; only False"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3, which must divide"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "layers of type 'chunked_attention'"),
        ("gemma3", {"layer_types": []}, "must be equal to the number of `layer_types`"),
        ("modernbert", {"norm_bias": True}, "norm_bias = True"),
        ("nomic_bert", {"rotary_scaling_factor": 2.0}, "rotary_scaling_factor"),
        ("roberta", {"pad_token_id": None}, "pad_token_id = None"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets = 16; only 32"),
        ("dpr_context", {"projection_dim": 4}, "projection_dim = 4"),
        ("t5_encoder", {"feed_forward_proj": "gated-silu"}, "feed-forward 'gated-silu'"),
        ("t5_encoder", {"d_model": None}, "d_model"),
    ],
)
def test_settings_that_are_refused_by_name(tmp_path, name, changes, message):
    change(plain(tmp_path / name, name) / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_embedder(f"mean@{tmp_path / name}")


@pytest.mark.parametrize("name", ["no-such-embedder", "x" * 300, "nul\0", "mean@no-folder", "a/b/c", "strange@."])
def test_no_such_embedder(name):
    with pytest.raises(InputError, match="There is no embedder"):
        load_embedder(name)


@pytest.mark.parametrize("name", [*KNOWN, "some-one/some-embedder", "gtr-base:256"])
def test_the_hub_cannot_be_reached(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    if name == "all-MiniLM-L6-v2":  # installed
        assert (locate(name) / "model.safetensors").is_file()
        return
    with pytest.raises(InputError, match="is not installed: .*give .* folder.* hub can't be reached"):
        locate(name)


NOT_HERE = ["gtr-base", "gtr-base-st", "sentence-transformers/gtr-t5-base", "facebook/contriever"]
NOT_HERE += ["e5-base-v2:8", "intfloat/e5-base-v2:8", "max@intfloat/e5-base-v2:8", "e5-base-v2@me/mine:8", "me/mine:8"]


@pytest.mark.parametrize("name", NOT_HERE)
def test_the_name_that_is_advised_is_accepted(name, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as refused:
        load_embedder(name)
    (advised,) = re.findall(r"give its folder as (\S+)\. From the hub", str(refused.value))
    assert locate(advised.replace("FOLDER", str(folder))) == folder
    if name.endswith(":8"):
        found = load_embedder(advised.replace("FOLDER", str(folder)))
        assert found.config.width == 8
        assert found.config.prefix == ("passage: " if "e5" in name and "max" not in name else "")
        assert found.config.pooling == ("max" if "max" in name else "mean")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("all-minilm-l6", r"give a name \(all-MiniLM-L6-v2, all-MiniLM-L12-v2\), a folder, ORG/NAME or NAME@FOLDER"),
        ("E5-Base", r"\(e5-base-v2, "),
        ("xyz", r"give a name that `v2t embedders` lists, a folder"),
    ],
)
def test_the_nearest_names_are_listed(name, said):
    with pytest.raises(InputError, match=said):
        load_embedder(name)


def test_every_known_embedder_is_described():
    for name, known in KNOWN.items():
        assert known.hub.count("/") == 1 and known.licence and known.width % 64 == 0 and known.max_length >= 77, name
    assert len(KNOWN) >= 20


def test_a_folder_of_a_known_name_is_that_embedder(tmp_path, monkeypatch):
    """Not merely a folder: its prefix, its hash and its way of pooling are the table's."""
    monkeypatch.chdir(tmp_path)
    make_embedder(tmp_path / "e5-base-v2")
    found = load_embedder("e5-base-v2")
    assert found.config.prefix == "passage: " and found.name == f"e5-base-v2@{tmp_path / 'e5-base-v2'}"
    assert load_embedder(found.name).config == found.config
    make_embedder(tmp_path / "all-MiniLM-L6-v2")
    with pytest.raises(InputError, match="is not the published sentence-transformers/all-MiniLM-L6-v2"):
        load_embedder("all-MiniLM-L6-v2")


def test_a_relative_folder_is_recorded_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_embedder(tmp_path / "mine")
    assert load_embedder("mine:8").name == f"{tmp_path / 'mine'}:8"
    assert load_embedder("mean@mine").name == f"mean@{tmp_path / 'mine'}"


def test_dense_layers_that_were_left_behind(tmp_path):
    folder = make_embedder(tmp_path / "embedder")
    (folder / "modules.json").unlink()
    with pytest.raises(InputError, match=r"lacks modules.json and the 1 dense layer\(s\)"):
        load_embedder(f"gtr-base-st@{folder}")


@pytest.mark.parametrize("path", ["../other", "/etc"])
def test_modules_outside_the_folder_are_not_read(tmp_path, path):
    folder = make_embedder(tmp_path / "embedder")
    make_embedder(tmp_path / "other")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match="lies outside the folder"):
        load_embedder(str(folder))


def test_layer_norms_as_tensorflow_named_them(tmp_path):
    folder = make_embedder(tmp_path / "embedder")
    expected = load_embedder(str(folder)).embed(["a dog"])
    state = load_file(folder / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }
    assert set(old) != set(state)
    save_file(old, folder / "model.safetensors")
    np.testing.assert_array_equal(load_embedder(str(folder)).embed(["a dog"]), expected)


def test_names_without_end():
    for name in ("x" + ":1" * 3000, "folder:" + "9" * 5000):
        with pytest.raises(InputError, match="There is no embedder"):
            load_embedder(name)
