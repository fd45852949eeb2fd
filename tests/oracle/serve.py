"""The original as the partner of tests/oracle/compare.py: loads a pair, and times the searches that stdin asks for.

    python tests/oracle/serve.py FOLDER [SPEC]        (in the environment of tests/oracle/upstream.txt, nothing else)

With SPEC, JSON as compare.PAIR, a pair with random weights is made in FOLDER; without, one that upstream.py made lies
there. Once it's loaded, a line of JSON on stdout tells versions and the device. Then each line of stdin,

    {"vectors": FILE.npy, "num_steps": N or null, "sequence_beam_width": W, "max_length": ids, the start id included}

is one call of `invert_embeddings`, and is answered by {"wall": seconds, "cpu": seconds, "texts": [...]}. It ends when
stdin does.
"""

import importlib.metadata
import itertools
import json
import os
import string
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import vec2text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from upstream import CORRECTOR, EMBEDDERS, INVERTER, T5, load_pair, settings
from vec2text.models import CorrectorEncoderModel, InversionModel


def made_up_tokenizer(size: int) -> transformers.T5TokenizerFast:
    """One like T5's, of made-up words: every piece is a whole word, so that texts are equal only if their ids are."""
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    words = ["▁" + "".join(word) for word in itertools.islice(letters, size - 3)]
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram([(piece, 0.0) for piece in special] + [(word, -10.0) for word in words], 2))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


@torch.no_grad()
def make(spec: dict[str, Any]) -> None:
    """An untrained pair in this folder, whose texts never end by themselves."""
    torch.manual_seed(spec["seed"])
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**spec["t5"], decoder_start_token_id=0))
    # The embedding of a special token is zero, and so its logit, which is never among the greatest. Others are smaller
    # than T5's own, with which even the beams' texts would be one word again and again.
    t5.shared.weight.mul_(0.3)[:3] = 0
    embedder = transformers.T5EncoderModel(transformers.T5Config(**spec["gtr"]))
    for model, folder in ((t5, T5), (embedder, EMBEDDERS["gtr_base"])):
        model.save_pretrained(folder)
        made_up_tokenizer(model.config.vocab_size).save_pretrained(folder)
    config = settings(spec | {"embedder": "gtr_base"})
    InversionModel(config).save_pretrained(INVERTER, safe_serialization=False)
    CorrectorEncoderModel(config).save_pretrained(CORRECTOR, safe_serialization=False)


@torch.no_grad()
def search(corrector: Any, vectors: str, num_steps: int | None, sequence_beam_width: int, max_length: int) -> Any:
    """One timed call. `invert_embeddings` lets texts be 128 ids long; its networks are told another limit."""
    e = torch.from_numpy(np.load(vectors)).to(corrector.model.device)
    for model in (corrector.model, corrector.inversion_trainer.model):
        t5 = model.encoder_decoder
        t5.generate = lambda t5=t5, **given: type(t5).generate(t5, **given | {"max_length": max_length})
    wall, cpu = time.perf_counter(), time.process_time()
    texts = vec2text.invert_embeddings(e, corrector, num_steps=num_steps, sequence_beam_width=sequence_beam_width)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "texts": texts}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # the original prints
    folder, *spec = sys.argv[1:]
    os.chdir(Path(folder))
    if spec:
        make(json.loads(spec[0]))
    corrector = load_pair()
    about = {name: importlib.metadata.version(name) for name in ("vec2text", "torch", "transformers")}
    print(json.dumps(about | {"device": corrector.model.device.type}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(search(corrector, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
