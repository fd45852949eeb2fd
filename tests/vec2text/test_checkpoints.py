"""The original's checkpoints: read, inverted with, written back, and refused, from pairs that the original trained."""

import itertools
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import torch_bytes, upstream_pair
from tests.helpers.command_line import status_of
from tests.helpers.equivalence import Case, check_t5_decoding
from tests.helpers.equivalence import load as load_golden
from tests.helpers.upstream_pair import NAMES, embedder_of, read_pair, record_of
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.inversion.pipeline import InversionPipeline, load
from v2t_jax.inversion.vectors import warn_of_foreign_vectors
from v2t_jax.models.corrector import Corrector
from v2t_jax.vec2text import convert
from v2t_jax.vec2text.checkpoints import check_embedder, read_base
from v2t_jax.vec2text.convert import from_vec2text, to_vec2text
from v2t_jax.vec2text.embedders import check_computation

GTR = "vec2text_gtr"  # of a T5 embedder; some of its steps turn on how equal cosines are ranked
WRAPPED = "embedder.0.auto_model."
SHARED = "encoder_decoder.shared.weight"


@pytest.fixture(scope="module")
def goldens() -> dict[str, Case]:
    return {name: load_golden(name) for name in NAMES}


@pytest.fixture(scope="module")
def folders(goldens: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pairs")
    return {name: upstream_pair.write_pair(case, root / name) for name, case in goldens.items()}


@pytest.fixture(scope="module")
def converted(folders: dict[str, Path]) -> Path:
    folder = folders[GTR]
    from_vec2text(*convert_arguments(folder, folder / "model"))
    return folder / "model"


def convert_arguments(folder: Path, out: Path) -> tuple[Path, str, str, str, str]:
    return (
        out,
        str(folder / "inverter"),
        str(folder / "corrector"),
        str(folder / "t5-base"),
        str(embedder_of(folder)),
    )


@pytest.fixture(scope="module")
def model(converted: Path) -> InversionPipeline:
    return load(str(converted))


@pytest.fixture
def pair(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(folders[NAMES[0]], tmp_path / "pair", ignore=shutil.ignore_patterns("model"))


@pytest.mark.parametrize("name", ["vec2text_a", GTR])
def test_logits_are_the_originals(name: str, goldens: dict[str, Case], folders: dict[str, Path]) -> None:
    upstream_pair.check_logits(read_pair(folders[name]), record_of(goldens[name]))


@pytest.mark.parametrize(("num_steps", "width"), [(3, 1), (3, 4)])
def test_every_step_is_the_originals(
    num_steps: int, width: int, goldens: dict[str, Case], model: InversionPipeline
) -> None:
    """Here of one pair; 0 steps below, as a command; `make oracle` compares all searches of a fresh pair."""
    upstream_pair.check_search(model, record_of(goldens[GTR]), num_steps, width)


def test_beam_search_of_the_transformers_that_it_runs_on() -> None:
    """Items stop by another rule there; among these, one shows it."""
    case = load_golden(upstream_pair.BEAMS)
    check_t5_decoding(case)
    settings = json.loads(str(case["decode/0/settings"]))
    assert settings.pop("stop_rule") == "any"
    with pytest.raises(AssertionError, match="Mismatched elements"):
        check_t5_decoding(case | {"decode/0/settings": np.array(json.dumps(settings))})


def test_the_commands(
    folders: dict[str, Path],
    goldens: dict[str, Case],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There, inverting, and back: as the README has it."""
    folder, record = folders["vec2text_b"], record_of(goldens["vec2text_b"])
    np.save(tmp_path / "e.npy", record["e"])
    out, _, *sources = convert_arguments(folder, tmp_path / "out")
    options = zip(
        ("--inverter", "--corrector", "--t5", "--embedder"), [str(folder / "inverter"), *sources], strict=True
    )
    assert status_of("convert", "--from", "vec2text", *itertools.chain(*options), str(out)) == 0
    assert sorted(file.name for file in out.iterdir()) == [
        *("README.md", "config.json", "corrector.safetensors", "inverter.safetensors"),
        *("pieces.safetensors", "tokenizer.json"),
    ]
    capsys.readouterr()
    inverting = ("--mode", "upstream", "--num-steps", "0", "--sequence-beam-width", "1", "--json")
    assert status_of("invert", "--model", str(out), "--embeddings", str(tmp_path / "e.npy"), *inverting) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["text"] for one in found] == record["search/0/0/texts"].tolist()
    assert status_of("convert", "--to", "vec2text", str(out), str(tmp_path / "back")) == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["corrector", "inverter"]


def test_without_corrector_what_is_advised_and_printed_works(
    folders: dict[str, Path],
    goldens: dict[str, Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A checkpoint as --model, the command that this advises, and the one that converting prints."""
    folder = folders["vec2text_b"]
    np.save(tmp_path / "vectors.npy", record_of(goldens["vec2text_b"])["e"])
    monkeypatch.chdir(tmp_path)
    for stage in ("corrector", "inverter"):
        assert status_of("invert", "--model", str(folder / stage), "--embeddings", "vectors.npy") == 2
        said = capsys.readouterr().err.splitlines()[-1]
        (advised,) = re.findall("checkpoint of the original vec2text; convert it first: v2t (.*)[.]$", said)
        assert f"--{stage} {folder / stage}" in advised
    without = advised.replace("--corrector DIR OUT", "'a model'")
    assert (
        status_of(*shlex.split(without), "--t5", str(folder / "t5-base"), "--embedder", str(embedder_of(folder))) == 0
    )
    (printed,) = re.findall("try: v2t (.*)", capsys.readouterr().out)
    assert status_of(*shlex.split(printed)) == 0
    shown = capsys.readouterr()
    assert "step  0" in shown.out and "has no corrector, so it takes 0 correction steps" in shown.err


def test_there_and_back_changes_nothing(converted: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    name = GTR
    back = tmp_path / "back"
    to_vec2text(str(converted), back)
    for stage in ("inverter", "corrector"):
        theirs, ours = (load_file(root / stage / "model.safetensors") for root in (folders[name], back))
        # The tied head is written out; the embedder's weights aren't.
        assert set(ours) - set(theirs) == {"encoder_decoder.lm_head.weight"}
        assert all(key.startswith("embedder.") for key in set(theirs) - set(ours))
        np.testing.assert_array_equal(ours.pop("encoder_decoder.lm_head.weight"), theirs[SHARED])
        for key, value in ours.items():
            np.testing.assert_array_equal(value, theirs[key], err_msg=key)
        settings = [json.loads((root / stage / "config.json").read_text()) for root in (folders[name], back)]
        assert settings[0].items() <= settings[1].items()
    shutil.copytree(folders[name] / "t5-base", back / "t5-base")
    again, first = read_pair(back), read_pair(folders[name])
    assert again.config == first.config
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def edit(folder: Path, change: Callable[[Case], Any]) -> None:
    """Changes the tensors of a checkpoint."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; None takes one out."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_old_key_names(pair: Path) -> None:
    def rename(state: Case, old: str, new: str) -> None:
        for key in [key for key in state if key.startswith(old)]:
            state[key.replace(old, new)] = state.pop(key)

    def oldest(state: Case) -> None:
        rename(state, "embedding_transform_1.", "embedding_transform.")
        for key in [key for key in state if key.startswith(("embedding_transform_", "layernorm."))]:
            del state[key]

    expected = read_pair(pair)
    edit(pair / "inverter", lambda state: rename(state, "embedding_transform.3.", "embedding_transform.2."))
    edit(pair / "corrector", oldest)
    found = read_pair(pair)
    jax.tree.map(np.testing.assert_array_equal, found.params["inverter"], expected.params["inverter"])
    corrector = found.params["corrector"]
    for name in ("target", "difference", "hypothesis"):
        theirs = expected.params["corrector"]["projection_target"]
        jax.tree.map(np.testing.assert_array_equal, corrector[f"projection_{name}"], theirs)
    assert "input_norm" not in corrector and not found.config.input_norm


def test_an_old_corrector_without_layer_normalization_runs_and_is_kept(
    pair: Path, tmp_path: Path, goldens: dict[str, Case]
) -> None:
    edit(pair / "corrector", lambda state: [state.pop(f"layernorm.{name}") for name in ("weight", "bias")])
    from_vec2text(*convert_arguments(pair, tmp_path / "out"))
    model = load(str(tmp_path / "out"))
    record = record_of(goldens[NAMES[0]])
    inputs = [record[name] for name in ("e", "hypothesis", "e_hat", "labels")]
    logits = jax.jit(Corrector(model.config).apply)({"params": model.params["corrector"]}, *inputs)
    assert np.abs(logits - record["corrector_logits"]).max() > 0.01  # it isn't applied, with whatever weights
    with pytest.raises(InputError, match="doesn't normalize its input, and the original's always does"):
        to_vec2text(str(tmp_path / "out"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_copies_of_the_tied_embedding(pair: Path) -> None:
    """A missing head is repaired (all these files lack it); one that is there must be the copy that it should be."""
    head = "encoder_decoder.lm_head.weight"
    edit(pair / "corrector", lambda state: state.update({head: state[SHARED]}))
    read_pair(pair)
    edit(pair / "corrector", lambda state: state.update({head: state[SHARED] + 1}))
    with pytest.raises(InputError, match="'lm_head.weight' differs from 'shared.weight'"):
        read_pair(pair)


def test_an_inverter_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    out, inverter, _, t5, embedder = convert_arguments(folders["vec2text_b"], tmp_path / "out")
    from_vec2text(out, inverter, None, t5, embedder)
    model = load(str(out))
    assert not model.has_corrector
    to_vec2text(str(out), tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["inverter"]


QUERY = "encoder_decoder.encoder.block.1.layer.0.SelfAttention.q.weight"
HIDDEN = "embedding_transform.0.weight"


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("inverter", lambda s: s.pop(QUERY), "lack 'encoder.block.1.layer.0.SelfAttention.q.weight'"),
        ("inverter", lambda s: s.update({QUERY: s[QUERY].T}), r"SelfAttention.q.weight' has shape \(32, 24\)"),
        ("inverter", lambda s: s.update(extra=s[HIDDEN]), "inverter weights hold the unknown key 'extra'"),
        ("inverter", lambda s: s.pop(HIDDEN), "inverter weights lack 'embedding_transform.0.weight'"),
        (
            "inverter",
            lambda s: s.pop("embedding_transform.3.bias"),
            "inverter weights lack 'embedding_transform.3.bias'",
        ),
        (
            "inverter",
            lambda s: s.update({HIDDEN: s[HIDDEN][:, :5]}),
            r"0.weight' has shape \(768, 5\); its config implies \(768, 768\)",
        ),
        ("corrector", lambda s: s.pop("layernorm.bias"), "corrector weights lack 'layernorm.bias'"),
        (
            "corrector",
            lambda s: s.pop("embedding_transform_2.0.bias"),
            "corrector weights lack 'embedding_transform_2.0.bias'",
        ),
        (
            "corrector",
            lambda s: [s.update({k: v[:5, :5]}) for k, v in s.items() if k.endswith(".0.weight")],
            "embedding_transform_2.0.weight' has shape .5, 5.; its config implies .768, 768.",
        ),
        (
            "corrector",
            lambda s: [s.pop(key) for key in list(s) if key != "layernorm.bias"],
            r"The T5 weights lack 'decoder\.",
        ),
        ("inverter", lambda s: s.pop("embedding_transform.0.bias"), "inverter lacks 'embedding_transform.0.bias'"),
    ],
)
def test_tensors_that_do_not_fit(pair: Path, stage: str, change: Callable[[Case], Any], message: str) -> None:
    edit(pair / stage, change)
    with pytest.raises(InputError, match=message):
        read_pair(pair)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("inverter", {"use_lora": True}, "config.json has use_lora True, which isn't supported; only False is"),
        ("inverter", {"embeddings_from_layer_n": 3}, "embeddings_from_layer_n 3"),
        ("inverter", {"embedder_fake_with_zeros": True}, "embedder_fake_with_zeros True"),
        ("inverter", {"embedding_zero_except_topk": 5}, "embedding_zero_except_topk 5"),
        ("corrector", {"corrector_ignore_hypothesis_embedding": True}, "corrector_ignore_hypothesis_embedding True"),
        ("inverter", {"architectures": ["InversionModelDecoderOnly"]}, "has architectures .*DecoderOnly.*, not"),
        ("corrector", {"architectures": ["InversionModel"]}, "give a folder of vec2text's corrector"),
        ("inverter", {"max_seq_length": None}, "inverter/config.json isn't usable .* field `max_seq_length`"),
        ("corrector", {"num_repeat_tokens": None}, "corrector/config.json isn't usable .* field `num_repeat_tokens`"),
        ("inverter", {"embedder_model_name": None}, "missing required field `embedder_model_name`"),
        ("inverter", {"num_repeat_tokens": "16"}, r"Expected `int`, got `str` - at `\$.num_repeat_tokens`"),
        ("inverter", {"architectures": 5}, r"has architectures 5, not \['InversionModel'\]"),
        ("inverter", {"architectures": {"a": 1}}, "has architectures {'a': 1}, not"),
        ("corrector", {"architectures": "CorrectorEncoderModel"}, "has architectures 'CorrectorEncoderModel', not"),
        (
            "inverter",
            {"embedder_model_name": ["gtr_base"]},
            r"Expected `str`, got `array` - at `\$.embedder_model_name`",
        ),
        ("inverter", {"model_name_or_path": 5}, r"Expected `str`, got `int` - at `\$.model_name_or_path`"),
        ("inverter", {"embedder_model_api": 5}, r"Expected `str \| null`, got `int` - at `\$.embedder_model_api`"),
        (
            "corrector",
            {"embedder_model_name": "gtr_base"},
            "embedder_model_name is 'gtr_base' and the inverter's 'sent",
        ),
        ("corrector", {"max_seq_length": 99}, "The corrector's max_seq_length is 99 and the inverter's 16"),
        ("corrector", {"num_repeat_tokens": 4}, "The corrector's num_repeat_tokens is 4 and the inverter's 3"),
    ],
)
def test_settings_that_do_not_fit(pair: Path, stage: str, changes: dict[str, Any], message: str) -> None:
    edit_json(pair / stage / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        read_pair(pair)


def test_settings_of_training_alone_are_no_matter(pair: Path) -> None:
    changes = {"embedder_gaussian_noise_level": 0.1, "encoder_dropout_disabled": True, "embedder_no_grad": False}
    edit_json(pair / "inverter" / "config.json", **changes)
    read_pair(pair)


def test_a_pair_of_other_sizes(folders: dict[str, Path], pair: Path) -> None:
    shutil.rmtree(pair / "t5-base")
    shutil.copytree(folders["vec2text_b"] / "t5-base", pair / "t5-base")
    with pytest.raises(InputError, match="' has shape .*; its config implies .*: give the right one, as t5=DIR"):
        read_pair(pair)


@pytest.mark.parametrize("content", [b"{", b"[1]"])
def test_damaged_json(pair: Path, content: bytes) -> None:
    (pair / "corrector" / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="corrector/config.json (is not readable JSON|holds no JSON object)"):
        read_pair(pair)


def test_missing_files(pair: Path) -> None:
    (pair / "inverter" / "config.json").unlink()
    with pytest.raises(InputError, match="config.json is missing: .* is not a checkpoint of vec2text's inverter"):
        read_pair(pair)
    (pair / "corrector" / "model.safetensors").unlink()
    shutil.copy(pair / "corrector" / "config.json", pair / "inverter")
    edit_json(pair / "inverter" / "config.json", architectures=["InversionModel"])
    with pytest.raises(InputError, match="corrector holds no weights: neither model.safetensors nor pytorch_model.bin"):
        read_pair(pair)
    (pair / "t5-base" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        read_base(str(pair / "t5-base"))
    with pytest.raises(InputError, match="no-such-t5 is not in the local cache and the hub can't be reached"):
        read_base("no-such-t5")


def test_a_tokenizer_of_another_model(pair: Path) -> None:
    shutil.copy(embedder_of(pair) / "tokenizer.json", pair / "t5-base" / "tokenizer.json")
    with pytest.raises(InputError, match="tokenizer is not that of its T5: <pad> and </s> must be"):
        read_base(str(pair / "t5-base"))


def test_pickles_are_read_without_torch(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_pair(pair)
    for stage in ("inverter", "corrector"):
        weights = pair / stage / "model.safetensors"
        torch_bytes.save(pair / stage / "pytorch_model.bin", load_file(weights))
        weights.unlink()
    monkeypatch.setitem(sys.modules, "torch", None)
    found = read_pair(pair)
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_another_embedder(pair: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    name = embedder_of(pair)
    check_embedder(pair / "inverter", name, "the name")
    edit(name, lambda s: s["encoder.layer.0.output.dense.bias"].__iadd__(1))
    arguments = convert_arguments(pair, tmp_path / "out")
    with pytest.raises(InputError, match="another embedder than .*'0.auto_model.encoder.layer.0.output.dense.bias'"):
        from_vec2text(*arguments)
    with pytest.raises(InputError, match="saved with an embedder that has '.*', which the name lacks"):
        check_embedder(pair / "inverter", embedder_of(folders[GTR]), "the name")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_an_embedder_inside_the_inverter_is_compared_whatever_its_kind(folders: dict[str, Path]) -> None:
    folder = folders[GTR]
    check_embedder(folder / "inverter", embedder_of(folder), "gtr")


def test_an_embedder_folder_that_holds_a_whole_t5(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its decoder's blocks have the encoder's names behind their prefix, and other values."""
    folder = shutil.copytree(folders[GTR], tmp_path / "pair")
    encoder = load_embedder(f"mean@{embedder_of(folder)}").params

    def whole(state: dict[str, np.ndarray]) -> None:
        state |= {key.replace("encoder", "decoder", 1): value + 1 for key, value in state.items() if "encoder" in key}
        state |= {f"{stack}.embed_tokens.weight": state["shared.weight"] for stack in ("encoder", "decoder")}

    edit(embedder_of(folder), whole)
    check_embedder(folder / "inverter", embedder_of(folder), "gtr")
    jax.tree.map(np.testing.assert_array_equal, load_embedder(f"mean@{embedder_of(folder)}").params, encoder)
    edit(embedder_of(folder), lambda s: s["encoder.block.0.layer.0.SelfAttention.q.weight"].__iadd__(1))
    with pytest.raises(InputError, match="another embedder than gtr: 'block.0.* its 'encoder.block.0"):
        check_embedder(folder / "inverter", embedder_of(folder), "gtr")


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_an_inverter_saved_in_half_precision(pair: Path, stored: str) -> None:
    noise = np.random.default_rng(0).normal(size=32).astype(np.float32)
    bias = "encoder.layer.0.output.dense.bias"
    edit(embedder_of(pair), lambda s: s.update({bias: noise[: len(s[bias])]}))
    halved = noise.astype(jnp.dtype(stored))
    edit(pair / "inverter", lambda s: s.update({f"{WRAPPED}{bias}": halved[: len(s[f"{WRAPPED}{bias}"])]}))
    check_embedder(pair / "inverter", embedder_of(pair), "the name")
    edit(embedder_of(pair), lambda s: s[bias].__imul__(1.01))
    with pytest.raises(InputError, match="another embedder than the name"):
        check_embedder(pair / "inverter", embedder_of(pair), "the name")


def test_an_embedder_that_lacks_something(pair: Path) -> None:
    extras = ("embedder.0.auto_model.embeddings.position_ids", "embedder.2.linear.weight")
    edit(pair / "inverter", lambda s: s.update(dict.fromkeys(extras, np.zeros((1, 8), np.float32))))
    check_embedder(pair / "inverter", embedder_of(pair), "the name")
    edit(embedder_of(pair), lambda s: [s.pop(f"pooler.dense.{part}") for part in ("weight", "bias")])
    with pytest.raises(InputError, match="has '0.auto_model.pooler.dense.bias', which the name lacks"):
        check_embedder(pair / "inverter", embedder_of(pair), "the name")


def test_old_names_of_layer_normalization(pair: Path) -> None:
    def rename(state: Case) -> None:
        for new, old in (("weight", "gamma"), ("bias", "beta")):
            for key in [key for key in state if key.endswith(f"LayerNorm.{new}")]:
                state[key.removesuffix(new) + old] = state.pop(key)

    edit(embedder_of(pair), rename)
    check_embedder(pair / "inverter", embedder_of(pair), "the name")


def test_what_is_behind_the_encoder_is_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    """The encoders of both GTRs have the same weights."""
    plain = embedder_of(folders[GTR])
    pipeline = shutil.copytree(plain, tmp_path / "gtr_st")
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (pipeline / "modules.json").write_text(json.dumps(modules))
    for path in list(kinds)[1:]:
        (pipeline / path).mkdir()
    (pipeline / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    layer = {"in_features": 768, "out_features": 768, "bias": False, "activation_function": "torch.nn.Identity"}
    (pipeline / "2_Dense" / "config.json").write_text(json.dumps(layer))
    save_file({"linear.weight": np.eye(768, dtype=np.float32)}, pipeline / "2_Dense" / "model.safetensors")
    arguments = convert_arguments(folders[GTR], tmp_path / "out")[:-1]
    meant = "for gtr_base .pooling mean, dense layers 0, not normalized., but .* is pooling"
    prompts = pipeline / "config_sentence_transformers.json"
    prompts.write_text(json.dumps({"prompts": {"document": "a "}}))  # which the original leaves out
    with pytest.raises(InputError, match=f"{meant} mean, dense layers 1, normalized: give .* gtr-base@DIR"):
        from_vec2text(*arguments, str(pipeline))
    prompts.unlink()
    with pytest.raises(InputError, match=f"{meant} max, dense layers 0, not normalized: "):
        from_vec2text(*arguments, f"max@{plain}")
    with pytest.raises(InputError, match=f"{meant} mean, dense layers 0, not normalized, prefix 'query: ': "):
        from_vec2text(*arguments, load_embedder(str(plain), prefix="query: "))
    theirs = load_embedder(str(pipeline))
    check_computation("gtr_base_st", theirs)
    check_computation("gtr_base", load_embedder(f"gtr-base@{pipeline}"))
    with pytest.raises(InputError, match="for gtr_base_st .* give the embedder as gtr-base-st@DIR"):
        check_computation("gtr_base_st", load_embedder(f"gtr-base@{pipeline}"))
    with pytest.raises(InputError, match="with its modules.json, which mean@.* ignores"):
        check_computation("sentence-transformers/gtr-t5-xl", load_embedder(f"mean@{pipeline}"))
    check_computation("sentence-transformers/gtr-t5-xl", theirs)  # noted, not refused


@pytest.mark.filterwarnings("error")
def test_vectors_of_the_wrong_normalization_are_noticed(model: InversionPipeline, goldens: dict[str, Case]) -> None:
    e = record_of(goldens[GTR])["e"]
    warn_of_foreign_vectors(model, e)
    with pytest.warns(UserWarning, match="7 of 7 have lengths of"):
        warn_of_foreign_vectors(model, e / np.linalg.norm(e, axis=1, keepdims=True))


def test_an_embedder_of_another_width(pair: Path, tmp_path: Path) -> None:
    from tests.helpers.tiny_run import make_embedder

    edit(pair / "inverter", lambda s: [s.pop(key) for key in list(s) if key.startswith("embedder.")])  # as of an API
    out, inverter, corrector, t5, _ = convert_arguments(pair, tmp_path / "out")
    with pytest.raises(InputError, match="of width 768, but those of .* are 16 wide"):
        from_vec2text(out, inverter, corrector, t5, str(make_embedder(tmp_path / "embedder")))
    assert not out.exists()


def test_nothing_is_overwritten(folders: dict[str, Path], converted: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists already; give a new or an empty folder"):
        from_vec2text(*convert_arguments(folders["vec2text_b"], tmp_path))
    with pytest.raises(InputError, match="exists already"):
        to_vec2text(str(converted), tmp_path)
    with pytest.raises(InputError, match="thesis.txt is no folder or can't be written to"):
        from_vec2text(*convert_arguments(folders["vec2text_b"], tmp_path / "thesis.txt" / "out"))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_embedder_is_by_default_the_one_that_the_inverter_names(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders[GTR]
    names = {"inverter": "inverter", "corrector": "corrector", "t5": "t5-base"}
    options = itertools.chain(*((f"--{option}", str(folder / name)) for option, name in names.items()))
    command = ("convert", "--from", "vec2text", *options, str(tmp_path / "out"))
    assert status_of(*command) == 2
    assert "The embedder gtr-base is not installed: give its folder as gtr-base@FOLDER" in capsys.readouterr().err
    here = {"gtr_base": f"gtr-base@{embedder_of(folder)}"}
    monkeypatch.setattr(convert, "default_name", here.__getitem__)
    assert status_of(*command) == 0
    assert load(str(tmp_path / "out")).embedder.name.startswith("gtr-base@")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either --from vec2text or --to vec2text"),
        (("--from", "vec2text", "--to", "vec2text", "OUT"), "either --from vec2text or --to vec2text"),
        (("--from", "gpt", "OUT"), "vec2text"),
        (("--from", "vec2text", "--inverter", "I", "--t5", "T", "--embedder", "E"), "pass one path"),
        (("--from", "vec2text", "--t5", "T", "--embedder", "E", "OUT"), "pass --inverter"),
        (("--to", "vec2text", "MODEL"), "pass two paths"),
        (("--to", "vec2text", "--t5", "T", "MODEL", "OUT"), "belong to --from"),
        (("--to", "vec2text", "--embedder", "E", "MODEL", "OUT"), "belong to --from"),
        (("--to", "vec2text", "minilm-wordnet", "OUT"), "minilm-wordnet was not converted from vec2text"),
        (("--to", "vec2text", "no-such-model", "OUT"), "There is no model 'no-such-model'"),
        (
            ("--from", "vec2text", "--inverter", "I", "--t5", "T", "--embedder", "E", "OUT"),
            "I is not in the local cache",
        ),
    ],
)
def test_command_lines_that_make_no_sense(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of("convert", *arguments) == 2
    said = capsys.readouterr().err
    if "gpt" not in arguments:  # a choice, which the command-line library refuses in its own words
        said = said.splitlines()[-1]
        assert said.startswith("v2t: ")
    assert message in said
    assert not list(tmp_path.iterdir())
