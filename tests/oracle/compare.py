"""Times ours beside PyTorch: same weights, same work (checked), same cores, alternating turns.

    python -m tests.oracle.compare WORK [--json]        (in the environment of `make oracle`)

Beside the original (hypotheses, correct), theirs runs in a process of its own (serve.py), which waits while ours runs.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch import nn

from tests.oracle.original import Original
from v2t_jax.bench.decode import Decode, generate, sized, source_ids
from v2t_jax.bench.embed import long_texts
from v2t_jax.bench.measure import Turn, num_cores, processor, turn
from v2t_jax.bench.peaks import peak_of
from v2t_jax.bench.train import OPTIMIZER, Network, Step, Train
from v2t_jax.config import ModelConfig, T5Config
from v2t_jax.data.split import read_texts
from v2t_jax.embedders.load import load_embedder, locate
from v2t_jax.interop.hf_t5 import t5_from_huggingface
from v2t_jax.inversion import upstream
from v2t_jax.inversion.api import invert_embeddings
from v2t_jax.inversion.pipeline import InversionPipeline
from v2t_jax.inversion.proposals import initial_hypotheses
from v2t_jax.models.layers import Params
from v2t_jax.models.t5 import unstack_decoder
from v2t_jax.vec2text.convert import build

T5_SMALL, T5_BASE = dataclasses.replace(sized("t5-small"), scan_unroll=6), sized("t5-base")  # unrolled as torch's
LOSS_TOLERANCE = 1e-4
VECTOR_TOLERANCE = 1e-5  # of vectors of length 1
# The pair of serve.py: T5-small's sizes, and GTR-base's as its embedder.
PAIR: dict[str, Any] = {
    "seed": 0,
    "num_repeat_tokens": 16,
    "max_seq_length": 32,  # ids of a text, the start id included
    "t5": {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "gtr": {"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
SEARCHES = ((1, 1, 3), (20, 1, 1), (8, 4, 2))  # num_steps, sequence_beam_width, turns
LONG_SEARCHES = ((8, 8, 1),)


def take_turns(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int,
    clock: Callable[[Callable[[], Any]], Turn] | None = None,
) -> dict[str, Any]:
    """Times both `repeats` times, ours, theirs, ours, theirs ...; both have been run before. `clock` times theirs."""
    turns: list[tuple[Turn, Turn]] = [(turn(ours), (clock or turn)(theirs)) for _ in range(repeats)]
    medians = {
        f"{side}_{kind}": statistics.median(getattr(pair[i], field) for pair in turns)
        for i, side in enumerate(("ours", "torch"))
        for kind, field in (("seconds", "wall"), ("cpu_seconds", "cpu"))
    }
    # Of neighbors, so that whatever else the machine is doing slows both.
    speedup = statistics.median(pair[1].wall / pair[0].wall for pair in turns)
    return {"name": name, **medians, "speedup": speedup, "turns": turns}


def torch_t5(config: T5Config, seed: int = 0) -> Any:
    """A `T5ForConditionalGeneration` of these sizes with random float32 weights, in evaluation mode."""
    torch.manual_seed(seed)
    same = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_decoder_layers", "tie_word_embeddings")
    same += ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "dropout_rate")
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            **{name: getattr(config, name) for name in same},
            num_layers=config.num_encoder_layers,
            feed_forward_proj=config.feed_forward,
            decoder_start_token_id=0,
        )
    )
    return model.float().eval()


def to_numpy(module: nn.Module) -> dict[str, np.ndarray]:
    """A module's state dict as arrays, which share its memory on a CPU."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in module.state_dict().items()}


def compare_decoding(options: Decode, config: T5Config = T5_BASE) -> Iterator[dict[str, Any]]:
    """One comparison per batch size; both sides must generate the same tokens."""
    model = torch_t5(config)
    params = unstack_decoder(jax.tree.map(jnp.asarray, t5_from_huggingface(to_numpy(model), config)))
    jitted = jax.jit(generate, static_argnums=(0, 3))
    for batch_size in options.batch_size:
        ids = source_ids(config, batch_size, options.source_length)
        ours_in, theirs_in = jnp.asarray(ids, jnp.int32), torch.tensor(ids)

        def ours(ids: jax.Array = ours_in) -> np.ndarray:
            return np.asarray(jitted(config, params, ids, options.num_tokens))

        def theirs(ids: Any = theirs_in) -> np.ndarray:
            count = options.num_tokens
            lengths = {"max_new_tokens": count, "min_new_tokens": count}
            made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=1, **lengths)
            return made[:, 1:].cpu().numpy()  # without the start id

        mine, reference = ours(), theirs()
        assert mine.shape == reference.shape == (batch_size, options.num_tokens)
        np.testing.assert_array_equal(mine, reference)
        name = f"greedy decoding of {options.num_tokens} tokens, batch {batch_size}"
        yield take_turns(name, ours, theirs, options.repeats)


class TorchStep:
    """One training step in torch per call; returns the loss before its update. Its batch is that of ours, `Step`."""

    def __init__(self, config: ModelConfig, e: np.ndarray, ids: np.ndarray, network: Network) -> None:
        width = config.embedding_width
        self.model, self.num_pseudo_tokens = torch_t5(config.t5).train(), config.num_pseudo_tokens
        self.corrects = network == "corrector"

        def projection() -> nn.Module:
            output = nn.Linear(width, config.t5.d_model * self.num_pseudo_tokens)
            return nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0), nn.GELU(), output).train()

        parts = ("target", "hypothesis", "difference")
        names = [f"projection_{part}" for part in parts] if self.corrects else ["projection"]
        self.projections = nn.ModuleDict({name: projection() for name in names})
        self.norm = nn.LayerNorm(config.t5.d_model, eps=1e-5) if self.corrects else nn.Identity()
        self.e, self.ids = torch.tensor(e), torch.tensor(ids)
        self.params = [p for part in (self.model, self.projections, self.norm) for p in part.parameters()]
        groups = [
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in self.params if p.ndim == 1], "weight_decay": 0.0},
        ]
        betas = (OPTIMIZER.b1, OPTIMIZER.b2)
        self.optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=betas, eps=1e-8)

    def our_params(self, t5: T5Config) -> Params:
        """Our network's parameters with copies of its weights."""
        params: Params = {"t5": t5_from_huggingface(to_numpy(self.model), t5)}
        for name, module in self.projections.items():
            weights = to_numpy(module)
            params[name] = {
                layer: {"kernel": weights[f"{i}.weight"].T, "bias": weights[f"{i}.bias"]}
                for layer, i in (("hidden", 0), ("output", 3))
            }
        if self.corrects:
            weights = to_numpy(self.norm)
            params["input_norm"] = {"scale": weights["weight"], "bias": weights["bias"]}
        return jax.tree.map(lambda p: jnp.array(p, copy=True), params)

    def encoder_input(self) -> torch.Tensor:
        def projected(name: str, x: torch.Tensor) -> torch.Tensor:
            return self.projections[name](x).reshape(len(x), self.num_pseudo_tokens, -1)

        if not self.corrects:
            return projected("projection", self.e)
        hypothesis, embedding = self.ids.roll(1, 0), self.e.roll(1, 0)
        separator = self.model.shared(torch.ones_like(self.ids[:, :1]))
        text = self.model.shared(nn.functional.pad(hypothesis, (1, 0)))
        given = zip(self.projections, (self.e, embedding, self.e - embedding), strict=True)
        parts = [part for name, x in given for part in (separator, projected(name, x))]
        return self.norm(torch.cat([*parts, separator, text], dim=1))

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        embeds = self.encoder_input()
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        if self.corrects:
            mask[:, -self.ids.shape[1] - 1] = 0  # the start id, as in the original
        loss = self.model(inputs_embeds=embeds, attention_mask=mask, labels=self.ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, OPTIMIZER.clip_norm)
        self.optimizer.step()
        if loss.is_cuda:
            torch.cuda.synchronize()
        return float(loss.detach())


def compare_training(options: Train, t5: T5Config = T5_SMALL) -> Iterator[dict[str, Any]]:
    """Of both networks. The losses of the first two steps must agree, so the first update is checked too."""
    config, e, ids = options.problem(t5)
    for network in get_args(Network):
        theirs = TorchStep(config, e, ids, network)
        ours = Step(config, theirs.our_params(t5), e, ids, network)
        for step in range(2):
            mine, reference = ours(), theirs()
            assert abs(mine - reference) < LOSS_TOLERANCE, f"step {step}: our loss is {mine}, torch's {reference}"
        name = f"{network} training step, batch {options.batch_size} x {config.max_length} tokens"
        yield take_turns(name, ours, theirs, options.repeats)


def compare_embedding(count: int = 1000, batch_size: int = 64, repeats: int = 5) -> Iterator[dict[str, Any]]:
    """all-MiniLM-L6-v2 beside sentence-transformers, on lines of WordNet and texts of equal length; vectors agree."""
    name = "all-MiniLM-L6-v2"
    embedder = load_embedder(name)
    model = SentenceTransformer(str(locate(name)), device=str(torch.get_default_device()))
    for num_tokens in (None, 16, 128):
        ours = embedder if num_tokens is None else embedder.shortened(num_tokens)
        model.max_seq_length = ours.config.max_length
        texts = read_texts("wordnet", "held_out")[:count] if num_tokens is None else long_texts(ours, count)
        mine = functools.partial(ours.embed, texts, batch_size)
        theirs = functools.partial(model.encode, texts, batch_size=batch_size)
        difference = np.abs(mine() - theirs()).max()
        assert difference < VECTOR_TOLERANCE, f"the vectors differ by {difference}"
        what = "WordNet lines" if num_tokens is None else f"texts of {num_tokens} tokens"
        yield take_turns(f"{name}, {count} {what}, batch {batch_size}", mine, theirs, repeats)


@contextlib.contextmanager
def random_pair(spec: dict[str, Any]) -> Iterator[tuple[InversionPipeline, Original]]:
    """A pair that the original made and loaded, and ours converted from it. Both write texts of the same length."""
    length = mock.patch.object(upstream, "UPSTREAM_LENGTH", spec["max_seq_length"] - 1)  # without the start id
    with tempfile.TemporaryDirectory() as folder, Original(Path(folder), spec) as original, length:
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        assert original.about["device"] == device, f"vec2text runs on {original.about['device']}, and ours on {device}"
        parts = ("inverter", "corrector", "t5-base", "sentence-transformers/gtr-t5-base")
        model, _ = build(*(f"{folder}/{part}" for part in parts))
        model.embedding_norm = None  # that of texts of which this tokenizer knows no word
        yield model, original


def vectors(model: InversionPipeline, count: int) -> np.ndarray:
    """Embeddings [count, E] of texts of made-up words."""
    shape = (count, model.config.max_length - 1)
    ids = np.random.default_rng(0).integers(3, model.config.t5.vocab_size, shape, np.int32)
    return model.embedder.embed(model.vocabulary.decode(ids))


def check_texts(mine: Sequence[str], reference: Sequence[str], length: int) -> None:
    """All are equal and of full length: a token is a word here, and none is the end."""
    assert [len(text.split()) for text in mine] == [length] * len(mine), mine
    assert list(mine) == list(reference), [pair for pair in zip(mine, reference, strict=True) if pair[0] != pair[1]]


def compare_hypotheses(count: int = 16, repeats: int = 5, spec: dict[str, Any] = PAIR) -> Iterator[dict[str, Any]]:
    """The inverter's greedy decoding alone; every token is checked."""
    with random_pair(spec) as (model, original):
        e, ids = vectors(model, count), spec["max_seq_length"]
        hypothesize = jax.jit(initial_hypotheses(upstream.upstream_lengths(model.config)[0]), static_argnums=2)

        def ours() -> list[str]:
            return model.vocabulary.decode(np.asarray(hypothesize(model.loop_params(), jnp.asarray(e), 1)[:, 0]))

        def theirs() -> tuple[Turn, list[str]]:
            return original.invert(e, None, 0, ids)

        check_texts(ours(), theirs()[1], ids - 1)
        name = f"hypotheses of {ids - 1} tokens for {count} vectors, beside vec2text {original.about['vec2text']}"
        yield take_turns(name, ours, theirs, repeats, clock=lambda run: run()[0])


def compare_correction(
    counts: Sequence[int] = (4, 16), searches: Sequence[tuple[int, int, int]] = SEARCHES, spec: dict[str, Any] = PAIR
) -> Iterator[dict[str, Any]]:
    """`invert_embeddings` of both, ours in mode "upstream", which ends no search early; every final text is checked.

    Ours also returns each step's text and cosine; theirs returns texts alone.
    """
    with random_pair(spec) as (model, original):
        ids = spec["max_seq_length"]
        for (num_steps, width, repeats), count in itertools.product(searches, counts):
            e = vectors(model, count)
            # All at once, as theirs.
            options: dict[str, Any] = {"num_steps": num_steps, "sequence_beam_width": width, "batch_size": count}

            def ours(e: np.ndarray = e, options: dict[str, Any] = options) -> list[str]:
                return [found.text for found in invert_embeddings(model, e, mode="upstream", **options)]

            def theirs(e: np.ndarray = e, n: int = num_steps, width: int = width) -> tuple[Turn, list[str]]:
                return original.invert(e, n, width, ids)

            check_texts(ours(), theirs()[1], ids - 1)
            name = f"{num_steps} correction steps, beam {width}, {count} texts of {ids - 1} tokens"
            name += f", beside vec2text {original.about['vec2text']}"
            yield take_turns(name, ours, theirs, repeats, clock=lambda run: run()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "decode", "embed", "hypotheses", "correct", "all"))
    parser.add_argument("--json", action="store_true", help="print one JSON document; lines go to the standard error")
    parser.add_argument("--texts", type=int, nargs="+", default=(4, 16), help="numbers of texts that are corrected")
    parser.add_argument("--long", action="store_true", help="correct by beams of 8, too: takes an hour")
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    if jax.default_backend() == "gpu":
        if not torch.cuda.is_available():
            parser.error("JAX has a GPU here and torch has none; install a torch for CUDA, or set JAX_PLATFORMS=cpu.")
        torch.set_default_device("cuda")
    searches = SEARCHES + (LONG_SEARCHES if options.long else ())
    compared: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "train": lambda: compare_training(Train()),
        "decode": lambda: compare_decoding(Decode()),
        "embed": compare_embedding,
        "hypotheses": compare_hypotheses,
        "correct": lambda: compare_correction(options.texts, searches),
    }
    versions = {name: version(name) for name in ("jax", "torch", "transformers", "sentence-transformers")}
    lines = sys.stderr if options.json else sys.stdout
    print(f"{num_cores()} cores, float32, " + ", ".join(f"{name} {v}" for name, v in versions.items()), file=lines)
    results = []
    for what in compared if options.what == "all" else (options.what,):
        for r in compared[what]():
            results.append(r)
            print(
                f"{r['name']}: v2t_jax {r['ours_seconds']:.3f} s, torch {r['torch_seconds']:.3f} s, "
                f"speed-up {r['speedup']:.2f}x (median of {len(r['turns'])} turns); "
                f"processor time {r['ours_cpu_seconds']:.2f} s and {r['torch_cpu_seconds']:.2f} s",
                file=lines,
                flush=True,
            )
    if options.json:
        where: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "cores": num_cores(),
        }
        where |= {"device": jax.devices()[0].device_kind, "peak": peak_of(jax.devices()[0], "float32")._asdict()}
        where["malloc"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        print(json.dumps({**where, **versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
