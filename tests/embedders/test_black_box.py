"""Embedders that can only be asked, in Python and in the correction loop: every answer is checked."""

import json
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.helpers import toy_loop
from tests.helpers.fake_endpoint import WIDTH, Api, Endpoint, status, vector
from v2t_jax.embedders.black_box import PROBE, CallableEmbedder
from v2t_jax.errors import InputError
from v2t_jax.inversion.correction import CorrectionLoop, CorrectionSettings
from v2t_jax.inversion.embed_hypotheses import HostFunctions


def constant(answer: Any) -> CallableEmbedder:
    return CallableEmbedder(lambda texts: answer, "constant")


ROWS = [[1.0, 2.0], [3.0, 4.0]]


class Tensor:
    """What torch's tensors ask for: a gradient must be cut off, then a device left, before numpy may look."""

    def __init__(self, state: str = "gradient") -> None:
        self.state = state

    def detach(self) -> "Tensor":
        assert self.state == "gradient"
        return Tensor("gpu")

    def cpu(self) -> "Tensor":
        assert self.state == "gpu"
        return Tensor("bfloat16")

    def float(self) -> "Tensor":
        assert self.state == "bfloat16"
        return Tensor("ready")

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        assert self.state == "ready"
        return np.array(ROWS, dtype)


@pytest.mark.parametrize(
    "answer",
    [
        *(ROWS, np.array(ROWS), np.array(ROWS, np.int8), jnp.array(ROWS, jnp.bfloat16), [jnp.array(r) for r in ROWS]),
        *(np.array(ROWS, ml_dtypes.bfloat16), Tensor()),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_a_callable_may_answer_in_any_array(answer: Any) -> None:
    embedder = constant(answer)
    made = embedder.embed(["a", "b"])
    assert made.dtype == np.float32 and (embedder.width, embedder.normalized) == (2, False)
    np.testing.assert_array_equal(made, ROWS)


@pytest.mark.oracle
def test_a_callable_may_answer_in_torch() -> None:
    torch: Any = __import__("torch")
    for answer in (
        torch.tensor(ROWS, requires_grad=True),
        torch.tensor(ROWS, dtype=torch.bfloat16),
        [torch.tensor(row, requires_grad=True) for row in ROWS],
    ):
        np.testing.assert_array_equal(constant(answer).embed(["a", "b"]), ROWS)
    with pytest.raises(InputError, match="did not return rows of numbers"):
        constant(torch.ones(2, 2, device="meta")).embed(["a", "b"])


def test_a_callable_sees_each_text_once_in_batches() -> None:
    seen: list[list[str]] = []

    def fn(texts: list[str]) -> np.ndarray:
        seen.append(texts)
        return np.array([vector(text) for text in texts])

    embedder = CallableEmbedder(fn)
    assert (embedder.name, embedder.weights_sha256) == ("fn", "")
    np.testing.assert_array_equal(embedder.embed(["b", "a", "b", "c", "a"], batch_size=2), _vectors("babca"))
    assert seen == [["b", "a"], ["c"]] and (embedder.width, embedder.normalized) == (WIDTH, True)
    assert CallableEmbedder(fn).width == WIDTH and seen[-1] == [PROBE]
    assert CallableEmbedder(fn, width=5, normalized=False).width == 5 and len(seen) == 3
    assert CallableEmbedder(fn).embed([]).shape == (0, WIDTH)


def _vectors(texts: str) -> np.ndarray:
    return np.array([vector(text) for text in texts], np.float32)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ROWS[:1], r"returned an array of shape \(1, 2\) for 2 texts"),
        ([1.0, 2.0], r"shape \(2,\)"),
        (np.ones((2, 0)), "width"),
        (None, "of type object"),
        ([["a"], ["b"]], "of type <U1"),
        (np.ones((2, 2), bool), "of type bool"),
        (np.ones((2, 2), complex), "of type complex"),
        ([[1.0], [1.0, 2.0]], "one length"),
        ([[1.0, None], [1.0, 2.0]], "of type object"),
        ([[1.0, np.nan], [1.0, 2.0]], "NaN or infinite"),
        ([[1.0, 1e99], [1.0, 2.0]], "NaN or infinite"),
        ([[1.0, 1.0], [0.0, 0.0]], "zeros"),
    ],
)
def test_a_wrong_answer_is_one_sentence(answer: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        constant(answer).embed(["a", "b"])
    assert str(caught.value).startswith("constant ") and str(caught.value).endswith(".")


def test_a_callable_must_stay_the_same() -> None:
    answers = iter([[[3.0, 4.0]], [[1.0, 0.0, 0.0]]])
    embedder = CallableEmbedder(lambda texts: next(answers), "other")
    with pytest.raises(InputError, match="vectors of width 3 instead of 2"):
        embedder.embed(["a", "b"], batch_size=1)
    with pytest.raises(InputError, match="instead of 5"):
        CallableEmbedder(lambda texts: ROWS, width=5).embed(["a", "b"])
    answers = iter([[[0.6, 0.8]], [[6.0, 8.0]]])
    with pytest.raises(InputError, match="whose length isn't 1"):
        CallableEmbedder(lambda texts: next(answers)).embed(["a", "b"], batch_size=1)


def test_texts_and_settings_are_checked() -> None:
    embedder = constant(ROWS)
    with pytest.raises(InputError, match="Text 2 of 2 is empty"):
        embedder.embed(["a", " \n"])
    with pytest.raises(InputError, match="Text 1 of 1 is not valid Unicode"):
        embedder.embed(["\udce9"])
    with pytest.raises(InputError, match="batch_size is 0"):
        embedder.embed(["a"], batch_size=0)
    with pytest.raises(InputError, match="must be a function"):
        CallableEmbedder("model")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="width of x is 0"):
        CallableEmbedder(constant, "x", width=0)


def test_the_correction_loop_over_black_boxes(endpoint: Endpoint, api: Api) -> None:
    params = toy_loop.toy_params()
    targets = np.asarray(toy_loop.embed(params, toy_loop.toy_texts(1, toy_loop.BATCH)))
    table = np.asarray(params["table"])  # here: nothing beside the running loop may call jax

    def embed_texts(texts: list[str]) -> list[list[float]]:
        ids = [np.array(text.split(), int) for text in texts]
        return [(table[np.arange(len(row)), row] * (row > 0)[:, None]).sum(axis=0).tolist() for row in ids]

    def behave(request: dict[str, Any]) -> Any:
        rows = embed_texts(request["input"])
        data = [{"index": i, "embedding": row} for i, row in enumerate(rows)][::-1]
        return 200, {}, json.dumps({"data": data}).encode()

    def embed(ids: np.ndarray) -> np.ndarray:
        return embedder.embed([" ".join(map(str, np.trim_zeros(row, "b"))) for row in ids])

    endpoint.always = behave
    host = HostFunctions()
    boxed = host.vectors(embed, toy_loop.WIDTH)
    loop = CorrectionLoop(
        *(toy_loop.hypothesize, (toy_loop.propose_greedy,), lambda p, ids: boxed(ids), CorrectionSettings()),
        check=host.check,
    )
    expected = toy_loop.make_loop()(params, targets, 6)
    for black_box in (CallableEmbedder(embed_texts), api()):
        embedder = black_box
        toy_loop.assert_same(loop(params, targets, 6), expected)
    assert {*endpoint.paid.values()} == {1}
    endpoint.always = status(401, "The key has expired.")
    with pytest.raises(InputError, match="status 401: The key has expired"):
        loop(params, -targets, 6)
