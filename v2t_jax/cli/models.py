"""The commands embedders, convert, push and env."""

import dataclasses
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from v2t_jax import progress
from v2t_jax.cli.invert import endpoint_options, open_embedder, print_table
from v2t_jax.config import ApiConfig
from v2t_jax.errors import InputError


@dataclass(frozen=True)
class Embedders:
    """List the embedders known by name, with pooling, normalization, prefixes, license, width and maximum length."""

    json: bool = False  # print a JSON document instead of a table

    def run(self) -> None:
        from v2t_jax.embedders.known import KNOWN

        if self.json:
            hidden = ("packages", "raw")
            rows = [{"name": name, **dataclasses.asdict(known)} for name, known in KNOWN.items()]
            print(json.dumps([{k: v for k, v in row.items() if k not in hidden} for row in rows], indent=1))
            return
        looks: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": 0, "show_edge": False}
        table, prefixes = Table(**looks), Table(**looks)
        for column in ("name, and on the hub", "width", "tokens", "pooling", "L2", "license"):
            table.add_column(column, no_wrap=True, justify="right" if column in ("width", "tokens") else "left")
        for column in ("name", "before stored documents (as here)", "before queries"):
            prefixes.add_column(column, no_wrap=column == "name", overflow="fold")
        for name, known in KNOWN.items():
            sizes, unit = (str(known.width), str(known.max_length)), "yes" if known.normalize else "no"
            table.add_row(f"{name}\n  {known.hub}", *sizes, known.pooling, unit, known.licence)
            given = [escape(repr(prefix)) if prefix else "-" for prefix in (known.document_prefix, known.query_prefix)]
            if known.document_prefix or known.query_prefix:
                prefixes.add_row(name, *given)
        print_table(table)
        print()
        Console().print(prefixes)


@dataclass(frozen=True)
class Convert:
    """Convert models: v2t convert --from vec2text --inverter DIR --corrector DIR --t5 DIR --embedder DIR OUT, and back:
    v2t convert --to vec2text MODEL OUT."""

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """the folder to write; with --to, the model and the folder to write"""
    source: Annotated[Literal["vec2text"] | None, tyro.conf.arg(name="from")] = None
    """vec2text: PyTorch checkpoints of the original vec2text"""
    target: Annotated[Literal["vec2text"] | None, tyro.conf.arg(name="to")] = None
    """vec2text: folders inverter and corrector that the original vec2text loads"""
    inverter: str | None = None  # folder or hub name of the inverter
    corrector: str | None = None  # folder or hub name of the corrector; without it, the model only makes first guesses
    t5: str | None = None  # folder or hub name of the T5 they were trained from; by default the inverter's own record
    embedder: str | None = None
    """the embedder they invert: a known name, a folder, or an endpoint's base URL; by default the inverter's record"""
    api: ApiConfig = ApiConfig()

    def run(self) -> None:
        from v2t_jax.vec2text.convert import from_vec2text, to_vec2text

        if (self.source is None) == (self.target is None):
            raise InputError("Pass either --from vec2text or --to vec2text.")
        if self.source is not None:
            if self.inverter is None or len(self.paths) != 1:
                raise InputError("With --from vec2text, pass --inverter, and pass one path: the model folder to write.")
            embedder = open_embedder(self.embedder, self.api)
            from_vec2text(Path(self.paths[0]), self.inverter, self.corrector, self.t5, embedder)
            options = shlex.join(["--model", self.paths[0], *endpoint_options(self.embedder, self.api)])
            print(f"The model is in {self.paths[0]}; try: v2t invert {options} --embeddings vectors.npy")
            return
        if len(self.paths) != 2:
            raise InputError("With --to, pass two paths: the model folder, and the folder to write.")
        if self.inverter or self.corrector or self.t5 or self.embedder or self.api != ApiConfig():
            raise InputError(
                "--inverter, --corrector, --t5, --embedder and --api belong to --from; with --to, pass only two paths."
            )
        to_vec2text(self.paths[0], Path(self.paths[1]))
        print(f"The checkpoints are in {self.paths[1]}/inverter and {self.paths[1]}/corrector.")


@dataclass(frozen=True)
class Push:
    """Upload a model to the Hugging Face hub; without --upload, only list what would be uploaded."""

    model: tyro.conf.Positional[str]  # a model folder, or the name of a packaged model
    repository: tyro.conf.Positional[str]  # the repository to upload to: OWNER/NAME
    embedder: str | None = None  # the model's embedder, if it has moved since the model was made
    public: bool = False  # if the repository has to be created, make it public
    upload: bool = False  # upload

    def run(self) -> None:
        from v2t_jax.interop.hub import push
        from v2t_jax.inversion.pipeline import load, locate_model

        embedder = load(self.model, self.embedder).embedder.name  # refuses what is damaged or lacks its embedder
        if os.path.isdir(embedder):
            progress.note(f"The model's embedder is the folder {embedder}; other users must pass --embedder.")
        sent = push(locate_model(self.model), self.repository, private=not self.public, dry_run=not self.upload)
        for name, size in (*sent.files, ("in total", sent.size)):
            print(f"{size / 1e6:10.3f} MB  {name}")
        if sent.url is not None:
            print(f"The model is at {sent.url}; try: v2t invert --model {self.repository} --text ...")
        else:
            kind = "public" if self.public else "private"
            print(f"Nothing was uploaded; --upload sends it to {self.repository} ({kind} if it doesn't exist yet).")


@dataclass(frozen=True)
class Env:
    """Print versions, devices and packaged assets, for bug reports."""

    def run(self) -> None:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        import jax

        from v2t_jax.data.readers import WORDNET
        from v2t_jax.embedders.load import KNOWN, locate
        from v2t_jax.inversion.pipeline import packaged_models
        from v2t_jax.parallel.compile_cache import enable_compilation_cache

        print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
        names = "v2t_jax jax jaxlib flax optax orbax-checkpoint transformers tokenizers safetensors numpy sacrebleu"
        for name in (*names.split(), "tensorflow-datasets", "tyro", "rich"):
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name} is not installed")
        try:
            print(f"devices: {', '.join(f'{d.platform} {d.device_kind}' for d in jax.devices())}")
        except (RuntimeError, AssertionError) as error:  # a failing JAX belongs in the report
            print(f"devices: none, JAX doesn't start: {error}")
        print(f"compiled programs: {enable_compilation_cache() or 'not kept'}")
        print(f"packaged text: wordnet, {WORDNET.stat().st_size / 1e6:.1f} MB" if WORDNET.is_file() else "no wordnet")
        print(f"packaged models: {', '.join(packaged_models()) or 'none'}")
        os.environ["HF_HUB_OFFLINE"] = "1"  # report what is here; download nothing
        for name, known in KNOWN.items():
            try:
                print(f"embedder {name}: {locate(name)}")
            except InputError as error:
                if known.packages:  # of the others, most are missing on any machine
                    print(f"embedder {name}: {error}")
