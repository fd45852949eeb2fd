"""The equivalence ladder, live: torch's outputs are made anew and compared with the committed ones and with ours."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.equivalence import CHECKS, ENCODERS, GOLDEN, load

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]

# The first two don't depend on a seed; test_embedders_against_torch.py makes encoders with fresh weights.
FRESH = [name for name in CHECKS if name not in ("relative_buckets", "minilm", *ENCODERS)]


@pytest.mark.parametrize("name", CHECKS)
def test_golden_arrays_are_what_torch_gives(name: str) -> None:
    from tests.oracle.generate import CASES, GOLDEN_SEED

    live, golden = CASES[name](GOLDEN_SEED), load(name)
    assert set(live) == set(golden), GOLDEN
    for key, value in golden.items():
        if key == "config":  # names the version of transformers, too
            continue
        if np.issubdtype(value.dtype, np.floating):
            np.testing.assert_allclose(live[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(live[key], value, err_msg=key)


@pytest.mark.parametrize("seed", [2, 5])
@pytest.mark.parametrize("name", FRESH)
def test_ours_equals_torch_on_fresh_weights(name: str, seed: int) -> None:
    from tests.oracle.generate import CASES

    case = CASES[name](seed)
    for check in CHECKS[name]:
        check(case)


@pytest.mark.parametrize("v1_1", [False, True], ids=["v1.0", "v1.1"])
def test_a_folder_that_transformers_wrote_is_read_and_ours_is_read_by_torch(tmp_path: Path, v1_1: bool) -> None:
    import json

    import torch
    from safetensors.numpy import load_file, save_file

    from tests.oracle.generate import config_json, make_inputs, make_t5
    from v2t_jax.interop.hf_t5 import t5_config_from_huggingface, t5_from_huggingface, t5_to_huggingface

    sizes = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if v1_1 else {}
    model, other = make_t5(0, **sizes), make_t5(1, **sizes)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    config = t5_config_from_huggingface({**written, "tie_word_embeddings": not v1_1})
    assert config == t5_config_from_huggingface(config_json(model))
    params = t5_from_huggingface(load_file(tmp_path / "model.safetensors"), config)

    save_file(t5_to_huggingface(params), tmp_path / "ours.safetensors")
    state = {key: torch.from_numpy(value) for key, value in load_file(tmp_path / "ours.safetensors").items()}
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and all("embed_tokens" in key or key == "lm_head.weight" for key in missing)
    ids, mask, labels = make_inputs(0, config.vocab_size)
    with torch.no_grad():
        expected, got = (m(input_ids=ids, attention_mask=mask, labels=labels).logits for m in (model, other))
    np.testing.assert_array_equal(got, expected)
