"""Builds text corpora from Debian packages.

    python -m v2t_jax.assets.build_corpus wordnet OUT.txt.gz
    python -m v2t_jax.assets.build_corpus extra OUT.txt.gz [--source gcide foldoc bible]

`wordnet` (package wordnet-base; notice in WORDNET-NOTICE.txt) makes the packaged corpus: definitions and
examples, one a line, cleaned against its own held-out lines. `extra` makes more training text from
packages whose licences differ, so its output is not part of this project: gcide (dict-gcide, GPL-2+),
foldoc (dict-foldoc, GFDL), bible (sword-text-web, public domain). Every extra line that gives away a
held-out WordNet line is dropped (GCIDE copies many glosses).
"""

from __future__ import annotations

import argparse
import gzip
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from v2t_jax.data.split import HeldOutFilter, is_held_out, normalize_for_split, read_texts, unique
from v2t_jax.errors import InputError

WORDNET_FOLDER = Path("/usr/share/wordnet")
DICTIONARIES = Path("/usr/share/dictd")
BIBLE_FOLDER = Path("/usr/share/sword/modules/texts/ztext/engWEB2015eb")

SHORTEST, LONGEST = 3, 60  # words
LETTER_SHARE = 0.8

_ASCII = str.maketrans("“”‘’—–", "\"\"''--")
_SPACE = re.compile(r"\s+")
_MARKUP = re.compile(r"[\\{}\[\]<>|=_^~*#@+]|\(\)|\.\.|--|`")


def wordnet_lines() -> Iterator[str]:
    """Definitions and quoted examples of every synset, in the database's order."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in _bytes(WORDNET_FOLDER / f"data.{part}", "wordnet-base").decode("utf-8").splitlines():
            if line.startswith("  "):  # the licence at the top of each file
                continue
            gloss = line.partition(" | ")[2]
            definition = gloss.partition('"')[0]
            for text in (definition, *re.findall(r'"([^"]*)"', gloss)):
                text = _SPACE.sub(" ", text.replace("`", "'")).strip(" ;:,-")
                if _is_text(text):
                    yield text


def gcide_lines() -> Iterator[str]:
    """Definitions, examples and quotations of the GNU Collaborative International Dictionary of English."""
    text = gzip.decompress(_bytes(DICTIONARIES / "gcide.dict.dz", "dict-gcide")).decode("utf-8", "replace")
    # Letters written as names: [ae], ['e], [=a], [aum] (a umlaut).
    text = re.sub(r"\[(ae|oe|AE|OE)\]", r"\1", text)
    text = re.sub(r"\[([a-z])um\]|\[['`\"^=~.]([A-Za-z])\]", lambda m: m.group(1) or m.group(2), text)
    for entry in re.split(r"\n(?=\S)", text):
        paragraphs = re.split(r"\n\s*\n", entry)
        for number, paragraph in enumerate(paragraphs):
            yield from _gcide_paragraph(_SPACE.sub(" ", paragraph).strip(), head=number == 0)


def _gcide_paragraph(text: str, head: bool) -> Iterator[str]:
    for _ in range(2):  # brackets nest one deep
        text = re.sub(r"\[[^\[\]]*\]", " ", text)
    if head:
        text = text.rpartition("\\")[2] if "\\" in text else ""
        # Pronunciation, part of speech and inflected forms, up to the first full word of the definition.
        text = re.sub(r"^[\s,;]*(\([^()]*\)[\s,;]*)*", "", text)
        text = re.sub(
            r"^((n|a|v|i|t|p|pr|adv|adj|prep|conj|interj|imp|pl|sing|pron|superl|compar|vb)\b\.?[\s,;&]*)+",
            "",
            text,
        )
        text = re.sub(r"^(pl\.|imp\.)?[^.]*\{[^.]*\}[^.]*?\.\s", "", text)
    if text.startswith("Syn:"):
        return
    text = re.sub(r"^Note:\s*", "", text)
    text = re.sub(r"\(\w+\.(\s*[&,]?\s*\w+\.)*\)", " ", text)  # (Zool.), (Bot. & Med.)
    text = re.sub(r"^\s*(\d+\.?\s+)?(\([a-z]\)\s+)?", "", text)
    quotations = re.findall(r'"([^"]{10,})"', text)
    text = re.sub(r'"[^"]{10,}"', ". ", text).replace('"', "")
    text = re.sub(r"[\s;,]*--\s*(also called|called also|opposed to|distinguished from)", r", \1", text)
    text = re.sub(r"\s--\s?[A-Z(][^\"]{0,40}$", "", text)  # who said it
    text = re.sub(r"--\s?[A-Z][\w.']*(\s[A-Z(][\w.')]*){0,3}", ". ", text)
    text = re.sub(r"[{}]", "", text).replace("*", "")
    for piece in (text, *quotations):
        for sentence in _sentences(piece):
            definition, _, example = sentence.partition("; as, ")
            yield from (definition, *example.split("; "))


def foldoc_lines() -> Iterator[str]:
    """Sentences of the Free On-line Dictionary of Computing."""
    text = gzip.decompress(_bytes(DICTIONARIES / "foldoc.dict.dz", "dict-foldoc")).decode("utf-8", "replace")
    for paragraph in re.split(r"\n\s*\n|\n(?=\S)", text):
        flat = re.sub(r"\[[^\[\]]*\]|<[^<>]*>|\{\([^{}]*\)\}", " ", paragraph)
        flat = re.sub(r"^\s*\d+\.\s+", "", flat.replace("{", "").replace("}", ""))
        yield from _sentences(_SPACE.sub(" ", flat))


def bible_lines() -> Iterator[str]:
    """Sentences of the World English Bible, out of the SWORD project's zlib blocks."""
    for part in ("ot", "nt"):
        index = _bytes(BIBLE_FOLDER / f"{part}.bzs", "sword-text-web")
        blocks = _bytes(BIBLE_FOLDER / f"{part}.bzz", "sword-text-web")
        for i in range(0, len(index), 12):
            offset, size = (int.from_bytes(index[i + j : i + j + 4], "little") for j in (0, 4))
            markup = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "replace")
            markup = re.sub(r"(?s)<(note|title)\b.*?</\1>|<[^<>]*>", " ", markup)
            yield from _sentences(_SPACE.sub(" ", markup))


EXTRA: dict[str, Callable[[], Iterator[str]]] = {
    "gcide": gcide_lines,
    "foldoc": foldoc_lines,
    "bible": bible_lines,
}


def _sentences(text: str) -> Iterator[str]:
    text = text.translate(_ASCII)
    yield from re.split(r"""(?<=[a-z0-9)][.!?])["')]*\s+(?=["'A-Z(])""", text)


def _tidy(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = re.sub(r"\s+([,.;:!?])", r"\1", _SPACE.sub(" ", text)).strip(" ;:,-.\"'")
        if _is_text(text) and not text.startswith("See ") and not _MARKUP.search(text) and text.isascii():
            yield text


def _is_text(text: str) -> bool:
    letters, solid = sum(map(str.isalpha, text)), len(text.replace(" ", ""))
    return SHORTEST <= len(text.split()) <= LONGEST and letters >= LETTER_SHARE * solid


def build_wordnet() -> list[str]:
    """The packaged corpus: held-out lines, and the training lines that give none of them away."""
    lines = unique(wordnet_lines())
    held_out = [normalized for normalized in lines if is_held_out(normalized)]
    rest = [normalized for normalized in lines if not is_held_out(normalized)]
    bad = {normalized for normalized, found in zip(rest, HeldOutFilter(held_out).leaking(rest), strict=True) if found}
    print(f"wordnet: {len(lines)} lines, {len(held_out)} held out, {len(bad)} dropped for overlap with those")
    return [text for normalized, text in lines.items() if normalized not in bad]


def build_extra(sources: Iterable[str]) -> list[str]:
    """Lines of the given sources that are neither in the packaged corpus nor give away its held-out lines."""
    held_out = [normalize_for_split(text) for text in read_texts("wordnet", "held_out")]
    known = {normalize_for_split(text) for text in read_texts("wordnet", "train")}
    kept: dict[str, str] = {}
    for source in sources:
        lines = unique(_tidy(EXTRA[source]()))
        new = [normalized for normalized in lines if normalized not in known and normalized not in kept]
        bad = HeldOutFilter(held_out).leaking(new)
        kept |= {normalized: lines[normalized] for normalized, found in zip(new, bad, strict=True) if not found}
        print(f"{source}: {len(lines)} lines, {len(new)} of them new, {int(bad.sum())} dropped for overlap")
    print(f"together {len(kept)} lines")
    return list(kept.values())


def write(path: Path, lines: Iterable[str]) -> None:
    """Writes gzip that depends on the lines alone (no name, no time)."""
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), 9, mtime=0))


def _bytes(path: Path, package: str) -> bytes:
    if not path.is_file():
        raise InputError(f"There is no {path}: apt-get install {package}.")
    return path.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["wordnet", "extra"])
    parser.add_argument("out", type=Path, help="a .txt.gz file to write")
    parser.add_argument("--source", nargs="+", choices=list(EXTRA), default=["gcide"])
    arguments = parser.parse_args()
    try:
        write(arguments.out, build_wordnet() if arguments.what == "wordnet" else build_extra(arguments.source))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
