"""How ours is compared with a case of torch outputs: from the committed files, or made live by tests/oracle.

Tolerances: layers 1e-5, logits 1e-4 (both relative to the largest value where that is above 1), decoded tokens
identical, scores 1e-4. All in float32.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.decode.beam import beam_search
from v2t_jax.decode.sample import greedy
from v2t_jax.decode.state import Special
from v2t_jax.interop.files import complete_config
from v2t_jax.interop.hf_encoders import encoder_config, encoder_from_huggingface
from v2t_jax.interop.hf_t5 import t5_config_from_huggingface, t5_from_huggingface
from v2t_jax.models import corrector, inverter, t5
from v2t_jax.models.embedder import NETWORKS, EmbedderConfig, EncoderConfig, Pooling, embed
from v2t_jax.models.layers import AttentionProjections, FeedForward, Params, RMSNorm, attend

Case = dict[str, np.ndarray]
GOLDEN = Path(__file__).parent.parent / "golden"
SPECIAL = Special(start=0, eos=1, pad=0)
LAYERS, LOGITS = 1e-5, 1e-4


def load(name: str) -> Case:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def state_dict(case: Case, prefix: str = "") -> dict[str, np.ndarray]:
    start = f"state/{prefix}"
    return {name.removeprefix(start): value for name, value in case.items() if name.startswith(start)}


def close(ours: Any, theirs: np.ndarray, tolerance: float, what: str) -> None:
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape, what
    largest = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest, err_msg=what)


def t5_of(case: Case, prefix: str = "") -> tuple[T5Config, Params]:
    config = t5_config_from_huggingface(json.loads(str(case["config"])))
    return config, jax.device_put(t5_from_huggingface(state_dict(case, prefix), config))


def check_t5_layers(case: Case) -> None:
    """Every layer of both first blocks, each fed what torch's was fed."""
    config, params = t5_of(case)
    c = config
    first = {stack: jax.tree.map(lambda p: p[0], params[stack]["layers"]) for stack in ("encoder", "decoder")}
    inputs = [name for name in case if name.startswith("layer/") and name.endswith("_in")]
    into = {name[6:-3]: jnp.asarray(case[name]) for name in inputs}
    encoded = jnp.asarray(case["encoded"])
    pad_bias = t5.mask_bias(jnp.asarray(case["mask"]))
    source, target = case["ids"].shape[1], case["labels"].shape[1]
    encoder_bias = t5.position_bias(c, params["encoder"]["relative_bias"], source, bidirectional=True) + pad_bias
    decoder_bias = t5.position_bias(c, params["decoder"]["relative_bias"], target, bidirectional=False)

    def attention(p: Params, x: jax.Array, keys_of: jax.Array, bias: jax.Array) -> jax.Array:
        heads = AttentionProjections(c.d_model, c.num_heads, c.d_kv).bind({"params": p})
        return heads.out(attend(heads.query(x), *heads.key_value(keys_of), bias))

    norm, feed_forward = RMSNorm(c.layer_norm_epsilon), FeedForward(c.d_ff, c.feed_forward, 0.0)
    ours = {
        "encoder_norm": norm.apply({"params": first["encoder"]["self_attention_norm"]}, into["encoder_norm"]),
        "encoder_attention": attention(
            first["encoder"]["self_attention"], *[into["encoder_attention"]] * 2, encoder_bias
        ),
        "encoder_feed_forward": feed_forward.apply(
            {"params": first["encoder"]["feed_forward"]}, into["encoder_feed_forward"], None
        ),
        "encoder_block": t5.EncoderLayer(c).apply(
            {"params": first["encoder"]}, into["encoder_block"], encoder_bias, None
        ),
        "decoder_attention": attention(
            first["decoder"]["self_attention"], *[into["decoder_attention"]] * 2, decoder_bias
        ),
        "cross_attention": attention(first["decoder"]["cross_attention"], into["cross_attention"], encoded, pad_bias),
        "decoder_block": t5.DecoderLayer(c).apply(
            {"params": first["decoder"]}, into["decoder_block"], encoded, decoder_bias, pad_bias, None
        ),
    }
    assert set(ours) == set(into)
    for name, value in ours.items():
        close(value, case[f"layer/{name}_out"], LAYERS, name)


def run_t5(case: Case) -> tuple[jax.Array, jax.Array]:
    """Our encoder's output [B, S, D] and logits [B, L, V]."""
    config, params = t5_of(case)

    @jax.jit
    def run(params: Params, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        encoded = t5.encode(config, params, t5.embed_tokens(config, params, ids), mask)
        hidden = t5.decode(config, params, t5.shift_right(labels), encoded, mask)
        return encoded, t5.logits(config, params, hidden)

    return run(params, case["ids"], case["mask"], case["labels"])


def check_t5_logits(case: Case) -> None:
    encoded, logits = run_t5(case)
    close(encoded, case["encoded"], LAYERS, "encoder output")
    close(logits, case["logits"], LOGITS, "logits")


def check_t5_decoding(case: Case) -> int:
    """Returns the number of tokens compared."""
    config, params = t5_of(case)

    def start(
        num_beams: int, length: int, params: Params, ids: jax.Array, mask: jax.Array
    ) -> tuple[Callable, t5.Cache]:
        encoded = t5.encode(config, params, t5.embed_tokens(config, params, ids), mask)
        return t5.start_decoding(config, params, encoded, mask, max_length=length, num_beams=num_beams)

    return check_decoding(case, start, params, case["ids"], case["mask"])


def check_decoding(case: Case, start: Callable[..., tuple[Callable, t5.Cache]], *arguments: Any) -> int:
    """All settings of the case; returns the number of tokens compared, padding behind the ends not counted.

    `start(num_beams, max_length, *arguments)` prepares decoding of the case's batch.
    """
    compared = 0
    for settings, ids, scores in decode_settings(case):
        # The arrays are arguments: as constants, the compiler would compute with them itself, slowly.
        run = jax.jit(functools.partial(decode, start, len(case["labels"]), settings))
        our_ids, our_scores = run(*arguments)
        np.testing.assert_array_equal(our_ids, ids, err_msg=str(settings))
        close(our_scores, scores, LOGITS, f"scores with {settings}")
        compared += int((ids != SPECIAL.pad).sum())
    assert compared > 0
    return compared


def decode_settings(case: Case) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    for name in case:
        if name.startswith("decode/") and name.endswith("/settings"):
            stem = name.removesuffix("settings")
            yield json.loads(str(case[name])), case[f"{stem}ids"], case[f"{stem}scores"]


def decode(start: Callable, batch_size: int, settings: dict[str, Any], *arguments: Any) -> tuple[jax.Array, jax.Array]:
    num_beams = settings.get("num_beams", 1)
    tokens_to_logits, cache = start(num_beams, settings["max_length"], *arguments)
    if "num_beams" in settings:
        decoded, scores = beam_search(
            tokens_to_logits, cache, batch_size=batch_size, num_return=num_beams, special=SPECIAL, **settings
        )
        return decoded.ids, scores
    decoded = greedy(tokens_to_logits, cache, batch_size=batch_size, special=SPECIAL, **settings)
    return decoded.ids, decoded.log_probs


_embed = jax.jit(embed, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def encode(config: EncoderConfig, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return NETWORKS[type(config)].encode(config, params, ids, mask)


def run_encoder(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Our hidden states [B, L, D], zero where padding is, and pooled vectors [B, E] of an encoder's case."""
    json_config, pooling = json.loads(str(case["config"])), cast(Pooling, str(case["pooling"]))
    config = encoder_config(complete_config(json_config))
    if pooling == "pooler":
        config = dataclasses.replace(config, pooler=True)  # type: ignore[call-arg]
    state = state_dict(case)
    params: Params = {"encoder": encoder_from_huggingface(state, json_config["model_type"], config)}
    dense = case.get("state/text_projection.weight")
    if dense is not None:
        params["dense"] = [{"kernel": dense.astype(np.float32).T}]
    width = case["pooled"].shape[1]
    whole = EmbedderConfig(config, pooling, ("identity",) * (dense is not None), normalize=False, width=width)
    kept = case["mask"][:, :, None] != 0  # what stands at padding is nobody's business
    hidden = np.where(kept, encode(config, params["encoder"], case["ids"], case["mask"]), 0)
    return hidden, np.asarray(_embed(whole, params, case["ids"], case["mask"]))


def check_encoder(case: Case) -> None:
    """Hidden states and pooled vectors of a text encoder; the vectors' cosine within 1e-5 of 1, too."""
    hidden, pooled = run_encoder(case)
    close(hidden, np.where(case["mask"][:, :, None] != 0, case["hidden"], 0), LAYERS, "hidden states")
    close(pooled, case["pooled"], LAYERS, "pooled")
    assert one_less_cosine(pooled, case["pooled"]) < 1e-5


def one_less_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest of 1 - cosine, over rows, in float64."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours.astype(np.float64), theirs.astype(np.float64)))
    return float(np.max(1 - (a * b).sum(axis=1)))


def model_config(case: Case) -> ModelConfig:
    t5_config = t5_config_from_huggingface(json.loads(str(case["config"])))
    settings, _, _ = next(decode_settings(case))
    return ModelConfig(
        t5=t5_config,
        embedding_width=case["e"].shape[1],
        num_pseudo_tokens=int(case["num_pseudo_tokens"]),
        max_length=settings["max_length"],
    )


def projection_of(case: Case, name: str) -> Params:
    state = {key: value.astype(np.float32) for key, value in state_dict(case, f"{name}.").items()}
    return {
        "hidden": {"kernel": state["0.weight"].T, "bias": state["0.bias"]},
        "output": {"kernel": state["3.weight"].T, "bias": state["3.bias"]},
    }


def inverter_of(case: Case) -> tuple[ModelConfig, Params]:
    _, t5_params = t5_of(case, "encoder_decoder.")
    return model_config(case), {"t5": t5_params, "projection": projection_of(case, "embedding_transform")}


def corrector_of(case: Case) -> tuple[ModelConfig, Params]:
    _, t5_params = t5_of(case, "encoder_decoder.")
    norm = state_dict(case, "layernorm.")
    return model_config(case), {
        "t5": t5_params,
        "projection_target": projection_of(case, "embedding_transform_1"),
        "projection_difference": projection_of(case, "embedding_transform_2"),
        "projection_hypothesis": projection_of(case, "embedding_transform_3"),
        "input_norm": {"scale": norm["weight"].astype(np.float32), "bias": norm["bias"].astype(np.float32)},
    }


def check_inverter(case: Case) -> None:
    _check_network(case, inverter, *inverter_of(case), [case["e"]])


def check_corrector(case: Case) -> None:
    inputs = [case["e"], case["hypothesis"], case["hypothesis_embedding"]]
    _check_network(case, corrector, *corrector_of(case), inputs)


def _check_network(case: Case, network: Any, config: ModelConfig, params: Params, inputs: list[np.ndarray]) -> None:
    arrays = [jnp.asarray(a) for a in inputs]
    assert jax.tree.structure(params) == jax.tree.structure(
        jax.eval_shape(functools.partial(network.init, config), jax.random.key(0))
    )
    encoded, _, offset = jax.jit(functools.partial(network.encode, config))(params, *arrays)
    assert offset is None
    close(encoded, case["encoded"], LAYERS, "encoder output")
    logits = jax.jit(functools.partial(network.logits, config))(params, *arrays, jnp.asarray(case["labels"]))
    close(logits, case["logits"], LOGITS, "logits")

    def start(num_beams: int, length: int, params: Params, *arrays: jax.Array) -> tuple[Callable, t5.Cache]:
        assert length == config.max_length
        return network.start_decoding(config, params, *arrays, num_beams=num_beams)

    check_decoding(case, start, params, *arrays)


def check_relative_buckets(case: Case) -> None:
    tried = 0
    for name, buckets in case.items():
        if name.startswith("buckets/"):
            num_buckets, max_distance, both_ways = map(int, name.split("/")[1:])
            ours = t5.relative_buckets(case["distances"], bool(both_ways), num_buckets, max_distance)
            np.testing.assert_array_equal(ours, buckets, err_msg=name)
            tried += 1
    assert tried > 0


def check_minilm(case: Case) -> None:
    """Real weights: cosine within 1e-5 of 1, values within 1e-4 of sentence-transformers'."""
    from v2t_jax.embedders.load import load_embedder

    embedder = load_embedder("all-MiniLM-L6-v2")
    ours = embedder.embed([str(text) for text in case["sentences"]])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, case["embeddings"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, rtol=0, atol=1e-5)
    np.testing.assert_allclose((ours * case["embeddings"]).sum(axis=1), 1.0, rtol=0, atol=1e-5)


# Text encoders, by their golden file; tests/oracle/encoders.py makes them.
ENCODERS = (
    *("bert", "distilbert", "roberta", "xlm_roberta", "mpnet", "dpr_question", "dpr_context", "t5_encoder"),
    *("t5_v1_1_encoder", "nomic_bert", "modernbert", "clip_text", "clip"),
    *("llama", "mistral", "qwen3", "gemma3", "gemma3_bidirectional"),
)
CHECKS: dict[str, tuple[Callable[[Case], Any], ...]] = {
    "t5_v1_0": (check_t5_layers, check_t5_logits, check_t5_decoding),
    "t5_v1_1": (check_t5_layers, check_t5_logits, check_t5_decoding),
    **{name: (check_encoder,) for name in ENCODERS},
    "inverter": (check_inverter,),
    "corrector": (check_corrector,),
    "relative_buckets": (check_relative_buckets,),
    "minilm": (check_minilm,),
}
