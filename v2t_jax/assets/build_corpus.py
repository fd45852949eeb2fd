"""Builds the packaged corpus, v2t_jax/assets/wordnet.txt.gz, from Debian's wordnet-base (WORDNET-NOTICE.txt).

    python -m v2t_jax.assets.build_corpus OUT.txt.gz

Definitions and examples, one a line, without the training lines that leak a held-out one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from v2t_jax.data.corpus import is_text, write_lines
from v2t_jax.data.split import HeldOutFilter, is_held_out, unique

FOLDER = Path("/usr/share/wordnet")


def wordnet_lines() -> Iterator[str]:
    """Definitions and quoted examples of every synset, in the database's order."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (FOLDER / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence at the top of each file
                continue
            gloss = line.partition(" | ")[2]
            definition = gloss.partition('"')[0]
            for text in (definition, *re.findall(r'"([^"]*)"', gloss)):
                text = re.sub(r"\s+", " ", text.replace("`", "'")).strip(" ;:,-")
                if is_text(text, shortest=3):
                    yield text


def build_wordnet() -> list[str]:
    """Held-out lines, and the training lines that give none of them away."""
    lines = unique(wordnet_lines())
    held_out = [normalized for normalized in lines if is_held_out(normalized)]
    rest = [normalized for normalized in lines if not is_held_out(normalized)]
    bad = {normalized for normalized, found in zip(rest, HeldOutFilter(held_out).leaking(rest), strict=True) if found}
    print(f"{len(lines)} lines, {len(held_out)} held out, {len(bad)} dropped for overlap with those")
    return [text for normalized, text in lines.items() if normalized not in bad]


if __name__ == "__main__":
    if len(sys.argv) != 2 or not FOLDER.is_dir():
        sys.exit("usage: python -m v2t_jax.assets.build_corpus OUT.txt.gz (after apt-get install wordnet-base)")
    write_lines(Path(sys.argv[1]), build_wordnet())
