"""Models with a tokenizer of their own, in front of embedders with another one, or of which only the output is seen."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import v2t_jax as v2t
from tests.helpers.fake_endpoint import Endpoint, vector
from tests.helpers.tiny_model import make_model
from tests.helpers.tiny_run import WORDS, make_embedder, make_texts
from v2t_jax.cli import main as cli
from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.data.vocabulary import Vocabulary
from v2t_jax.embedders.base import EmbedderIdentity, TextEmbedder, embed_texts
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.inversion import embed_hypotheses
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.vectors import cosines
from v2t_jax.models.ranker import NETWORKS

WIDTH = 16
OPTIONS = {"num_steps": 2, "sequence_beam_width": 2, "batch_size": 8}


def make_tokenizer() -> Tokenizer:
    """T5's special pieces, words, and letters to read with: other ids and other lengths than the embedder's."""
    words = [f"▁{word}" for word in WORDS[::-1] if len(word) > 1]
    pieces = ["<pad>", "</s>", "<unk>", *words, "▁", *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(pieces[:3])
    return made


class LetterCounts:
    """An embedder that is no network of ours: words' letters and their places, counted."""

    name, weights_sha256, width, normalized = "letter-counts", "", WIDTH, False
    identity = EmbedderIdentity("letter-counts", width=WIDTH)

    def __init__(self) -> None:
        self.seen: list[str] = []

    def embed(self, texts: list[str], batch_size: int = 64) -> np.ndarray:
        assert texts and all(text.strip() for text in texts)
        self.seen += texts
        vectors = np.full((len(texts), WIDTH), 0.1, np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for place, letter in enumerate(text):
                row[(7 * ord(letter) + place) % WIDTH] += 1.0
        return vectors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("own_vocabulary")
    make_embedder(made / "embedder")
    return made


def make_foreign(embedder: TextEmbedder) -> InversionPipeline:
    vocabulary = Vocabulary.full(make_tokenizer())
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    config = ModelConfig(
        t5=T5Config(vocab_size=vocabulary.size, **sizes), embedding_width=WIDTH, num_pseudo_tokens=2, max_length=12
    )
    # Larger than at the start of a training, so that the outputs are many.
    params = {
        stage: jax.tree.map(lambda leaf: 4 * leaf, NETWORKS[stage](config).init_params(jax.random.key(seed)))
        for seed, stage in enumerate(NETWORKS)
    }
    return InversionPipeline("own-tokenizer", config, params, embedder, vocabulary, shares_vocabulary=False)


@pytest.fixture(scope="module")
def model(folder: Path) -> InversionPipeline:
    return make_foreign(load_embedder(str(folder / "embedder")))


@pytest.fixture(scope="module")
def black_box() -> InversionPipeline:
    return make_foreign(LetterCounts())


@pytest.mark.parametrize("which", ["model", "black_box"])
def test_the_loop_sees_the_embeddings_of_the_texts(which: str, request: pytest.FixtureRequest) -> None:
    """Hypotheses go to the embedder as text: what the loop ranks by is what embedding their letters gives."""
    one: InversionPipeline = request.getfixturevalue(which)
    e = one.embedder.embed(make_texts(6))
    found = one.correction_loop(2)(one.loop_params(), e, 3)
    for step in range(4):
        texts = one.vocabulary.decode(found.trace_ids[:, step])
        assert any(text.strip() for text in texts)
        expected = cosines(embed_texts(one.embedder, texts), e)
        np.testing.assert_allclose(found.trace_similarity[:, step], expected, atol=2e-6)
    assert (
        found.similarity.mean() > found.trace_similarity[:, 0].mean()
    )  # and it searches: random networks, yet it gets nearer


@pytest.mark.parametrize("which", ["model", "black_box"])
def test_a_result_has_the_cosine_of_its_whole_text(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the loop cut it to what it has room for: such texts are embedded again."""
    one: InversionPipeline = request.getfixturevalue(which)
    e = one.embedder.embed(make_texts(4))
    monkeypatch.setattr(embed_hypotheses, "_most_tokens", lambda *_: 4)
    fresh = dataclasses.replace(one)  # whose loop isn't compiled yet
    for found, target in zip(v2t.invert_embeddings(fresh, e, num_steps=1), e, strict=True):
        expected = cosines(embed_texts(one.embedder, [found.text]), target[None])[0]
        assert found.cosine == pytest.approx(expected, abs=2e-6)


def test_a_text_too_long_for_the_embedder_is_cut(folder: Path) -> None:
    embedder = load_embedder(str(folder / "embedder"))
    one = make_foreign(embedder.shortened(4))
    e = embedder.embed(make_texts(2))
    found = one.correction_loop(1)(one.loop_params(), e, 1)
    texts = one.vocabulary.decode(found.ids)
    np.testing.assert_allclose(found.similarity, cosines(embed_texts(one.embedder, texts), e), atol=2e-6)


def test_a_saved_model_is_the_same_model(model: InversionPipeline, folder: Path) -> None:
    model.save(folder / "saved", record={})
    record = json.loads((folder / "saved" / "config.json").read_text())
    assert "tokenizer.json" in record["files"] and record["embedder"]["max_length"] == 32
    loaded = v2t.load(str(folder / "saved"))
    assert not loaded.shares_vocabulary
    e = model.embedder.embed(make_texts(3))
    assert v2t.invert_embeddings(loaded, e, **OPTIONS) == v2t.invert_embeddings(model, e, **OPTIONS)
    (folder / "saved" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json is truncated or altered"):
        v2t.load(str(folder / "saved"))


def test_the_length_that_a_model_was_made_for_is_kept(model: InversionPipeline, folder: Path) -> None:
    short = make_foreign(model.embedder.shortened(6))
    short.save(folder / "short", record={})
    assert v2t.load(str(folder / "short")).embedder.config.max_length == 6


def test_an_embedder_that_moved(model: InversionPipeline, folder: Path) -> None:
    model.save(folder / "moved", record={})
    file = folder / "moved" / "config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"embedder": record["embedder"] | {"name": "elsewhere"}}))
    with pytest.raises(InputError, match="There is no embedder 'elsewhere'"):
        v2t.load(str(folder / "moved"))
    assert v2t.load(str(folder / "moved"), str(folder / "embedder")).embedder.width == WIDTH
    make_embedder(folder / "other", seed=5)
    with pytest.raises(InputError, match="was made with an embedder whose weights_sha256 is"):
        v2t.load(str(folder / "moved"), str(folder / "other"))


def test_a_black_box_from_end_to_end(black_box: InversionPipeline, folder: Path) -> None:
    black_box.save(folder / "box", record={})
    with pytest.raises(InputError, match="trained for letter-counts, whose weights aren't known: pass that embedder"):
        v2t.load(str(folder / "box"))
    embedder = LetterCounts()
    found = v2t.invert_strings(v2t.load(str(folder / "box"), embedder), ["the dog", "a cat"], **OPTIONS)
    assert [one.reference for one in found] == ["the dog", "a cat"]
    assert embedder.seen[:2] == ["the dog", "a cat"] and len(embedder.seen) > 8
    for one in found:
        expected = cosines(embed_texts(embedder, [one.text]), embedder.embed([one.reference]))
        assert one.cosine == pytest.approx(expected[0], abs=1e-6)


def test_embedders_that_do_not_fit(folder: Path) -> None:
    shared = make_model(folder)
    with pytest.raises(InputError, match="shares its embedder's vocabulary, so it can't use letter-counts"):
        v2t.load(str(shared), LetterCounts())
    wide = LetterCounts()
    wide.width = 17
    with pytest.raises(InputError, match="of width 16, but those of letter-counts are 17 wide"):
        make_foreign(wide)


def test_what_the_embedder_refuses_in_the_loop_arrives_as_it_is(black_box: InversionPipeline) -> None:
    class Exhausted(LetterCounts):
        def embed(self, texts: list[str], batch_size: int = 64) -> np.ndarray:
            raise InputError("The budget is spent; raise it.")

    e = black_box.embedder.embed(make_texts(3))
    with pytest.raises(InputError, match=r"^The budget is spent; raise it\.$"):
        v2t.invert_embeddings(make_foreign(Exhausted()), e, **OPTIONS)


def test_an_endpoint_from_end_to_end(
    black_box: InversionPipeline,
    folder: Path,
    endpoint: Endpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop over HTTP: each step's texts are asked for once, and a second run asks for nothing."""
    black_box.save(folder / "served", record={})
    arguments = ["invert", "--model", str(folder / "served"), "--embedder", endpoint.url, "--text", "the dog", "--json"]
    arguments += ["--api.model", "tiny", "--api.cache", str(tmp_path), "--num-steps", "2", "--sequence-beam-width", "2"]
    arguments += ["--api.dimensions", str(WIDTH)]
    documents = []
    for _ in range(2):
        paid = endpoint.paid.total()
        monkeypatch.setattr(sys, "argv", ["v2t", *arguments])
        with pytest.warns(UserWarning, match="for letter-counts; that tiny.* is the same embedder can't be checked"):
            cli.main()
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[0] == documents[1] and endpoint.paid.total() == paid
    assert set(endpoint.paid.values()) == {1} and "the dog" in endpoint.paid
    (found,) = documents[0]
    assert len(found["trace"]) == 3 and found["reference"] == "the dog"
    target, own = (np.array(vector(text, WIDTH)) for text in ("the dog", found["text"]))
    assert found["cosine"] == pytest.approx(float(target @ own), abs=1e-6)
