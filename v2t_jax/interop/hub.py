"""The Hugging Face hub: repositories by name from it, model folders to it."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from v2t_jax import progress
from v2t_jax.errors import InputError

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md")
OTHER_RUNTIMES = ["onnx/*", "openvino/*", "coreml/*"]
_WEIGHTLESS = ("Pooling", "Normalize")


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a repository's name, `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but for its types

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


@contextmanager
def _errors(name: str, failed: str, advice: str) -> Iterator[None]:
    """Turns errors of the hub's client into one sentence; other errors end in `failed` and `advice`."""
    from huggingface_hub import errors

    login = "run 'hf auth login'"
    sentences = {  # the first that fits: some are subclasses of others
        errors.GatedRepoError: f"{name} requires consent: accept its terms on the hub, then {login}",
        errors.HFValidationError: f"There is no folder {name!r}, and it is not a name on the hub (owner/name) either",
        errors.RepositoryNotFoundError: f"The hub has no {name}, or it is private: check the name, or {login}",
        errors.LocalEntryNotFoundError: f"{name} is not in the local cache and the hub can't be reached: connect, or "
        "give a local folder",
        errors.LocalTokenNotFoundError: f"You are not logged in to the hub: {login}",
        errors.RevisionNotFoundError: f"The hub's {name} has no such revision: give a branch, a tag or a whole commit",
        errors.HfHubHTTPError: f"{name} {failed} ({{}}): {login} with a token that may, or {advice}",
        Exception: f"{name} {failed} ({{}}): {advice}",  # of the network library, of the disk
    }
    try:
        yield
    except Exception as error:
        sentence = next(text for kind, text in sentences.items() if isinstance(error, kind))
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise InputError(sentence.replace("{}", reason) + ".") from error


def folder_of(name: str, patterns: Sequence[str] | None = None) -> Path:
    """A local folder as it is, else a repository's: see `download`."""
    return Path(name) if os.path.isdir(name) else download(name, patterns)


def download(name: str, patterns: Sequence[str] | None = None, revision: str | None = None) -> Path:
    """The folder of a repository's files: `owner/name`, or an old name such as `t5-base`; `patterns` as in `glob`.

    `revision` is a branch, a tag or a commit, by default the main branch.
    """
    from huggingface_hub import snapshot_download

    def fetch(wanted: Sequence[str]) -> Path:
        options: Any = {"allow_patterns": [*wanted], "ignore_patterns": OTHER_RUNTIMES}
        return Path(snapshot_download(name, revision=revision, **options))

    whole = f"{name}@{revision}" if revision else name
    stage = progress.stage(f"fetching {whole} from the Hugging Face hub")
    with stage, _errors(whole, "can't be fetched from the hub", "give a local folder instead"):
        folder = fetch(patterns or PATTERNS)
        inside = [] if patterns is not None else [config.parent for config in folder.rglob("config.json")]
        # Pickled weights only for folders without safetensors.
        bare = [one for one in inside if not (any(one.glob("*.safetensors")) or one.name.endswith(_WEIGHTLESS))]
        pickles = [(one.relative_to(folder) / "pytorch_model*.bin*").as_posix() for one in bare]
        return fetch(pickles) if pickles else folder


class Upload(NamedTuple):
    """What `push` sent, or would send: files as (name, bytes), and the repository's URL, None if nothing was sent."""

    files: tuple[tuple[str, int], ...]
    url: str | None = None

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


def push(folder: Path, repository: str, *, private: bool = True, dry_run: bool = True) -> Upload:
    """Sends a checked model folder to the hub, to a new or old repository; `dry_run` reports what it would send."""
    if not is_hub_name(repository):
        raise InputError(f"{repository!r} is not a repository's name: give it as owner/name.")
    # Nothing else in the folder: nobody means to publish a .env or a .git.
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = sorted({"config.json", "README.md", *record["files"]} & {file.name for file in folder.iterdir()})
    upload = Upload(tuple((name, (folder / name).stat().st_size) for name in names))
    if dry_run:
        return upload
    from huggingface_hub import HfApi

    api, message = HfApi(library_name="v2t_jax"), f"{folder.name}, by v2t_jax"
    stage = progress.stage(f"sending {upload.size / 1e6:.1f} MB to {repository}")
    with stage, _errors(repository, "can't be sent to the hub", "connect, then run the same command again"):
        api.create_repo(repository, private=private, exist_ok=True)
        sent = api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names, commit_message=message)
    return upload._replace(url=str(sent.repo_url))
