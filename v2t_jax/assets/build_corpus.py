"""Builds text corpora from Debian packages.

    python -m v2t_jax.assets.build_corpus wordnet OUT.txt.gz
    python -m v2t_jax.assets.build_corpus extra OUT.txt.gz [--source gcide foldoc bible]

`wordnet` (package wordnet-base; notice in WORDNET-NOTICE.txt) makes the packaged corpus: definitions and
examples, one a line, cleaned against its own held-out lines. `extra` makes more training text from
packages whose licences differ, so its output is not part of this project: gcide (dict-gcide, GPL-2+),
foldoc (dict-foldoc, GFDL), bible (sword-text-web, public domain). Every extra line that gives away a
held-out WordNet line is dropped (GCIDE copies many glosses).
"""

import gzip
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import tyro

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
_PARTS_OF_SPEECH = "n|a|v|i|t|p|pr|adv|adj|prep|conj|interj|imp|pl|sing|pron|superl|compar|vb"


def wordnet_lines() -> Iterator[str]:
    """Definitions and quoted examples of every synset, in the database's order."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in _bytes(WORDNET_FOLDER / f"data.{part}", "wordnet-base").decode("utf-8").splitlines():
            gloss = "" if line.startswith("  ") else line.partition(" | ")[2]  # the licence is indented
            for text in (gloss.partition('"')[0], *re.findall(r'"([^"]*)"', gloss)):
                text = _SPACE.sub(" ", text.replace("`", "'")).strip(" ;:,-")
                if _is_text(text):
                    yield text


def gcide_lines() -> Iterator[str]:
    """Definitions, examples and quotations of the GNU Collaborative International Dictionary of English."""
    # Letters written as names: [ae], ['e], [=a], [aum] (a umlaut).
    text = re.sub(r"\[(ae|oe|AE|OE)\]", r"\1", _dictionary("gcide"))
    text = re.sub(r"\[([a-z])um\]|\[['`\"^=~.]([A-Za-z])\]", lambda m: m.group(1) or m.group(2), text)
    for entry in re.split(r"\n(?=\S)", text):
        for number, paragraph in enumerate(re.split(r"\n\s*\n", entry)):
            yield from _gcide_paragraph(_SPACE.sub(" ", paragraph).strip(), head=number == 0)


def _gcide_paragraph(text: str, head: bool) -> Iterator[str]:
    for _ in range(2):  # brackets nest one deep
        text = re.sub(r"\[[^\[\]]*\]", " ", text)
    if head:
        # Pronunciation, part of speech and inflected forms, up to the first full word of the definition.
        text = text.rpartition("\\")[2] if "\\" in text else ""
        text = re.sub(r"^[\s,;]*(\([^()]*\)[\s,;]*)*", "", text)
        text = re.sub(rf"^(({_PARTS_OF_SPEECH})\b\.?[\s,;&]*)+", "", text)
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
    text = re.sub(r"[{}*]", "", text)
    for piece in (text, *quotations):
        for sentence in _sentences(piece):
            definition, _, example = sentence.partition("; as, ")
            yield from (definition, *example.split("; "))


def foldoc_lines() -> Iterator[str]:
    """Sentences of the Free On-line Dictionary of Computing."""
    for paragraph in re.split(r"\n\s*\n|\n(?=\S)", _dictionary("foldoc")):
        flat = re.sub(r"[{}]", "", re.sub(r"\[[^\[\]]*\]|<[^<>]*>|\{\([^{}]*\)\}", " ", paragraph))
        yield from _sentences(_SPACE.sub(" ", re.sub(r"^\s*\d+\.\s+", "", flat)))


def bible_lines() -> Iterator[str]:
    """Sentences of the World English Bible, out of the SWORD project's zlib blocks."""
    for part in ("ot", "nt"):
        index, blocks = (_bytes(BIBLE_FOLDER / f"{part}.{kind}", "sword-text-web") for kind in ("bzs", "bzz"))
        for i in range(0, len(index), 12):
            offset, size = (int.from_bytes(index[i + j : i + j + 4], "little") for j in (0, 4))
            markup = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "replace")
            markup = re.sub(r"(?s)<(note|title)\b.*?</\1>|<[^<>]*>", " ", markup)
            yield from _sentences(_SPACE.sub(" ", markup))


EXTRA = {"gcide": gcide_lines, "foldoc": foldoc_lines, "bible": bible_lines}


def _sentences(text: str) -> list[str]:
    return re.split(r"""(?<=[a-z0-9)][.!?])["')]*\s+(?=["'A-Z(])""", text.translate(_ASCII))


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
    held_out = {normalized for normalized in lines if is_held_out(normalized)}
    kept = held_out | _without_leaks("wordnet", lines.keys() - held_out, held_out)
    return [text for normalized, text in lines.items() if normalized in kept]


def build_extra(sources: Iterable[str]) -> list[str]:
    """Lines of the given sources that are neither in the packaged corpus nor give away its held-out lines."""
    known, held_out = (set(map(normalize_for_split, read_texts("wordnet", s))) for s in ("train", "held_out"))
    lines: dict[str, str] = {}
    for source in sources:
        found = unique(_tidy(EXTRA[source]()))
        kept = _without_leaks(source, found.keys() - known - lines.keys(), held_out)
        lines |= {normalized: text for normalized, text in found.items() if normalized in kept}
    return list(lines.values())


def _without_leaks(source: str, normalized: Iterable[str], held_out: Iterable[str]) -> set[str]:
    lines = list(normalized)
    kept = {line for line, leaks in zip(lines, HeldOutFilter(list(held_out)).leaking(lines), strict=True) if not leaks}
    print(f"{source}: {len(lines)} new lines for training, {len(lines) - len(kept)} dropped for overlap with held-out")
    return kept


def _bytes(path: Path, package: str) -> bytes:
    if not path.is_file():
        raise InputError(f"There is no {path}: apt-get install {package}.")
    return path.read_bytes()


def _dictionary(name: str) -> str:
    return gzip.decompress(_bytes(DICTIONARIES / f"{name}.dict.dz", f"dict-{name}")).decode("utf-8", "replace")


def main(
    what: tyro.conf.Positional[Literal["wordnet", "extra"]],
    out: tyro.conf.Positional[Path],
    source: tuple[Literal["gcide", "foldoc", "bible"], ...] = ("gcide",),
) -> None:
    try:
        lines = build_wordnet() if what == "wordnet" else build_extra(source)
    except InputError as error:
        sys.exit(str(error))
    # The bytes depend on the lines alone: no name, no time.
    out.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), 9, mtime=0))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
