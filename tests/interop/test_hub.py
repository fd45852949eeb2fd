"""Models from the hub and to it, over real requests to a hub on this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_hub import FakeHub, commit, running_hub
from tests.helpers.tiny_model import make_model
from tests.helpers.tiny_run import make_embedder
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
from v2t_jax.interop.hub import is_hub_name, push

V2T = "from v2t_jax.cli.main import main; main()"
REFUSALS = """
import sys
from v2t_jax.errors import InputError
from v2t_jax.interop.hub import download
for name in sys.argv[1:]:
    try:
        print(download(name))
    except InputError as error:
        print(error)
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("hub"))


def run(hub_url: str, home: Path, code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client settles where the hub is when it is imported."""
    settings = os.environ | {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | environment
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)


def test_there_and_back(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folder, tmp_path / "tiny")
    (folder / ".env").write_text("SECRET=1")
    (folder / ".git").mkdir()
    dry = run(hub.url, tmp_path, V2T, "push", str(folder), "me/tiny", HF_TOKEN=hub.TOKEN)
    assert dry.returncode == 0 and "Nothing was uploaded" in dry.stdout and "inverter.safetensors" in dry.stdout
    assert hub.requests == []
    sent = run(hub.url, tmp_path, V2T, "push", str(folder), "me/tiny", "--upload", HF_TOKEN=hub.TOKEN)
    assert sent.returncode == 0, sent.stderr
    assert f"The model is at {hub.url}/me/tiny" in sent.stdout and hub.private == {"me/tiny": True}
    assert hub.repositories["me/tiny"] == {
        file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")
    }
    hub.repositories["me/tiny"]["pytorch_model.bin"] = b"a pickle"
    options = ("--text", "the red cat", "--num-steps", "0", "--sequence-beam-width", "2", "--batch-size", "1", "--json")
    local = run(hub.url, tmp_path, V2T, "invert", "--model", str(folder), *options)
    fetched = run(hub.url, tmp_path, V2T, "invert", "--model", "me/tiny", *options)
    assert fetched.returncode == 0, fetched.stderr
    assert fetched.stdout == local.stdout
    assert not any("pytorch_model.bin" in asked for asked in hub.requests)
    # The hub is gone, the model is still here.
    offline = run("http://127.0.0.1:9", tmp_path, V2T, "invert", "--model", "me/tiny", *options, HF_HUB_OFFLINE="1")
    assert offline.stdout == local.stdout


EMBEDDINGS = """
import sys
from v2t_jax.embedders.load import load_embedder
from v2t_jax.errors import InputError
for name in sys.argv[1:]:
    try:
        embedder = load_embedder(name)
        print(embedder.name, embedder.width, embedder.embed(["a dog"])[0, 0])
    except InputError as error:
        print(error)
"""


def test_an_embedder_of_a_revision(hub: FakeHub, tmp_path: Path) -> None:
    first = {}
    for i, revision in enumerate(("", "@v1.0")):
        folder = make_embedder(tmp_path / f"embedder{i}", seed=i)
        first[revision] = load_embedder(str(folder)).embed(["a dog"])[0, 0]
        content = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        hub.repositories[f"me/emb{revision}"] = content
    names = ["me/emb", "me/emb@v1.0", f"me/emb@{commit('v1.0')}", "me/emb@v1.0:8", "mean@me/emb@v1.0", "me/emb@v2"]
    said = run(hub.url, tmp_path, EMBEDDINGS, *names).stdout.splitlines()
    numbers = [float(line.split()[-1]) for line in said[:3]]
    np.testing.assert_allclose(numbers, [first[""], first["@v1.0"], first["@v1.0"]], rtol=1e-5)
    assert [line.split()[0] for line in said[:5]] == names[:5]
    assert "The hub's me/emb@v2 has no such revision: give a branch, a tag or a whole commit." in said[-1]


def test_what_the_hub_refuses(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    hub.repositories["me/gated"], hub.gated = {}, {"me/gated"}
    said = run(hub.url, tmp_path, REFUSALS, "me/none", "me/gated").stdout.splitlines()
    assert len(said) == 2
    assert said[0].startswith("The hub has no me/none, or it is private")
    assert said[1].startswith("me/gated requires consent")
    said = run("http://127.0.0.1:9", tmp_path, REFUSALS, "me/none").stdout.splitlines()
    assert len(said) == 1 and "the hub can't be reached" in said[0]
    for token in ("hf_of_somebody_else", ""):
        ended = run(hub.url, tmp_path, V2T, "push", str(folder), "me/tiny", "--upload", HF_TOKEN=token)
        assert ended.returncode == 2 and "hf auth login" in ended.stderr and "Traceback" not in ended.stderr
    assert "me/tiny" not in hub.repositories
    alone = "http://127.0.0.1:9"
    ended = run(alone, tmp_path, V2T, "push", str(folder), "me/tiny", "--upload", HF_TOKEN=hub.TOKEN)
    assert ended.returncode == 2 and "can't be sent to the hub" in ended.stderr and "Traceback" not in ended.stderr


def test_names() -> None:
    assert is_hub_name("owner/name-1.0") and not any(
        map(is_hub_name, ("name", "a/b/c", "../x/y", "https://h/x", "", "owner/..name", "owner/a--b", "owner/name.git"))
    )
    with pytest.raises(InputError, match="'tiny' is not a repository's name"):
        push(Path(), "tiny")


def test_a_damaged_model_is_not_sent(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "inverter.safetensors").write_bytes(b"")
    ended = run(hub.url, tmp_path, V2T, "push", str(broken), "me/tiny", "--upload", HF_TOKEN=hub.TOKEN)
    assert ended.returncode == 2 and "truncated or altered" in ended.stderr and hub.requests == []
