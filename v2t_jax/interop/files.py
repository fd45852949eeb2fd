"""Model folders on disk: tensors, configs and tokenizers read as Hugging Face writes them; folders written whole."""

import hashlib
import importlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
    """A tensor in a safetensors file: its shape, and its values, read at every access."""

    def __init__(self, path: Path, source: Any) -> None:
        self.shape: tuple[int, ...] = tuple(source.get_shape())
        self._path, self._source = path, source

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return np.asarray(self._source[index])
        except (OSError, SafetensorError, TypeError) as error:
            wrong = f"{self._path} is unreadable or of an unknown dtype ({error})"
            raise InputError(f"{wrong}; download it again.") from error


Tensor = StoredTensor | np.ndarray


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by its key; safetensors before `.bin`, one file or shards with an index."""
    return open_weights(weight_files(folder))


def open_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of files by its key."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        if path.suffix != ".safetensors":
            tensors |= read_torch_file(path)
            continue
        try:
            file = safe_open(path, "numpy")
            tensors |= {key: StoredTensor(path, file.get_slice(key)) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is damaged or no safetensors file ({error}); download it again.") from error
    return tensors


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, named without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def weight_files(folder: Path) -> list[Path]:
    """The file of a folder's weights, or all that its index names: safetensors before `.bin`."""
    for name in (SAFETENSORS, PICKLE):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(index, "a checkpoint").get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise InputError(f"{index} has no weight_map; download it again.")
            files = [folder / Path(shard).name for shard in sorted(set(shards.values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise InputError(f"{folder} lacks {missing[0]}, which its index names; download it again.")
            return files
    raise InputError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}; download it again.")


def sha256_of(files: Iterable[Path]) -> str:
    """The sha256 of a file; of several, that of their sha256s, in hexadecimal and in order."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_json(path: Path, what: str = "a complete model folder", otherwise: dict | list | None = None) -> Any:
    """The object (or, as `otherwise` is, list) in a JSON file of `what`; `otherwise` if there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if otherwise is not None:
            return otherwise
        raise InputError(f"{path} is missing: {path.parent} is not {what}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); download it again.") from error
    if not isinstance(values, dict if otherwise is None else type(otherwise)):
        raise InputError(f"{path} holds no JSON {'object' if otherwise != [] else 'list'}; download it again.")
    return values


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` as transformers understands it: types checked, old spellings made new, defaults filled in."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return _transformers().AutoConfig.for_model(**config).to_dict()
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"transformers can't read config.json ({' '.join(str(error).split())}); fix it.") from error


def folder_tokenizer(folder: Path) -> Tokenizer:
    """A folder's tokenizer: its tokenizer.json as it is, else converted by transformers from the older files."""
    # Not by AutoTokenizer: where tokenizer_config.json names no class, it guesses one by `model_type` and loses tokens.
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer(folder / "tokenizer.json")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        files = f"neither tokenizer.json nor {', '.join(TOKENIZER_FILES)}"
        raise InputError(f"{folder} has no tokenizer: {files}; download it again.")
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # of transformers, tokenizers, sentencepiece or protobuf
        wrong = f"The tokenizer in {folder} can't be converted: it is damaged or of an unknown kind"
        raise InputError(f"{wrong}; save a tokenizer.json there.") from error


def _transformers() -> Any:
    """transformers, imported only where something foreign is read: it takes a second."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of missing torch, and of others' configs
    return importlib.import_module("transformers")


def size(config: dict[str, Any], *names: str) -> int:
    """A whole number from 1 to 2**31 - 1 from a `config.json`, under the first of these names that is there."""
    name = next((name for name in names if name in config), names[-1])
    value = config.get(name)
    if type(value) is not int or not 1 <= value < 2**31:
        raise InputError(f"config.json has {name} = {value!r}; it must be a whole number from 1 to 2**31 - 1.")
    return value


class ShapeError(InputError):
    """A weight's shape differs from the one that the config implies: one of them belongs to another model."""


class Place(NamedTuple):
    """Where a tensor of theirs goes in an array of ours."""

    key: str
    target: np.ndarray  # part of our array, its axes in their order
    part: int  # ours is this one of `parts` equal parts of theirs, cut over its first axis
    parts: int


def places(table: Mapping[str, str], name: str, array: np.ndarray) -> Iterator[Place]:
    """The tensors that our array `name` ("layers/query/kernel") consists of.

    PyTorch's linear weights are [out, in], ours [in, out]; the layers of a stack are stacked on our leading axis.
    `table` is our module ("layers/query"; or a parameter that is none of kernel, scale and bias) -> their key without
    its ending: {} is the layer's number, and [i/n] the i-th of n matrices that they store as one.
    """
    module, _, kind = name.rpartition("/")
    module = module if kind in ("kernel", "scale", "bias") else name
    key, index, count = re.findall(r"([^[]+)(?:\[(\d)/(\d)\])?", table[module])[0]
    key += ".bias" if kind == "bias" else ".weight"
    share = int(index or 0), int(count or 1)
    for layer, target in enumerate(array) if "{}" in key else [(0, array)]:
        yield Place(key.format(layer), target.T if _is_matrix(name, target) else target, *share)


def _is_matrix(name: str, array: np.ndarray) -> bool:
    """Whether an array, of one layer, is multiplied with: the other tables with two axes are looked up in."""
    return array.ndim == 2 and not name.endswith(("_embedding", "relative_bias"))


def named(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by their paths, joined by "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fill(
    abstract: Any,
    table: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    what: str,
    *,
    ignored: str,
    dtype: str = "float32",
    put: Callable[[np.ndarray], Any] = lambda array: array,
) -> Params:
    """Parameters like `abstract` (a tree of shapes), filled from the `tensors` of `what` by a table of `places`.

    Args:
        ignored: pattern of keys that may be there and aren't read.
        dtype: of matrices; the rest is float32.
        put: takes each array when it is full, so that one at a time is in the host's memory.
    """
    empty = {name: np.broadcast_to(np.float32(0), leaf.shape) for name, leaf in named(abstract).items()}
    meant = {
        place.key: (place.parts * len(place.target), *place.target.shape[1:])
        for name, array in empty.items()
        for place in places(table, name, array)
    }
    if missing := [key for key in meant if key not in tensors]:
        wrong = "the file is incomplete or its config describes another model"
        raise InputError(f"The {what} weights lack {missing[0]!r}; {wrong}.")
    if unknown := sorted(key for key in tensors if key not in meant and not re.fullmatch(ignored, key)):
        raise InputError(f"The {what} weights hold the unknown key {unknown[0]!r}; its config describes another model.")
    for key, shape in meant.items():
        if tensors[key].shape != shape:
            raise ShapeError(f"{what} weight {key!r} has shape {tensors[key].shape}; its config implies {shape}.")

    def filled(name: str) -> np.ndarray:
        layer = next(places(table, name, empty[name])).target
        array = np.empty(empty[name].shape, dtype if _is_matrix(name, layer) else np.float32)
        for key, target, i, _ in places(table, name, array):
            values = tensors[key][i * len(target) : (i + 1) * len(target)]
            if not jnp.issubdtype(values.dtype, jnp.floating):  # numpy's own doesn't know bfloat16
                wrong = f"{what} weight {key!r} is of dtype {values.dtype}; quantized weights aren't read"
                raise InputError(f"{wrong}: give those of float32, float16 or bfloat16.")
            target[...] = values
        return array

    return jax.tree.unflatten(jax.tree.structure(abstract), [put(filled(name)) for name in empty])


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file, whole or not at all, to the disk; returns its entry for a manifest: "bytes" and "sha256"."""
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


@contextmanager
def whole_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder, filled elsewhere beside it and renamed at the end: it appears whole or not at all."""
    check_new(folder, replace)
    parent, prefix = folder.parent, f".{folder.name}-"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True) as around:
            building = Path(around) / folder.name
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


def check_new(folder: Path, replace: bool = False) -> None:
    """Refuses a target of `whole_folder` that can't be replaced, or that isn't to be and exists."""
    try:
        is_link, is_here = folder.is_symlink(), folder.exists() and folder.samefile(".")
        if is_link or is_here or folder.is_mount():
            kind = "a link" if is_link else "the current folder" if is_here else "a mounted disk"
            raise InputError(f"{folder} is {kind}, which can't be replaced; give another folder, as one inside it.")
        if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists already; give a new or an empty folder.")
        above = next(parent for parent in folder.absolute().parents if parent.exists())
    except OSError as error:
        raise InputError(f"{folder} can't be written ({error}); give another folder.") from error
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{folder} can't be written: {above} is no folder or can't be written to; give another.")
