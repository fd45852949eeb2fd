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
from v2t_jax.decode.state import PAD, Cache
from v2t_jax.interop.files import complete_config
from v2t_jax.interop.hf_encoders import encoder_config, encoder_from_huggingface
from v2t_jax.interop.hf_t5 import t5_config_from_huggingface, t5_from_huggingface
from v2t_jax.models.corrector import Corrector
from v2t_jax.models.embedder import EmbedderConfig, Pooling, embed, unstacked_on_cpu
from v2t_jax.models.encoders import EncoderConfig, encoder_network
from v2t_jax.models.inverter import EmbeddingToText, Inverter
from v2t_jax.models.layers import Params, mask_bias, relative_buckets
from v2t_jax.models.t5 import T5, T5Layer, T5Stack, unstack_decoder

Case = dict[str, np.ndarray]
GOLDEN = Path(__file__).parent.parent / "golden"
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
    pad_bias = mask_bias(jnp.asarray(case["mask"]))

    def bias_of(stack: str, length: int) -> jax.Array:
        return T5Stack(c, stack == "decoder").apply({"params": params[stack]}, length, method="position_bias")

    def part(stack: str, name: str, *inputs: jax.Array) -> jax.Array:
        """One module of the stack's first layer."""
        layer = T5Layer(c, stack == "decoder")
        return layer.apply({"params": first[stack]}, method=lambda layer: getattr(layer, name)(*inputs))

    def block(stack: str, *inputs: jax.Array) -> jax.Array:
        return T5Layer(c, stack == "decoder").apply({"params": first[stack]}, *inputs)[0]

    encoder_bias = bias_of("encoder", case["ids"].shape[1]) + pad_bias
    decoder_bias = bias_of("decoder", case["labels"].shape[1])
    x, y = into["encoder_attention"], into["decoder_attention"]
    ours = {
        "encoder_norm": part("encoder", "self_attention_norm", into["encoder_norm"]),
        "encoder_attention": part("encoder", "self_attention", x, x, encoder_bias),
        "encoder_feed_forward": part("encoder", "feed_forward", into["encoder_feed_forward"]),
        "encoder_block": block("encoder", into["encoder_block"], encoder_bias),
        "decoder_attention": part("decoder", "self_attention", y, y, decoder_bias),
        "cross_attention": part("decoder", "cross_attention", into["cross_attention"], encoded, pad_bias),
        "decoder_block": block("decoder", into["decoder_block"], decoder_bias, encoded, pad_bias),
    }
    assert set(ours) == set(into)
    for name, value in ours.items():
        close(value, case[f"layer/{name}_out"], LAYERS, name)


def run_t5(case: Case) -> tuple[jax.Array, jax.Array]:
    """Our encoder's output [B, S, D] and logits [B, L, V]."""
    config, params = t5_of(case)

    @jax.jit
    def run(params: Params, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return encode_t5(config, params, ids, mask), T5(config).apply({"params": params}, ids, mask, labels)

    return run(params, case["ids"], case["mask"], case["labels"])


def encode_t5(config: T5Config, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Ids and mask [B, S] -> encoder output [B, S, D]."""
    return T5(config).apply({"params": params}, method=lambda t5: t5.encode(t5.embed_tokens(ids), mask))


def check_t5_logits(case: Case) -> None:
    encoded, logits = run_t5(case)
    close(encoded, case["encoded"], LAYERS, "encoder output")
    close(logits, case["logits"], LOGITS, "logits")


def check_t5_decoding(case: Case) -> int:
    """Returns the number of tokens compared."""
    config, params = t5_of(case)

    def start(num_beams: int, length: int, params: Params, ids: jax.Array, mask: jax.Array) -> tuple[Callable, Cache]:
        encoded = encode_t5(config, params, ids, mask)
        return T5(config).start_decoding(params, encoded, mask, max_length=length, num_beams=num_beams)

    return check_decoding(case, start, unstack_decoder(params), case["ids"], case["mask"])  # as inference keeps them


def check_decoding(case: Case, start: Callable[..., tuple[Callable, Cache]], *arguments: Any) -> int:
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
        compared += int((ids != PAD).sum())
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
        decoded, scores = beam_search(tokens_to_logits, cache, batch_size=batch_size, num_return=num_beams, **settings)
        return decoded.ids, scores
    decoded = greedy(tokens_to_logits, cache, batch_size=batch_size, **settings)
    return decoded.ids, decoded.log_probs


_embed = jax.jit(embed, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def encode(config: EncoderConfig, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return encoder_network(config).apply({"params": params}, ids, mask)


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
    return hidden, np.asarray(_embed(whole, unstacked_on_cpu(params), case["ids"], case["mask"]))  # scanned, and not


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
    config, params = inverter_of(case)
    _check_network(case, Inverter(config), params, [case["e"]])


def check_corrector(case: Case) -> None:
    inputs = [case["e"], case["hypothesis"], case["hypothesis_embedding"]]
    config, params = corrector_of(case)
    _check_network(case, Corrector(config), params, inputs)


def _check_network(case: Case, network: EmbeddingToText, params: Params, inputs: list[np.ndarray]) -> None:
    arrays = [jnp.asarray(a) for a in inputs]
    assert jax.tree.structure(params) == jax.tree.structure(network.abstract_params())
    run = jax.jit(network.apply, static_argnames="method")
    encoded, _, offset = run({"params": params}, *arrays, method="encode")
    assert offset is None
    close(encoded, case["encoded"], LAYERS, "encoder output")
    logits = run({"params": params}, *arrays, jnp.asarray(case["labels"]))
    close(logits, case["logits"], LOGITS, "logits")

    def start(num_beams: int, length: int, params: Params, *arrays: jax.Array) -> tuple[Callable, Cache]:
        assert length == network.config.max_length
        return network.start_decoding(params, *arrays, num_beams=num_beams)

    check_decoding(case, start, params, *arrays)


def check_relative_buckets(case: Case) -> None:
    tried = 0
    for name, buckets in case.items():
        if name.startswith("buckets/"):
            num_buckets, max_distance, both_ways = map(int, name.split("/")[1:])
            ours = relative_buckets(case["distances"], bool(both_ways), num_buckets, max_distance)
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
