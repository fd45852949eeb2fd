"""Folders that transformers and sentence-transformers wrote, read by us and by them: the same vectors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

from tests.helpers.equivalence import LAYERS, close, encode, one_less_cosine
from tests.helpers.tiny_run import make_texts, make_tokenizer
from v2t_jax.embedders.base import quantize
from v2t_jax.embedders.load import load_embedder
from v2t_jax.models.embedder import ACTIVATIONS

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]
MODELS = pytest.importorskip("tests.oracle.encoders", reason="torch is not installed").MODELS
TEXTS = ["a", "the cat sees a dog", "The Cat, quickly!", *make_texts(9), " ".join(make_texts(5, seed=1))]


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_transformers_wrote(tmp_path: Path, name: str) -> None:
    import torch

    from tests.oracle.encoders import encoder_outputs, make_encoder

    model = make_encoder(name, seed=5)
    model.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    if name.startswith("clip"):  # its end token is 1, which pools
        ends = [("[CLS]", 2), ("[UNK]", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [UNK]", special_tokens=ends)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = [text for text in TEXTS if "," not in text]  # unknown, so 1 again
    embedder = load_embedder(f"{MODELS[name][3]}@{tmp_path}")
    ids, mask = embedder.tokenize(texts)
    assert mask.min() == 0, "some text is padded"
    hidden, pooled = encoder_outputs(
        name, model, {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
    )
    ours = encode(embedder.config.encoder, embedder.params["encoder"], ids, mask)
    kept = mask[:, :, None] != 0
    close(np.where(kept, ours, 0), np.where(kept, hidden.numpy(), 0), LAYERS, "hidden states")
    vectors = embedder.embed(texts)
    close(vectors, pooled.numpy(), LAYERS, "pooled")
    assert one_less_cosine(vectors, pooled.numpy()) < 1e-5


Module = tuple[int, bool, str] | str  # a dense layer (width, bias, activation) or another class's name
IDENTITY, TANH = "Identity", "Tanh"
PIPELINES: dict[str, tuple[str, str | list[str], list[Module], dict[str, Any]]] = {
    # name: (encoder, pooling, modules behind it, prompts, of which the first is the default)
    "bert-cls": ("bert", "cls", ["Normalize"], {}),
    "bert-dense-tanh": ("bert", "mean", [(10, True, TANH), "Normalize"], {"passage": "the old "}),
    "distilbert-max": ("distilbert", "max", [], {}),
    "t5-dense": ("t5_encoder", "mean", [(12, False, IDENTITY), "Normalize"], {}),
    "nomic-prompt": ("nomic_bert", "mean", [], {"search": "a dog: "}),
    "mistral-last": ("mistral", "lasttoken", ["Normalize"], {}),
    "gemma-two-dense": (
        *("gemma3_bidirectional", "mean"),
        *([(24, False, IDENTITY), (16, False, IDENTITY), "Normalize"], {"document": "a | "}),
    ),
    "weightedmean": ("mpnet", "weightedmean", ["Dropout", "LayerNorm", "Normalize"], {}),
    "two-poolings": ("bert", ["mean", "cls"], [], {}),
    "all-poolings": (
        *("roberta", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]),
        *(["LayerNorm", (16, True, "GELU"), "Normalize", (10, False, TANH), "Dropout"], {}),
    ),
    "static": ("static", "", [], {}),
    "static-dense": ("static", "", ["LayerNorm", (12, True, "ReLU"), "Normalize"], {"query": "a dog "}),
}


def make_pipeline(folder: Path, name: str, **settings: Any) -> None:
    """A sentence-transformers folder in the format of the installed version."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import PreTrainedTokenizerFast

    from tests.oracle.encoders import make_encoder

    encoder, pooling, behind, prompts = PIPELINES[name]
    torch.manual_seed(0)
    if encoder == "static":
        modules: list[Any] = [models.StaticEmbedding(make_tokenizer(), embedding_dim=16)]
    else:
        body = folder.parent / "body"
        make_encoder(encoder, seed=6).save_pretrained(body)
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), model_max_length=20, **special).save_pretrained(body)
        modules = [models.Transformer(str(body)), models.Pooling(16, pooling)]
    width = modules[-1].get_sentence_embedding_dimension()
    for module in behind:
        if isinstance(module, str):
            modules.append(getattr(models, module)(*[width] * (module == "LayerNorm")))
        else:
            out, bias, activation = module
            modules.append(models.Dense(width, out, bias=bias, activation_function=getattr(torch.nn, activation)()))
            width = out
        if module == "LayerNorm":
            torch.nn.init.normal_(modules[-1].norm.weight)
            torch.nn.init.normal_(modules[-1].norm.bias)
    settings = {"prompts": prompts, "default_prompt_name": next(iter(prompts), None), **settings}
    SentenceTransformer(modules=modules, device="cpu", **settings).save_pretrained(str(folder))


def in_old_format(folder: Path) -> None:
    """The same folder as sentence-transformers 2 wrote it."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = f"sentence_transformers.models.{kind}"
        if kind == "Pooling":
            file = folder / module["path"] / "config.json"
            chosen = json.loads(file.read_text())["pooling_mode"]
            chosen = [chosen] if isinstance(chosen, str) else chosen
            names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
            names |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}
            old = {f"pooling_mode_{name}": mode in chosen for mode, name in names.items()}
            file.write_text(json.dumps({"word_embedding_dimension": 16, **old}))
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 14, "do_lower_case": True}))


@pytest.mark.parametrize("name", [name for name in PIPELINES if not name.startswith("static")])
def test_a_pipeline_of_sentence_transformers(tmp_path: Path, name: str) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "embedder"
    make_pipeline(folder, name)
    for max_length in (20, 14):
        if max_length == 14:
            in_old_format(folder)
        theirs = SentenceTransformer(str(folder), device="cpu")
        embedder = load_embedder(str(folder))
        assert embedder.config.max_length == theirs.max_seq_length == max_length
        expected = theirs.encode(TEXTS, convert_to_numpy=True)
        ours = embedder.embed(TEXTS)
        assert embedder.width == expected.shape[1]
        close(ours, expected, LAYERS, "vectors")
        assert one_less_cosine(ours, expected) < 1e-5

    shorter = load_embedder(str(folder), dimensions=7)
    options = {"truncate_dim": 7, "normalize_embeddings": shorter.normalized}
    close(shorter.embed(TEXTS), theirs.encode(TEXTS, convert_to_numpy=True, **options), LAYERS, "truncated")


@pytest.mark.parametrize("name", ["static", "static-dense"])
def test_static_embeddings(tmp_path: Path, name: str) -> None:
    """Without [CLS] and [SEP], of texts of any length, and of none of its own pieces."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "embedder"
    make_pipeline(folder, name)
    texts = [*TEXTS, " ".join(make_texts(100)), "\u200b"]
    theirs = SentenceTransformer(str(folder), device="cpu")
    expected = theirs.encode(texts, convert_to_numpy=True)
    embedder = load_embedder(str(folder))
    close(embedder.embed(texts), expected, LAYERS, "vectors")
    if name == "static":
        state = load_file(folder / "model.safetensors")
        save_file({"embeddings": state["embedding.weight"]}, folder / "model.safetensors")  # model2vec's
        theirs = SentenceTransformer(str(folder), device="cpu")
        np.testing.assert_array_equal(theirs.encode(texts, convert_to_numpy=True), expected)
        np.testing.assert_array_equal(load_embedder(str(folder)).embed(texts), embedder.embed(texts))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(5)
        tokenizer.save(str(folder / "tokenizer.json"))
        expected = SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_numpy=True)
        close(load_embedder(str(folder)).embed(texts), expected, LAYERS, "cut to 5 tokens")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_dense_layers(tmp_path: Path, activation: str) -> None:
    import torch
    from sentence_transformers import SentenceTransformer, models

    names = {name.lower(): name for name in dir(torch.nn)}
    folder = tmp_path / "embedder"
    dense = models.Dense(16, 12, activation_function=getattr(torch.nn, names[activation])())
    torch.nn.init.normal_(dense.linear.weight)  # so that the functions' curves are used
    modules = [models.StaticEmbedding(make_tokenizer(), embedding_dim=16), dense]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_numpy=True)
    close(load_embedder(str(folder)).embed(TEXTS), theirs, LAYERS, activation)


@pytest.mark.parametrize("name", ["bert-cls", "static", "t5-dense"])
def test_truncated_dimensions_that_a_folder_asks_for(tmp_path: Path, name: str) -> None:
    """They aren't normalized again, so that vectors are shorter than 1."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "embedder"
    make_pipeline(folder, name, truncate_dim=7)
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.truncate_dim == 7
    embedder = load_embedder(str(folder))
    assert embedder.width == 7 and not embedder.normalized
    close(embedder.embed(TEXTS), theirs.encode(TEXTS, convert_to_numpy=True), LAYERS, "truncated")


@pytest.mark.parametrize("documents", ["document", "passage", "corpus"])
def test_prompts(tmp_path: Path, documents: str) -> None:
    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "embedder"
    prompts = {"query": "one bird ", documents: "the old dog: ", "other": "a "}
    make_pipeline(folder, "bert-cls", prompts=prompts, default_prompt_name=None)
    theirs = SentenceTransformer(str(folder), device="cpu")
    if documents != "document":  # which sentence-transformers 5 adds where there is none
        settings = json.loads((folder / "config_sentence_transformers.json").read_text())
        settings["prompts"] = prompts
        (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
        theirs.prompts.pop("document", None)
    expected = {None: theirs.encode_document(TEXTS), "query": theirs.encode_query(TEXTS)}
    expected["other"] = theirs.encode(TEXTS, prompt_name="other")
    for prompt, vectors in expected.items():
        close(load_embedder(str(folder), prompt=prompt).embed(TEXTS), vectors, LAYERS, str(prompt))


@pytest.mark.parametrize("width", [16, 13])
def test_int8_and_binary_are_as_sentence_transformers_has_them(width: int) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    rng = np.random.default_rng(0)
    sample, vectors = rng.normal(size=(200, width)).astype(np.float32), rng.normal(size=(9, width)).astype(np.float32)
    sample[:, 3] = vectors[:, 3] = 0.25  # some embedders have constant dimensions
    vectors[0, 0] = 0.0
    ranges = np.stack([sample.min(axis=0), sample.max(axis=0)])
    np.testing.assert_array_equal(quantize(sample, "int8"), quantize_embeddings(sample, "int8"))
    np.testing.assert_array_equal(quantize(vectors, "int8", ranges), quantize_embeddings(vectors, "int8", ranges))
    np.testing.assert_array_equal(quantize(vectors, "binary"), quantize_embeddings(vectors, "binary"))


def test_gtr_raw_and_gtr_of_sentence_transformers_are_not_confused(tmp_path: Path) -> None:
    folder = tmp_path / "gtr"
    make_pipeline(folder, "t5-dense")
    st, raw = load_embedder(f"gtr-base-st@{folder}"), load_embedder(f"gtr-base@{folder}")
    assert (st.width, st.normalized, raw.width, raw.normalized) == (12, True, 16, False)
    np.testing.assert_array_equal(st.embed(TEXTS), load_embedder(str(folder)).embed(TEXTS))
    np.testing.assert_array_equal(raw.embed(TEXTS), load_embedder(f"mean@{folder}").embed(TEXTS))
    shutil.rmtree(folder / "2_Dense")  # raw never looks at it
    load_embedder(f"gtr-base@{folder}")
