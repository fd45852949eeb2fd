"""The Hugging Face hub: folders by name from it, model folders to it."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2t_jax import progress
from v2t_jax.errors import InputError

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md")
OTHER_RUNTIMES = ["onnx/*", "openvino/*", "coreml/*"]


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a repository's name, `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but for its types

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def folder_of(name: str, patterns: Sequence[str] | None = None) -> Path:
    """A local folder as it is, else a repository's: see `download`."""
    return Path(name) if os.path.isdir(name) else download(name, patterns)


def download(name: str, patterns: Sequence[str] | None = None) -> Path:
    """The folder of a repository's files, from the hub's own cache where they are there and unchanged.

    Args:
        name: `owner/name`, or one of the old names without an owner, such as `t5-base`.
        patterns: the files to fetch; by default those of a model.

    Raises:
        InputError: there is no such repository, it may not be read, or the hub can't be reached and the cache has none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        with progress.stage(f"fetching {name} from the Hugging Face hub"):
            wanted = [*(patterns or PATTERNS)]
            folder = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=OTHER_RUNTIMES))
            pickles = [] if patterns is not None else _pickles(folder)
            if pickles:
                snapshot_download(name, allow_patterns=pickles, ignore_patterns=OTHER_RUNTIMES)
            return folder
    except GatedRepoError as error:
        raise InputError(f"{name} asks for consent: accept its terms on the hub, then run 'hf auth login'.") from error
    except HFValidationError as error:
        raise InputError(f"There is no folder {name!r}, and it is no name on the hub (owner/name) either.") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"The hub has no {name}, or it is private: check the name, or run 'hf auth login' first."
        ) from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{name} is not in the local cache and the hub can't be reached: connect, or give a local folder."
        ) from error
    except Exception as error:  # of the hub's client, of its network library, of the disk
        raise InputError(
            f"{name} can't be fetched from the hub ({type(error).__name__}: {error}); give a local folder instead."
        ) from error


def _pickles(folder: Path) -> list[str]:
    """Patterns of the pickles that stand where no safetensors do; torch's loader of weights alone reads them."""
    lacking = [
        config.parent.relative_to(folder)
        for config in folder.rglob("config.json")
        if not any(config.parent.glob("*.safetensors")) and not config.parent.name.endswith(("Pooling", "Normalize"))
    ]
    return [(place / "pytorch_model*.bin*").as_posix() for place in lacking]


@dataclass(frozen=True)
class Upload:
    """What `push` sends, or would send."""

    repository: str
    files: tuple[tuple[str, int], ...]  # (name, bytes)
    url: str | None = None  # where they are now; None: nothing was sent

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.files)


def push(folder: Path, repository: str, *, private: bool = True, dry_run: bool = True, api: Any = None) -> Upload:
    """Sends a model folder to the hub, making the repository if there is none.

    Args:
        folder: a whole model folder, as `v2t_jax.load` takes it; checking it is the caller's.
        repository: `owner/name`.
        private: whether a new repository is closed to others.
        dry_run: only say what would be sent.
        api: a `huggingface_hub.HfApi`; by default of the account that is logged in.

    Raises:
        InputError: the name is none of a repository, nobody is logged in, or the hub refuses.
    """
    if not is_hub_name(repository):
        raise InputError(f"{repository!r} is no repository's name: give it as owner/name.")
    # Nothing else that lies there: nobody means to publish a .env or a .git.
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = sorted({"config.json", "README.md", *record["files"]} & {file.name for file in folder.iterdir()})
    upload = Upload(repository, tuple((name, (folder / name).stat().st_size) for name in names))
    if dry_run:
        return upload
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = api or HfApi(library_name="v2t_jax")
    try:
        with progress.stage(f"sending {upload.size / 1e6:.1f} MB to {repository}"):
            api.create_repo(repository, private=private, exist_ok=True)
            sent = api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=[name for name, _ in upload.files],
                commit_message=f"{folder.name}, by v2t_jax",
            )
    except LocalTokenNotFoundError as error:
        raise InputError("Nobody is logged in to the hub: run 'hf auth login' first.") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"The hub did not take {repository} ({reason}); run 'hf auth login' with a token that may write there."
        ) from error
    except Exception as error:  # of the network library, of the disk
        raise InputError(
            f"{repository} can't be sent to the hub ({type(error).__name__}: {error}); connect, then run the same "
            "command again."
        ) from error
    return Upload(repository, upload.files, str(sent.repo_url))
