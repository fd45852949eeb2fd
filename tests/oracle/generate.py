"""Makes the golden arrays: tiny random networks in torch and transformers, their inputs and their outputs.

    python -m tests.oracle.generate --write        (in the environment of `make oracle`)

A case is a flat dict of arrays, complete in itself: "config" (JSON), "state/NAME" (weights, float16 so that the files
are small; they are exact in float32, in which ours computes, and in torch's float64), inputs, outputs, and decoding
settings with their results. `tests/helpers/equivalence.py` says how ours is compared with it.
"""

import argparse
import functools
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from tests.helpers.equivalence import ENCODERS, GOLDEN, Case
from tests.oracle.encoders import encoder_case, make_inputs, randomize, to_numpy

LENGTH = 10  # generated tokens at most
Inputs = dict[str, torch.Tensor]
SETTINGS: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3})
SENTENCES = (
    "a",
    "The cat sat on the mat.",
    "THE CAT SAT ON THE MAT",
    "an inability to sleep; a chronic sleeplessness",
    "In 1969, 3.5 million people (about 7%) watched -- or so it was said -- the landing on the Moon.",
    "Große Straße, naïve café: coöperation costs 12 €.",
    "東京は日本の首都です",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "one two three four five six seven eight nine ten " * 8,
    "a text that is longer than the embedder reads is cut at its limit of tokens, " * 30,
)


def make_t5(seed: int, **sizes: Any) -> T5ForConditionalGeneration:
    config = T5Config(
        **{
            "vocab_size": 60,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 3,  # heads * d_kv is not d_model
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "decoder_start_token_id": 0,
            **sizes,
        }
    )
    model = T5ForConditionalGeneration(config)
    if not config.scale_decoder_outputs:  # v1.1. transformers 5 ties the head when it builds a model, all the same.
        model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    randomize(model, seed)
    return model


def state_of(model: nn.Module) -> Case:
    """A tensor that has several names is kept under the first."""
    seen: set[int] = set()
    state = {}
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: "shared" not in item[0]):
        if tensor.data_ptr() not in seen and tensor.is_floating_point():
            seen.add(tensor.data_ptr())
            state[f"state/{name}"] = tensor.numpy().astype(np.float16)
    return state


def config_json(model: T5ForConditionalGeneration) -> dict[str, Any]:
    """The config.json of a published model; transformers 5 forgets that a head is not tied."""
    return {**model.config.to_dict(), "tie_word_embeddings": model.config.scale_decoder_outputs}


def decode_results(model: T5ForConditionalGeneration, inputs: Inputs, settings: Any) -> Case:
    """What `generate` makes of `inputs` under each of our settings, in our conventions."""
    case: Case = {}
    for i, chosen in enumerate(settings):
        num_beams = chosen.get("num_beams", 1)
        with torch.no_grad():
            out = model.generate(
                **inputs,
                num_beams=num_beams,
                num_return_sequences=num_beams,
                max_new_tokens=LENGTH,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
            )
        ids = out.sequences[:, 1:].numpy().astype(np.int32)
        ids = np.pad(ids, ((0, 0), (0, LENGTH - ids.shape[1])))
        ended_before = np.cumsum(ids == 1, axis=1) - (ids == 1) > 0
        ids[ended_before] = 0
        if "num_beams" in chosen:
            ids = ids.reshape(-1, chosen["num_beams"], LENGTH)
            scores = out.sequences_scores.numpy().reshape(ids.shape[:2])
        else:
            log_p = torch.stack(out.logits, dim=1).log_softmax(-1).numpy()
            picked = np.take_along_axis(log_p, ids[:, : log_p.shape[1], None], axis=2)[:, :, 0]
            scores = np.where(ended_before[:, : log_p.shape[1]], 0.0, picked).sum(axis=1)
        case[f"decode/{i}/settings"] = np.array(json.dumps({"max_length": LENGTH, **chosen}))
        case[f"decode/{i}/ids"], case[f"decode/{i}/scores"] = ids, scores.astype(np.float32)
    return case


def first_varied(make: Callable[[int], tuple[T5ForConditionalGeneration, Inputs]], start: int, num_varied: int) -> int:
    """The first seed from `start` for which some rows end early, others don't, and `num_varied` don't just repeat."""

    def is_varied(seed: int) -> bool:
        model, inputs = make(seed)
        ids = decode_results(model, inputs, SETTINGS[:1])["decode/0/ids"]
        ended = (ids == 1).any(axis=1)
        return 0 < ended.sum() < len(ended) and sum(len(set(row)) > 2 for row in ids.tolist()) >= num_varied

    return next(filter(is_varied, itertools.count(start)))


def t5_case(seed: int, skip: int = 0, **sizes: Any) -> Case:
    """T5 from its layers to its decoded tokens.

    Args:
        skip: seeds that are known not to be varied.
    """

    def make(seed: int) -> tuple[T5ForConditionalGeneration, Inputs]:
        model = make_t5(seed, **sizes)
        ids, mask, _ = make_inputs(seed, model.config.vocab_size)
        return model, {"input_ids": ids, "attention_mask": mask}

    seed = first_varied(make, 1000 * seed + skip, num_varied=4)
    model, inputs = make(seed)
    ids, mask, labels = make_inputs(seed, model.config.vocab_size)
    seen: dict[str, torch.Tensor] = {}
    encoder, decoder = model.encoder.block[0], model.decoder.block[0]
    hooked = {
        "encoder_block": encoder,
        "encoder_norm": encoder.layer[0].layer_norm,
        "encoder_attention": encoder.layer[0].SelfAttention,
        "encoder_feed_forward": encoder.layer[1].DenseReluDense,
        "decoder_block": decoder,
        "decoder_attention": decoder.layer[0].SelfAttention,
        "cross_attention": decoder.layer[1].EncDecAttention,
    }

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[f"layer__{name}_in"] = args[0] if args else kwargs["hidden_states"]
            seen[f"layer__{name}_out"] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [m.register_forward_hook(record(name), with_kwargs=True) for name, m in hooked.items()]
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
    for handle in handles:
        handle.remove()
    return {
        "config": np.array(json.dumps(config_json(model))),
        **state_of(model),
        **to_numpy(ids=ids, mask=mask, labels=labels, **seen),
        **to_numpy(encoded=out.encoder_last_hidden_state, logits=out.logits),
        **decode_results(model, inputs, SETTINGS),
    }


EMBEDDING_WIDTH, PSEUDO_TOKENS = 12, 3
SMALL = {"vocab_size": 40, "d_model": 16, "d_ff": 24, "num_heads": 2}


class Projection(nn.Sequential):
    """Linear, dropout, exact GELU, linear: an embedding to pseudo-tokens. Its keys are the published checkpoints'."""

    def __init__(self, d_model: int) -> None:
        width = EMBEDDING_WIDTH
        super().__init__(nn.Linear(width, width), nn.Dropout(0.1), nn.GELU(), nn.Linear(width, d_model * PSEUDO_TOKENS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).reshape(len(x), PSEUDO_TOKENS, -1)


class Inverter(nn.Module):
    """From the paper's section 3.2: T5 on the pseudo-tokens of an embedding."""

    def __init__(self, t5: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.encoder_decoder = t5
        self.embedding_transform = Projection(t5.config.d_model)

    def t5_inputs(self, e: torch.Tensor) -> Inputs:
        embeds = self.embedding_transform(e)
        return {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.int64)}


class Corrector(nn.Module):
    """From the paper's section 3.1: T5 on target, hypothesis and their difference, then the hypothesis' tokens."""

    def __init__(self, t5: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.encoder_decoder = t5
        width = t5.config.d_model
        self.embedding_transform_1, self.embedding_transform_2 = Projection(width), Projection(width)
        self.embedding_transform_3 = Projection(width)
        self.layernorm = nn.LayerNorm(width)

    def t5_inputs(self, e: torch.Tensor, hypothesis: torch.Tensor, hypothesis_embedding: torch.Tensor) -> Inputs:
        """`hypothesis` [B, 1 + S] begins with the decoder's start id, 0."""
        table = self.encoder_decoder.get_input_embeddings().weight
        end = table[1].expand(len(e), 1, -1)
        x = torch.cat(
            [
                *(end, self.embedding_transform_1(e)),
                *(end, self.embedding_transform_3(hypothesis_embedding)),
                *(end, self.embedding_transform_2(e - hypothesis_embedding)),
                *(end, table[hypothesis]),
            ],
            dim=1,
        )
        front = torch.ones(len(e), 4 + 3 * PSEUDO_TOKENS, dtype=torch.int64)
        mask = torch.cat([front, (hypothesis != 0).to(torch.int64)], dim=1)
        return {"inputs_embeds": self.layernorm(x), "attention_mask": mask}


def make_pair_inputs(seed: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embedding, hypothesis without start id, its embedding, labels."""
    hypothesis, mask, labels = make_inputs(seed, vocab, source=8)
    hypothesis[torch.arange(len(hypothesis)), mask.sum(1) - 1] = 1
    rng = np.random.default_rng(seed)
    e, e_hat = (torch.from_numpy(rng.standard_normal((len(labels), EMBEDDING_WIDTH))) for _ in range(2))
    return e, hypothesis, e_hat, labels


def network_case(network: type[Inverter] | type[Corrector], seed: int) -> Case:
    def make_arrays(seed: int) -> tuple[Case, tuple[torch.Tensor, ...], torch.Tensor]:
        e, hypothesis, e_hat, labels = make_pair_inputs(seed, SMALL["vocab_size"])
        if network is Inverter:
            return to_numpy(e=e), (e,), labels
        arrays = to_numpy(e=e, hypothesis=hypothesis, hypothesis_embedding=e_hat)
        return arrays, (e, nn.functional.pad(hypothesis, (1, 0)), e_hat), labels

    def make_network(seed: int) -> Inverter | Corrector:
        model = network(make_t5(seed, **SMALL))
        randomize(model, seed)
        return model

    def make(seed: int) -> tuple[T5ForConditionalGeneration, Inputs]:
        model = make_network(seed)
        with torch.no_grad():
            return model.encoder_decoder, model.t5_inputs(*make_arrays(seed)[1])

    seed = first_varied(make, 1000 * seed, num_varied=2)
    arrays, _, labels = make_arrays(seed)
    t5, t5_inputs = make(seed)
    with torch.no_grad():
        out = t5(**t5_inputs, labels=labels)
    return {
        "config": np.array(json.dumps(config_json(t5))),
        "num_pseudo_tokens": np.array(PSEUDO_TOKENS),
        **state_of(make_network(seed)),
        **arrays,
        **to_numpy(labels=labels, encoded=out.encoder_last_hidden_state, logits=out.logits),
        **decode_results(t5, t5_inputs, SETTINGS),
    }


def buckets_case(seed: int = 0) -> Case:
    """Relative-position buckets for distances far past the largest; the same for every seed."""
    distances = torch.arange(-700, 701)
    case: Case = {"distances": distances.numpy()}
    for num_buckets, max_distance in ((32, 128), (32, 20), (8, 12), (16, 600)):
        for both_ways in (False, True):
            buckets = T5Attention._relative_position_bucket(distances, both_ways, num_buckets, max_distance)
            case[f"buckets/{num_buckets}/{max_distance}/{int(both_ways)}"] = buckets.numpy().astype(np.int16)
    return case


def minilm_case(seed: int = 0) -> Case:
    """Real embeddings by sentence-transformers; the same for every seed."""
    from sentence_transformers import SentenceTransformer

    from v2t_jax.embedders.load import locate

    model = SentenceTransformer(str(locate("all-MiniLM-L6-v2")), device="cpu")
    return {"sentences": np.array(SENTENCES), "embeddings": model.encode(list(SENTENCES), convert_to_numpy=True)}


# T5 v1.0 with random weights mostly repeats one token: the search takes a minute for the seeds that the tests use.
SKIPPED = {1: 688, 2: 858, 5: 508}
CASES: dict[str, Callable[[int], Case]] = {
    "t5_v1_0": lambda seed: t5_case(seed, skip=SKIPPED.get(seed, 0)),
    "t5_v1_1": lambda seed: t5_case(
        seed, feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=1, num_layers=2
    ),
    **{name: functools.partial(encoder_case, name) for name in ENCODERS},
    "inverter": lambda seed: network_case(Inverter, seed),
    "corrector": lambda seed: network_case(Corrector, seed),
    "relative_buckets": buckets_case,
    "minilm": minilm_case,
}
GOLDEN_SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden arrays of tests/golden.")
    parser.add_argument("names", nargs="*", default=[], help=f"cases to make, by default all: {', '.join(CASES)}")
    parser.add_argument("--write", action="store_true", help="write tests/golden; otherwise a temporary folder")
    arguments = parser.parse_args()
    folder = GOLDEN if arguments.write else Path(tempfile.mkdtemp())
    for name in arguments.names or CASES:
        path = folder / f"{name}.npz"
        np.savez_compressed(path, **CASES[name](GOLDEN_SEED))
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
