"""Folders that transformers and sentence-transformers wrote, read by us and by them: the same vectors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from tests.helpers.equivalence import LAYERS, close, encode, one_less_cosine
from tests.helpers.tiny_run import make_texts, make_tokenizer
from v2t_jax.embedders.base import quantize
from v2t_jax.embedders.load import load_embedder

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


# What comes behind the encoder, as sentence-transformers' modules: (class, arguments).
IDENTITY, TANH = "Identity", "Tanh"
PIPELINES: dict[str, tuple[str, str, list[tuple[int, bool, str]], bool, dict[str, Any]]] = {
    # name: (encoder, pooling, dense layers (width, bias, activation), normalize, prompts)
    "bert-cls": ("bert", "cls", [], True, {}),
    "bert-dense-tanh": ("bert", "mean", [(10, True, TANH)], True, {"passage": "the old "}),
    "distilbert-max": ("distilbert", "max", [], False, {}),
    "t5-dense": ("t5_encoder", "mean", [(12, False, IDENTITY)], True, {}),
    "nomic-prompt": ("nomic_bert", "mean", [], False, {"search": "a dog: "}),
    "mistral-last": ("mistral", "lasttoken", [], True, {}),
    "gemma-two-dense": (
        *("gemma3_bidirectional", "mean"),
        *([(24, False, IDENTITY), (16, False, IDENTITY)], True, {"document": "a | "}),
    ),
}


def make_pipeline(folder: Path, name: str) -> None:
    """A sentence-transformers folder in the format of the installed version."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    from transformers import PreTrainedTokenizerFast

    from tests.oracle.encoders import make_encoder

    encoder, pooling, dense, normalize, prompts = PIPELINES[name]
    body = folder.parent / "body"
    make_encoder(encoder, seed=6).save_pretrained(body)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), model_max_length=20, **special).save_pretrained(body)
    transformer = Transformer(str(body))
    modules: list[Any] = [transformer, Pooling(16, pooling)]
    width = 16
    torch.manual_seed(0)
    for out, bias, activation in dense:
        modules.append(Dense(width, out, bias=bias, activation_function=getattr(torch.nn, activation)()))
        width = out
    modules += [Normalize()] * normalize
    default = next(iter(prompts), None)
    model = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=default, device="cpu")
    model.save_pretrained(str(folder))


def in_old_format(folder: Path) -> None:
    """The same folder as sentence-transformers 2 wrote it."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        kind = module["type"].rsplit(".", 1)[-1]
        module["type"] = f"sentence_transformers.models.{kind}"
        if kind == "Pooling":
            file = folder / module["path"] / "config.json"
            chosen = json.loads(file.read_text())["pooling_mode"]
            old = {f"pooling_mode_{name}": False for name in ("mean_sqrt_len_tokens", "weightedmean_tokens")}
            names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
            old |= {f"pooling_mode_{name}": mode == chosen for mode, name in names.items()}
            file.write_text(json.dumps({"word_embedding_dimension": 16, **old}))
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 14, "do_lower_case": True}))


@pytest.mark.parametrize("name", PIPELINES)
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
