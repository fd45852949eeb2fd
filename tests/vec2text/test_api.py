"""The original's Python API on a pair that the original trained."""

import functools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import upstream_pair
from tests.helpers.equivalence import Case, load
from v2t_jax import vec2text
from v2t_jax.embedders.load import KNOWN, load_embedder
from v2t_jax.errors import InputError
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.vec2text import convert
from v2t_jax.vec2text.embedders import COMPUTED, default_name


@pytest.fixture(scope="module")
def record() -> Case:
    return upstream_pair.record_of(load("vec2text_b"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upstream_pair.write_pair(load("vec2text_b"), tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def corrector(folder: Path) -> InversionPipeline:
    return vec2text.load_corrector(
        folder / "inverter",
        str(folder / "corrector"),
        embedder=upstream_pair.embedder_of(folder),
        t5=folder / "t5-base",
    )


def test_texts_are_the_originals(corrector: InversionPipeline, record: Case) -> None:
    e = record["e"]
    greedy = record["search/0/0/texts"].tolist()
    assert vec2text.invert_embeddings(e, corrector, mode="upstream") == greedy
    assert vec2text.invert_embeddings(jnp.asarray(e), corrector, None, 0, "upstream") == greedy
    assert vec2text.invert_embeddings(e, corrector, 3, mode="upstream") == record["search/3/0/texts"].tolist()


def test_hypotheses_are_those_of_every_text_and_step(corrector: InversionPipeline, record: Case) -> None:
    texts, found = vec2text.invert_embeddings_and_return_hypotheses(record["e"], corrector, 3, mode="upstream")
    assert len(texts) == 4 and {len(step) for step in texts} == {len(record["e"])}
    assert texts[-1] == record["search/3/0/texts"].tolist() == [one.text for one in found]
    e = jnp.asarray(record["e"])
    best, found = vec2text.invert_embeddings_and_return_hypotheses(e, corrector, 3)
    cosines = np.array([[step.cosine for step in one.trace] for one in found])
    assert (np.diff(cosines, axis=1) >= 0).all() and len(best) == 4


def test_strings(corrector: InversionPipeline) -> None:
    texts = ["the old dog", "a cat and a bird"]
    recovered = vec2text.invert_strings(texts, corrector)
    assert len(recovered) == 2
    references = corrector.vocabulary.normalize(texts, corrector.config.max_length)
    assert recovered == vec2text.invert_embeddings(corrector.embedder.embed(references), corrector)


def test_strings_as_the_original_embeds_them(corrector: InversionPipeline, folder: Path) -> None:
    """Whole, where the model's own texts, and with them its hypotheses, are shorter."""
    text = "the old dog and a cat and a bird and the old dog and a cat and a bird"
    embedder = load_embedder(str(upstream_pair.embedder_of(folder)))
    assert len(embedder.tokenizer.encode(text).ids) > corrector.embedder.config.max_length
    embedded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vec2text, "invert", lambda _, e, **options: embedded.append(e) or [])
        vec2text.invert_strings([text], corrector, mode="upstream")
    np.testing.assert_allclose(embedded[0], embedder.embed([text]), atol=1e-6)
    assert np.abs(embedded[0] - corrector.embedder.embed([text])).max() > 1e-3
    for texts, message in (([], "There are no texts"), (["a", " "], "Text 2 of 2 is empty")):
        with pytest.raises(InputError, match=message):
            vec2text.invert_strings(texts, corrector, mode="upstream")


def test_the_embedder_that_a_checkpoint_names(folder: Path, corrector: InversionPipeline, tmp_path: Path) -> None:
    pair = shutil.copytree(folder, tmp_path / "pair")
    loading = functools.partial(vec2text.load_corrector, str(pair / "inverter"), str(pair / "corrector"))
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(convert, "load_embedder", lambda name, prefix: asked.append(name) or corrector.embedder)
        patch.setattr(convert, "locate", lambda name: upstream_pair.embedder_of(folder))
        assert loading(t5=str(pair / "t5-base")).config == corrector.config
    assert asked == ["all-MiniLM-L6-v2"]
    names = ("gtr_base", "gtr_base_st", "gte_base_st", "sentence-transformers/gtr-t5-xl")
    expected = ["gtr-base", "gtr-base-st", "gte-base", "sentence-transformers/gtr-t5-xl"]
    assert [default_name(name) for name in names] == expected
    assert all(known.name in KNOWN or "/" in known.name for known in COMPUTED.values() if known.name is not None)
    for changes, message in (
        (
            {"embedder_model_name": "gte_base"},
            "trained for the embedder 'gte_base', which is unknown here: give embedder='pooler@",
        ),
        ({"embedder_model_name": "mine"}, "trained for the embedder 'mine', which is unknown here: give embedder=..."),
        ({"embedder_model_api": "ada"}, "trained for ada, which is behind an API: give embedder=HttpEmbedder"),
    ):
        file = pair / "inverter" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        with pytest.raises(InputError, match=message):
            loading()


def test_what_is_refused(corrector: InversionPipeline, folder: Path, record: Case) -> None:
    with pytest.raises(InputError, match="sequence_beam_width needs num_steps"):
        vec2text.invert_embeddings(record["e"], corrector, sequence_beam_width=2)
    with pytest.raises(InputError, match="the embeddings come first, then the model"):
        vec2text.invert_embeddings(corrector, record["e"])
    with pytest.raises(InputError, match="sequence_beam_width is -1"):
        vec2text.invert_embeddings(record["e"], corrector, num_steps=1, sequence_beam_width=-1)
    with pytest.raises(InputError, match="no published corrector for 'bert'; choose gtr-base or"):
        vec2text.load_pretrained_corrector("bert")
    with pytest.raises(InputError, match="is behind an API: give the embedder too"):
        vec2text.load_pretrained_corrector("text-embedding-ada-002")
    with pytest.raises(InputError, match="jxm/gtr__nq__32 is not in the local cache and the hub can't be reached"):
        vec2text.load_pretrained_corrector("gtr-base")
    with pytest.raises(InputError, match="There is no folder .*nowhere"):
        vec2text.load_corrector(folder / "nowhere", folder / "corrector", embedder="gtr-base")
    with pytest.raises(InputError, match="The embedder is of type function"):
        vec2text.load_corrector(folder / "inverter", folder / "corrector", embedder=lambda texts: texts)  # type: ignore
