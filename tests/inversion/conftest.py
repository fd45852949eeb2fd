"""Weights of the toy loop, and embeddings of its texts to recover."""

import numpy as np
import pytest

from tests.helpers.toy_loop import BATCH, embed, toy_params, toy_texts


@pytest.fixture(scope="module")
def params():
    return toy_params()


@pytest.fixture(scope="module")
def targets(params):
    return np.asarray(embed(params, toy_texts(1, BATCH)))
