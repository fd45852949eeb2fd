"""Model folders on disk: tensors, configs and tokenizers read as Hugging Face writes them; folders written whole.

Our parameters differ from PyTorch projects' in three ways: the layers of a stack are stacked on a leading axis, linear
weights are [in, out] where torch has [out, in], and matrices that are stored as one are kept apart.
"""

import hashlib
import importlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from v2t_jax.data.vocabulary import read_tokenizer
from v2t_jax.errors import InputError
from v2t_jax.interop.torch_files import read_torch_file
from v2t_jax.models.layers import Params

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
TOKENIZER_FILES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


class StoredTensor:
    """A tensor in a file: its shape, and its values, read at every access (of a pickle, a view of the mapped file)."""

    def __init__(self, path: Path, source: Any, shape: Any) -> None:
        self.shape: tuple[int, ...] = tuple(shape)
        self._path, self._source = path, source

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return np.asarray(self._source[index])
        except (OSError, SafetensorError, TypeError) as error:
            raise InputError(
                f"{self._path} is unreadable or of an unknown dtype ({error}); download it again."
            ) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype, copy=copy)


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by its key; safetensors before `.bin`, one file or shards with an index.

    Raises:
        InputError: no weights, a damaged or missing file, or a `.bin` that contains more than weights.
    """
    return open_weights(weight_files(folder))


def open_weights(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Every tensor of files by its key; see `open_checkpoint`."""
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            tensors |= _open_safetensors(path)
        else:
            tensors |= {key: StoredTensor(path, array, array.shape) for key, array in read_torch_file(path).items()}
    return tensors


def sha256_of(files: Iterable[Path]) -> str:
    """The sha256 of a file; of several, that of their sha256s, in hexadecimal and in order."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file, whole or not at all; it is on disk when this returns.

    Returns:
        Its entry for a manifest: "bytes" and "sha256".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    digest, size = hashlib.sha256(), 0
    with temporary.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return {"bytes": size, "sha256": digest.hexdigest()}


def part(tensors: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """The tensors under a prefix, named without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def weight_files(folder: Path) -> list[Path]:
    """The file of a folder's weights, or all that its index names: safetensors before `.bin`.

    Raises:
        InputError: there is none, or the index is damaged or names files that are missing.
    """
    for name in (SAFETENSORS, PICKLE):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index, "a checkpoint").get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise InputError(f"{index} has no weight_map; download it again.")
            files = [folder / Path(shard).name for shard in sorted(set(shards.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise InputError(f"{folder} lacks {missing[0]}, which its index names; download it again.")
            return files
    raise InputError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}; download it again.")


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        file = safe_open(path, "numpy")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({error}); download it again.") from error
    return {key: StoredTensor(path, values, values.get_shape()) for key, values in slices.items()}


def read_json(path: Path, what: str, kind: type = dict) -> Any:
    """An object, or another `kind` of value, from a JSON file of `what`.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {path.parent} is not {what}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); download it again.") from error
    if not isinstance(values, kind):
        raise InputError(f"{path} holds no JSON {'object' if kind is dict else kind.__name__}; download it again.")
    return values


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` as transformers understands it: old spellings made new, fields that it leaves out filled in.

    Raises:
        InputError: transformers doesn't know the `model_type`, or a field is of the wrong type.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return _transformers().AutoConfig.for_model(**config).to_dict()
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"transformers can't read config.json ({' '.join(str(error).split())}); fix it.") from error


def folder_tokenizer(folder: Path) -> Tokenizer:
    """A folder's tokenizer: its tokenizer.json as it is, else converted by transformers from the older files.

    A tokenizer.json isn't read by AutoTokenizer: where tokenizer_config.json names no class, that guesses one by
    `model_type` and rebuilds the tokenizer, which can lose tokens.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer(folder / "tokenizer.json")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{folder} has no tokenizer: neither tokenizer.json nor {', '.join(TOKENIZER_FILES)}; download it again."
        )
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer.backend_tokenizer
    except Exception as error:  # of transformers, tokenizers, sentencepiece or protobuf
        raise InputError(
            f"The tokenizer in {folder} can't be converted: its files are damaged or of an unknown kind; save a "
            "tokenizer.json there."
        ) from error


def _transformers() -> Any:
    """transformers, imported only where something foreign is read: it takes a second."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of missing torch, and of others' configs
    return importlib.import_module("transformers")


def size(config: dict[str, Any], *names: str) -> int:
    """A whole number from 1 to 2**31 - 1 from a `config.json`, under the first of these names that is there.

    Raises:
        InputError: it is something else.
    """
    name = next((name for name in names if name in config), names[-1])
    value = config.get(name)
    if type(value) is not int or not 1 <= value < 2**31:
        raise InputError(f"config.json has {name} = {value!r}; it must be a whole number from 1 to 2**31 - 1.")
    return value


class ShapeError(InputError):
    """A weight's shape differs from the one that the config implies: one of them belongs to another model."""


class Tensor(Protocol):
    """An array, or something that can be read as one, whole or in part."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: Any) -> np.ndarray: ...


class Entry(NamedTuple):
    """Where a tensor of theirs goes in our parameters."""

    theirs: str
    ours: tuple[str, ...]
    layer: int | None  # index on our leading axis, None where there is no such axis
    transposed: bool
    part: tuple[int, int] = (0, 1)
    """(i, n): ours is the i-th of n equal parts of theirs, cut over its first axis"""


def fill(
    abstract: Any,
    entries: Iterable[Entry],
    tensors: Mapping[str, Tensor],
    what: str,
    ignored: Callable[[str], bool],
    kernel_dtype: str = "float32",
    put: Callable[[np.ndarray], Any] = lambda array: array,
) -> Params:
    """Parameters like `abstract` (a tree of shapes), filled from `tensors`.

    One of our arrays is in the host's memory at a time, if `put` takes it away.

    Args:
        what: the architecture's name, for errors.
        ignored: keys that may be there and aren't read.
        kernel_dtype: of what is only ever multiplied with in this dtype; the rest is float32.
        put: takes each array when it is full.

    Raises:
        InputError: a key is missing, unknown, of another shape than the config implies, or quantized.
    """
    parts: dict[tuple[str, ...], list[Entry]] = {}
    used = set()
    for entry in entries:
        parts.setdefault(entry.ours, []).append(entry)
        used.add(entry.theirs)
        if entry.theirs not in tensors:
            raise InputError(
                f"The {what} weights lack {entry.theirs!r}; the file is incomplete or its config describes another "
                "model."
            )
    unknown = sorted(key for key in tensors if key not in used and not ignored(key))
    if unknown:
        raise InputError(f"The {what} weights hold the unknown key {unknown[0]!r}; its config describes another model.")

    def filled(path: tuple[Any, ...], leaf: Any) -> Any:
        chosen = parts[tuple(step.key for step in path)]
        for entry in chosen:  # before there is an array of the size that the config implies
            shape = leaf.shape if entry.layer is None else leaf.shape[1:]
            shape = shape[::-1] if entry.transposed else shape
            found, meant = tensors[entry.theirs].shape, (entry.part[1] * shape[0], *shape[1:])
            if found != meant:
                raise ShapeError(f"{what} weight {entry.theirs!r} has shape {found}; its config implies {meant}.")
        array = np.zeros(leaf.shape, kernel_dtype if chosen[0].transposed else np.float32)
        for entry in chosen:
            target = array if entry.layer is None else array[entry.layer]
            target = target.T if entry.transposed else target
            i = entry.part[0]
            values = tensors[entry.theirs][i * target.shape[0] : (i + 1) * target.shape[0]]
            target[...] = real_numbers(values, f"{what} weight {entry.theirs!r}")
        return put(array)

    return jax.tree_util.tree_map_with_path(filled, abstract)


def real_numbers(values: np.ndarray, where: str) -> np.ndarray:
    """The values themselves.

    Raises:
        InputError: they are quantized.
    """
    if not jnp.issubdtype(values.dtype, jnp.floating):  # numpy's own doesn't know bfloat16
        raise InputError(
            f"{where} is of dtype {values.dtype}; quantized weights aren't read: give those of float32, float16 or "
            "bfloat16."
        )
    return values


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder, filled elsewhere beside it and renamed at the end: it appears whole or not at all.

    Args:
        replace: whether what lies at `folder` goes.

    Raises:
        InputError: there is something at `folder`, or it can't be written.
    """
    if replace:
        _check_replaceable(folder)
    else:
        check_new(folder)
    around = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        around = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        building = around / folder.name
        building.mkdir()
        yield building
        mode = building.stat().st_mode & 0o666  # the umask's; what safetensors writes is its owner's alone
        for path in building.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} can't be written ({error}); free space or give another folder.") from error
    finally:
        if around is not None:
            shutil.rmtree(around, ignore_errors=True)


def check_new(folder: Path) -> None:
    """Refuses a target of `whole_folder` where something lies.

    Raises:
        InputError: there is something at `folder`, or it can't be replaced.
    """
    _check_replaceable(folder)
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        above = next(parent for parent in folder.absolute().parents if parent.exists())
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error}); give another folder.") from error
    if taken:
        raise InputError(f"{folder} exists already; give a new or an empty folder.")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder} can't be written: {above} is no folder or can't be written to; give another.")


def _check_replaceable(folder: Path) -> None:
    """Refuses what another folder can't be renamed to."""
    try:
        is_link, is_here = folder.is_symlink(), folder.exists() and folder.samefile(".")
        if is_link or is_here or folder.is_mount():
            kind = "a link" if is_link else "the current folder" if is_here else "a mounted disk"
            raise InputError(
                f"{folder} is {kind}, which can't be replaced; give another folder, such as one inside it."
            )
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error}); give another folder.") from error
