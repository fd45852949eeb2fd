"""The original's Python API on a pair that the original trained."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests import upstream_pair
from tests.equivalence import Case, load
from v2t_jax import vec2text
from v2t_jax.errors import InputError
from v2t_jax.pretrained import Inverter


@pytest.fixture(scope="module")
def record() -> Case:
    return upstream_pair.record_of(load("vec2text_b"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upstream_pair.write_pair(load("vec2text_b"), tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def corrector(folder: Path) -> Inverter:
    return vec2text.load_corrector(
        str(folder / "inverter"),
        str(folder / "corrector"),
        embedder=str(upstream_pair.embedder_of(folder)),
        t5=str(folder / "t5-base"),
    )


def test_texts_are_the_originals(corrector: Inverter, record: Case) -> None:
    e = record["e"]
    greedy = record["search/0/0/texts"].tolist()
    assert vec2text.invert_embeddings(e, corrector, mode="upstream") == greedy
    assert vec2text.invert_embeddings(jnp.asarray(e), corrector, None, 0, "upstream") == greedy
    assert vec2text.invert_embeddings(e, corrector, 3, mode="upstream") == record["search/3/0/texts"].tolist()


def test_hypotheses_are_those_of_every_text_and_step(corrector: Inverter, record: Case) -> None:
    texts, found = vec2text.invert_embeddings_and_return_hypotheses(record["e"], corrector, 3, mode="upstream")
    assert len(texts) == 4 and {len(step) for step in texts} == {len(record["e"])}
    assert texts[-1] == record["search/3/0/texts"].tolist() == [one.text for one in found]
    e = jnp.asarray(record["e"])
    best, found = vec2text.invert_embeddings_and_return_hypotheses(e, corrector, 3)
    cosines = np.array([[step.cosine for step in one.trace] for one in found])
    assert (np.diff(cosines, axis=1) >= 0).all() and len(best) == 4


def test_strings(corrector: Inverter) -> None:
    texts = ["the old dog", "a cat and a bird"]
    recovered = vec2text.invert_strings(texts, corrector)
    assert len(recovered) == 2
    references = corrector.vocabulary.normalise(texts, corrector.config.max_length)
    assert recovered == vec2text.invert_embeddings(corrector.embedder.embed(references), corrector)


def test_what_is_refused(corrector: Inverter, folder: Path, record: Case) -> None:
    with pytest.raises(InputError, match="sequence_beam_width needs num_steps"):
        vec2text.invert_embeddings(record["e"], corrector, sequence_beam_width=2)
    with pytest.raises(InputError, match="no published corrector for 'bert'; choose gtr-base or"):
        vec2text.load_pretrained_corrector("bert")
    with pytest.raises(InputError, match="is behind an API: give the embedder too"):
        vec2text.load_pretrained_corrector("text-embedding-ada-002")
    with pytest.raises(InputError, match="jxm/gtr__nq__32 is not in the local cache and the hub can't be reached"):
        vec2text.load_pretrained_corrector("gtr-base")
    with pytest.raises(InputError, match="There is no folder .*nowhere"):
        vec2text.load_corrector(str(folder / "nowhere"), str(folder / "corrector"), embedder="gtr-base")
