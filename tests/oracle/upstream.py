"""The original (vec2text, PyTorch) as an oracle: trains tiny pairs of inverter and corrector, and records what they do.

    python tests/oracle/upstream.py JOBS        (in the environment of tests/oracle/upstream.txt, nothing else)

JOBS is a JSON list of ["make", FOLDER, SPEC], ["record", FOLDER] and ["beams", FOLDER]. `make` trains a pair from
nothing and saves it by the original's own `save_pretrained`, with the T5 and the embedder that it stands on; `record`
loads whatever pair lies in a folder and writes what it does to FOLDER/record.npz; `beams` records the beam search of
its old transformers, of many items, to FOLDER/beams.npz. A folder is laid out so that the original finds its
"t5-base" and "sentence-transformers/..." as relative paths, without network. Nothing of ours is imported here: the
two environments can't be one.
"""

import contextlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}

import evaluate
import numpy as np
import sentence_transformers
import torch

evaluate.load = lambda *_, **__: None  # metrics of the hub, which it loads without asking and which aren't needed here
import transformers  # noqa: E402
import vec2text  # noqa: E402
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from vec2text.models import CorrectorEncoderModel, InversionModel  # noqa: E402
from vec2text.models.config import InversionConfig  # noqa: E402

T5, INVERTER, CORRECTOR = "t5-base", "inverter", "corrector"
# The original's names of two embedders, and where it looks for them. One is an encoder that it pools itself; the other
# a whole pipeline of sentence-transformers.
EMBEDDERS = {
    "gtr_base": "sentence-transformers/gtr-t5-base",
    "sentence-transformers/all-MiniLM-L6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}
WIDTH = 768  # the original takes no other
SEARCHES = ((None, 0), (3, 0), (3, 2), (3, 4))  # (num_steps, sequence_beam_width) as the original names them
SPEC = {
    "seed": 0,
    "d_model": 32,
    "num_repeat_tokens": 3,
    "max_seq_length": 16,
    "steps": 150,
    "embedder": "gtr_base",
    "live": WIDTH,  # dimensions of the embedding that aren't zero: with few, a golden file is small
}
SUBJECTS = ["cat", "dog", "bird", "fish", "horse", "man", "woman", "child", "farmer", "sailor"]
VERBS = ["sees", "finds", "likes", "takes", "leaves", "paints", "hears", "forgets"]
QUALITIES = ["old", "new", "red", "blue", "small", "quiet", "very-old", "half-blind", "unhappy"]
PLACES = ["house", "tree", "river", "road", "boat", "hill", "market"]


def sentences(count: int, seed: int) -> list[str]:
    """Texts with stops, commas and apostrophes: the original's decoder mends the spaces around those."""
    rng = random.Random(seed)
    made = []
    while len(made) < count:
        first, second = (f"{rng.choice(QUALITIES)} {rng.choice(SUBJECTS)}" for _ in range(2))
        text = f"the {first} {rng.choice(VERBS)} a {second}"
        text += rng.choice(["", f", near the {rng.choice(PLACES)}", f" and the {rng.choice(SUBJECTS)}'s boat"])
        text += rng.choice([".", "!", "?", " ."])
        made += [text] * (text not in made)
    return made


def make_tokenizer(folder: Path, size: int, texts: list[str]) -> int:
    """A unigram tokenizer as T5 has one, trained on `texts`; returns its size."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = transformers.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=2)
    fast.save_pretrained(folder)
    return len(fast)


def make_bases(spec: dict[str, Any], texts: list[str]) -> None:
    """The untrained T5 and the random embedder that a pair stands on; they have different vocabularies."""
    vocab = make_tokenizer(Path(T5), 120, texts) + 4  # rows without a piece, as t5-base has 28
    t5 = transformers.T5Config(
        vocab_size=vocab,
        d_model=spec["d_model"],
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=3,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(t5).save_pretrained(T5)
    folder = EMBEDDERS[spec["embedder"]]
    if spec["embedder"] == "gtr_base":
        vocab = make_tokenizer(Path(folder), 90, texts)
        gtr = transformers.T5Config(vocab_size=vocab, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        encoder = transformers.T5EncoderModel(gtr)
        randomize(encoder, spec["live"])
        encoder.save_pretrained(folder)
        return
    vocab = make_word_pieces(Path("bert"), 90, texts)
    bert = transformers.BertConfig(
        vocab_size=vocab,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=12,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    encoder = transformers.BertModel(bert)
    randomize(encoder, spec["live"])
    encoder.save_pretrained("bert")
    parts = [sentence_transformers.models.Transformer("bert"), sentence_transformers.models.Pooling(WIDTH, "mean")]
    whole = sentence_transformers.SentenceTransformer(modules=[*parts, sentence_transformers.models.Normalize()])
    whole.save(folder)


def make_word_pieces(folder: Path, size: int, texts: list[str]) -> int:
    """A BERT tokenizer trained on `texts`; returns its size."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = transformers.BertTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder)
    return len(fast)


@torch.no_grad()
def randomize(encoder: torch.nn.Module, live: int) -> None:
    """Weights that make texts' vectors differ, and that float16 holds."""
    for name, p in encoder.named_parameters():
        if "relative" not in name:
            noise = torch.randn(p.shape) * (1.0 if "embed" in name or "shared" in name else 0.1)
            p.copy_(1 + 0.3 * torch.randn(p.shape) if "norm" in name.lower() and "weight" in name else noise)
    silence(encoder, live)
    for p in encoder.parameters():
        p.copy_(p.half().float())


@torch.no_grad()
def silence(module: torch.nn.Module, live: int) -> None:
    """Zeroes every weight along axes of the embedding's width beyond its first `live` dimensions."""
    for p in module.parameters():
        for axis in range(p.ndim):
            if p.shape[axis] == WIDTH and live < WIDTH:
                p.narrow(axis, live, WIDTH - live).zero_()


def tokens(tokenizer: Any, texts: list[str], length: int) -> dict[str, torch.Tensor]:
    return tokenizer(texts, max_length=length, truncation=True, padding="max_length", return_tensors="pt")


def train(model: torch.nn.Module, loss_of: Any, spec: dict[str, Any]) -> None:
    """Adam on the loss that the original computes; afterwards weights are rounded to what float16 holds."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=4e-3)
    model.train()
    for _ in range(spec["steps"]):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        silence(model, spec["live"])
    print(f"{type(model).__name__}: loss {loss.item():.3f}", file=sys.stderr)
    with torch.no_grad():
        for p in parameters:
            p.copy_(p.half().float())
    model.eval()


def settings(spec: dict[str, Any]) -> InversionConfig:
    """Of both models of a pair."""
    return InversionConfig(
        model_name_or_path=T5,
        embedder_model_name=spec["embedder"],
        embedder_model_api=None,
        embedder_torch_dtype="float32",
        embedder_no_grad=True,
        embedder_fake_with_zeros=False,
        embedder_gaussian_noise_level=0.0,
        embeddings_from_layer_n=None,
        use_frozen_embeddings_as_input=True,
        encoder_dropout_disabled=False,
        decoder_dropout_disabled=False,
        use_lora=False,
        corrector_ignore_hypothesis_embedding=False,
        max_seq_length=spec["max_seq_length"],
        num_repeat_tokens=spec["num_repeat_tokens"],
    )


def make(spec: dict[str, Any]) -> None:
    """Trains a pair as the original does: the inverter on texts, the corrector on the inverter's guesses."""
    torch.manual_seed(spec["seed"])
    texts = sentences(48, spec["seed"])
    make_bases(spec, texts)
    config = settings(spec)
    inverter = InversionModel(config)
    silence(inverter, spec["live"])
    labels = tokens(inverter.tokenizer, texts, spec["max_seq_length"])["input_ids"]
    pieces = tokens(inverter.embedder_tokenizer, texts, spec["max_seq_length"])
    with torch.no_grad():
        e = inverter.call_embedding_model(pieces["input_ids"], pieces["attention_mask"])
    masked = labels.masked_fill(labels == 0, -100)
    train(inverter, lambda: inverter(None, None, labels=masked, frozen_embeddings=e).loss, spec)

    model = CorrectorEncoderModel(config)
    silence(model, spec["live"])
    corrector = vec2text.load_corrector(inverter, model)
    names = ("frozen_embeddings", "hypothesis_input_ids", "hypothesis_attention_mask", "hypothesis_embedding")
    with torch.no_grad():
        guesses = corrector._get_hypothesis_uncached({"frozen_embeddings": e})
    inputs = {"input_ids": labels, "labels": masked, **dict(zip(names, guesses, strict=True))}
    train(model, lambda: corrector.compute_loss(model, dict(inputs)), spec)
    # As .bin: from its own safetensors, which lack a tied head, it takes the untrained T5's instead.
    inverter.save_pretrained(INVERTER, safe_serialization=False)
    model.save_pretrained(CORRECTOR, safe_serialization=False)


def load_pair() -> Any:
    """The pair in this folder, as the original's `invert_embeddings` takes it."""
    inverter, model = InversionModel.from_pretrained(INVERTER), CorrectorEncoderModel.from_pretrained(CORRECTOR)
    inverter.eval()
    model.eval()
    return vec2text.load_corrector(inverter, model)


def record(spec: dict[str, Any]) -> None:
    """Logits, and every step of every search, of the pair in this folder."""
    corrector = load_pair()
    inverter, model = corrector.inversion_trainer.model, corrector.model
    length = inverter.config.max_seq_length
    texts = sentences(48, spec["seed"])[:3] + sentences(4, 1000)
    with torch.no_grad():
        pieces = tokens(inverter.embedder_tokenizer, texts, length)
        e = inverter.call_embedding_model(pieces["input_ids"], pieces["attention_mask"])
        e_hat, labels = e.flip(0), tokens(inverter.tokenizer, texts, length)["input_ids"]
        hypothesis = torch.nn.functional.pad(labels.flip(0), (1, 0))  # behind the decoder's start id
        logits = {
            "inverter_logits": inverter(None, None, labels=labels, frozen_embeddings=e).logits,
            "corrector_logits": model(e, e_hat, hypothesis, (hypothesis != 0).long(), labels=labels).logits,
        }
    arrays = {"e": e, "e_hat": e_hat, "labels": labels, "hypothesis": hypothesis[:, 1:], **logits}
    case = {
        name: array.numpy().astype(np.int32 if array.dtype == torch.int64 else np.float32)
        for name, array in arrays.items()
    }
    case["texts"] = np.array(texts)
    for num_steps, width in SEARCHES:
        case |= search(corrector, e, num_steps, width)
    np.savez_compressed("record.npz", **case)


def search(corrector: Any, e: torch.Tensor, num_steps: int | None, width: int) -> dict[str, np.ndarray]:
    """One call of the original's `invert_embeddings`, and for each step t its candidates and what was selected."""
    name, case, seen = f"search/{num_steps or 0}/{width}", {}, []

    def watch(owner: Any, method: str) -> None:
        """Keeps what `method` returns, too."""
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            seen.append((method, result))
            return result

        setattr(owner, method, watched)
        undo.callback(setattr, owner, method, original)

    with contextlib.ExitStack() as undo, torch.no_grad():
        watch(corrector.model, "generate")
        watch(corrector.inversion_trainer.model, "generate")
        watch(corrector, "embed_generated_hypothesis")
        watch(corrector, "_generate_with_beam")
        found = vec2text.invert_embeddings(e.clone(), corrector, num_steps=num_steps, sequence_beam_width=width)
    case[f"{name}/texts"] = np.array(found)
    cosine = torch.nn.CosineSimilarity(dim=-1)
    step = 0
    for method, result in seen:
        if method == "generate" and torch.is_tensor(result):
            case[f"{name}/0/ids"] = result[:, 1:].numpy().astype(np.int32)  # the inverter's, without the start id
        elif method == "generate":
            step += 1
            case[f"{name}/{step}/ids"] = result.sequences[:, 1:].numpy().astype(np.int32)
            if "sequences_scores" in result:
                case[f"{name}/{step}/scores"] = result.sequences_scores.numpy()
        elif method == "embed_generated_hypothesis":
            target = e.repeat_interleave(len(result) // len(e), dim=0)
            case[f"{name}/{step}/cosine"] = cosine(result, target).numpy()
        else:
            ids, embedding, _ = result
            target = e.repeat_interleave(len(ids) // len(e), dim=0)
            case[f"{name}/{step}/chosen"] = ids[:, 1:].numpy().astype(np.int32)
            case[f"{name}/{step}/chosen_cosine"] = cosine(embedding, target).numpy()
    return case


@torch.no_grad()
def beams() -> None:
    """A case as tests/helpers/equivalence.py has them: items of which some end early, so that stopping rules show."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 30, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    state = {}
    for name, p in model.named_parameters():
        scale = 0.7 if "shared" in name else p.shape[-1] ** -0.5
        p.copy_(torch.full_like(p, 2.5 if "final" in name else 1.0) if p.ndim == 1 else torch.randn(p.shape) * scale)
        if "shared" in name:
            p[1] *= 1.6  # the end of sequence
        p.copy_(p.half().float())
        state[f"state/{name}"] = p.numpy().astype(np.float16)
    ids = torch.randint(2, 30, (200, 6))
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=4,
        num_return_sequences=4,
        max_length=20,
        early_stopping=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    settings = {"max_length": 19, "num_beams": 4, "stop_rule": "any"}
    np.savez_compressed(
        "beams.npz",
        **state,
        config=np.array(json.dumps(model.config.to_dict())),
        ids=ids.int().numpy(),
        labels=ids.int().numpy(),
        mask=np.ones(ids.shape, np.int32),
        **{
            "decode/0/settings": np.array(json.dumps(settings)),
            "decode/0/ids": found.sequences[:, 1:].int().numpy().reshape(len(ids), 4, -1),
            "decode/0/scores": found.sequences_scores.numpy().reshape(len(ids), 4),
        },
    )


def main() -> None:
    torch.set_num_threads(1)
    for work, folder, *changes in json.loads(sys.argv[1]):
        Path(folder).mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        if work == "make":
            spec = SPEC | changes[0]
            Path("spec.json").write_text(json.dumps(spec))
            make(spec)
        elif work == "beams":
            beams()
        else:
            record(json.loads(Path("spec.json").read_text()))


if __name__ == "__main__":
    main()
