"""What the README tells people to type works as printed, and links in the documents lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Appended to a README command so that it ends in seconds.
SHORTER = {
    "v2t train": "--inverter.num-steps 4 --corrector.num-steps 4 --evaluation.num-examples 4",
    "v2t eval": "--limit 4",
}


def shell_commands() -> list[str]:
    """The `v2t` commands of the README's section on the shell."""
    section = README.split("## Use it from a shell")[1].split("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    v2t ")]


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (document.parent / target).exists()]


@pytest.mark.parametrize("document", ["embedders.md", "stores.md"])
def test_what_is_refused_is_refused_in_these_words(document: str) -> None:
    """Each quotation in the document's tables stands in the code; "..." is what varies."""
    table = [row for row in (ROOT / "docs" / document).read_text("utf-8").splitlines() if row.startswith("| ")]
    quoted = [words for row in table for words in re.findall(r'"([^"]+)"', row)]
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "v2t_jax").rglob("*.py"))
    assert len(quoted) >= 9
    assert not [part for words in quoted for part in words.split("...") if part not in code]


@pytest.mark.slow
def test_the_shell_commands_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a small dog\nthe sun is a star\n", encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    vectors = np.random.default_rng(0).normal(size=(2, 384)).astype(np.float32)  # as wide as MiniLM's
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pq.write_table(pa.table({"id": [7, 8], "embedding": list(unit)}), tmp_path / "export.parquet")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = "from v2t_jax.cli.main import main; main()"
    commands = shell_commands()
    assert len(commands) >= 6
    for command in commands:
        extra = next((options for start, options in SHORTER.items() if command.startswith(start)), "")
        words = re.findall(r'"[^"]*"|\S+', f"{command} {extra}")
        arguments = [word.strip('"') for word in words][1:]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_python_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    cosine, _, text = capsys.readouterr().out.strip().partition(" ")
    assert 0 < float(cosine) <= 1 and text
