"""v2t: recover text from embeddings, and train the models that do."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from rich.console import Console

from v2t_jax import progress
from v2t_jax.cli.data import Data
from v2t_jax.cli.invert import Demo, Embed, Evaluate, Invert
from v2t_jax.cli.models import Convert, Embedders, Env, Push
from v2t_jax.config import Config, DistributedConfig, is_endpoint
from v2t_jax.errors import InputError

UNWINDING_SECONDS = 5.0  # from Ctrl-C to the end, at most

Chosen = TypeVar("Chosen")


def train(arguments: list[str]) -> None:
    """`v2t train RECIPE --workdir DIR [overrides]`: the recipe decides which options there are."""
    from v2t_jax.config import load_recipe

    usage = "v2t train configs/NAME.py --workdir DIR [--FIELD VALUE ...]"
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: {usage}\n\nv2t train configs/NAME.py --help lists the recipe's fields and their values.")
        return
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"The recipe comes first: {usage}.")
    recipe = load_recipe(arguments[0])
    # An empty name: the recipe's fields are options by their own paths, such as --inverter.num-steps.
    fields: list[Any] = [
        ("workdir", str),
        ("config", Annotated[type(recipe), tyro.conf.arg(name="")], recipe),
        ("distributed", DistributedConfig, DistributedConfig()),
    ]
    schema = dataclasses.make_dataclass("Train", fields)
    schema.__doc__ = f"Train {arguments[0]}. Run again with the same work directory, it goes on where it stopped."
    prog = f"v2t train {arguments[0]}"
    chosen: Any = parsed(lambda: tyro.cli(schema, args=arguments[1:], prog=prog))
    start_jax()
    with joined(chosen.distributed):
        check_devices()
        from v2t_jax.train.loop import TrainingStopped
        from v2t_jax.train.loop import train as run

        try:
            folder = run(chosen.config, Path(chosen.workdir))
        except TrainingStopped as stopped:
            print(f"v2t: {stopped}", file=sys.stderr)
            raise SystemExit(0 if stopped.preempted else 130) from None
    from v2t_jax.eval.evaluate import table
    from v2t_jax.parallel.processes import is_main

    if not is_main():
        return

    Console().print(table(json.loads((folder.parent / "evaluation.json").read_text())))
    used: Config = chosen.config
    asked = f" --embedder {used.embedder} --api.model {used.api.model}" if is_endpoint(used.embedder) else ""
    print(f'The model is in {folder}; try: v2t invert --model {folder}{asked} --text "..."')


@contextlib.contextmanager
def joined(options: DistributedConfig) -> Iterator[None]:
    """Takes part in a run of several processes, if there are several; a failure then ends this one at once."""
    from v2t_jax.parallel import processes

    processes.start(options)
    if processes.is_several() and not processes.is_main():
        progress.disable()  # one bar is enough
    try:
        yield
    except Exception as error:
        if not processes.is_several():
            raise
        fault = error if isinstance(error, InputError | OSError) else processes.explained(error)
        if fault is None:
            traceback.print_exc()
        else:
            print(f"v2t: {fault}", file=sys.stderr)
        processes.leave(1 if fault is None else 2)


def parsed(parse: Callable[[], Chosen]) -> Chosen:
    """What `parse`, a call of tyro, returns; its boxed complaint becomes an `InputError` of one sentence."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return parse()
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise InputError(_sentence(complaint.getvalue())) from None


def _sentence(box: str) -> str:
    """The gist of tyro's error box: its first part, the options it suggests, and where to read on."""
    lines = [line.strip("│╭╮╰╯|+ ") for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.endswith(("──", "---")):  # a rule, or the box's top with its title
            parts.append([])
        elif line:
            parts[-1].append(line)
    parts = [part for part in parts if part]
    if "╭" not in box:  # drawn in ASCII, where stdout is no UTF-8: the title is a part of its own
        parts = parts[1:]
    parts = parts or [["The command line can't be understood"]]
    gist = re.sub(r"^Error parsing __tyro\S*: ", "", " ".join(parts[0]).rstrip("."))
    gist = gist.replace("invalid literal for int() with base 10:", "it needs a whole number, not")
    said = [gist.replace("could not convert string to float:", "it needs a number, not")]
    for part in parts[1:]:
        if part[0].startswith("Perhaps you meant"):
            options = dict.fromkeys(match[0] for line in part if (match := re.match(r"--[\w.-]+", line)))
            said.append(f"perhaps you meant {' or '.join([*options][:3])}")
        elif part[0].startswith("For full helptext"):
            said.append(re.sub(r"For full helptext, (run|see):?", "for help run", " ".join(part)))
        elif part[0].startswith("Available subcommands"):
            said.append(" ".join(part).replace("Available subcommands", "there are").replace(":", ""))
    return "; ".join(said) + "."


def format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as people read it: without the place in the source."""
    return f"v2t: warning: {message}\n"


def start_jax() -> None:
    """Loads JAX, which takes a second or more, and lets it keep its compiled programs."""
    try:
        with progress.stage("starting JAX"):
            from v2t_jax.parallel.compile_cache import enable_compilation_cache

            enable_compilation_cache()
    except ValueError as error:  # of a setting in the environment
        raise InputError(
            f"JAX doesn't start ({error}); look at the environment variables that begin with JAX_."
        ) from error


def check_devices() -> None:
    """Refuses to go on where JAX has no device.

    Raises:
        InputError: that, such as JAX_PLATFORMS naming what isn't there.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX finds no device for JAX_PLATFORMS={platforms!r} ({str(error) or type(error).__name__}); unset or "
            "mend it, and see what there is with 'v2t env'."
        ) from error


@dataclass(frozen=True)
class _TrainHelp:
    """Train a recipe: v2t train configs/NAME.py --workdir DIR [typed overrides of any field]."""

    def run(self) -> None:
        train([])


def bench(arguments: list[str]) -> None:
    """`v2t bench WHAT [options]`: a list of commands of its own, each of which loads JAX."""
    start_jax()
    from v2t_jax.cli.bench import COMMANDS as BENCHMARKS

    about = "Measure, and compile for TPUs that aren't here."
    parsed(
        lambda: tyro.extras.subcommand_cli_from_dict(BENCHMARKS, args=arguments, prog="v2t bench", description=about)
    ).run()


@dataclass(frozen=True)
class _BenchHelp:
    """Measure beside PyTorch, and compile for TPUs that aren't here: v2t bench --help."""

    def run(self) -> None:
        bench(["--help"])


COMMANDS: dict[str, Any] = {
    **{"invert": Invert, "embed": Embed, "embedders": Embedders, "eval": Evaluate, "convert": Convert, "push": Push},
    **{"data": Data, "demo": Demo, "env": Env},
    "train": _TrainHelp,  # for the list of commands: what comes after `train` is parsed by the recipe's fields
    "bench": _BenchHelp,
}


def leave() -> NoReturn:
    """Ends the process at once."""
    print("v2t: interrupted", file=sys.stderr)
    sys.stderr.flush()
    # Threads of XLA may still be computing: an ordinary exit would take their memory away under them.
    os._exit(130)


def interrupt(*_: Any) -> NoReturn:
    """On Ctrl-C: unwinds, and leaves anyway if that comes to nothing."""
    last_resort = threading.Timer(UNWINDING_SECONDS, leave)
    last_resort.daemon = True
    last_resort.start()
    raise KeyboardInterrupt


def lost(unraisable: Any) -> None:
    """Python can't raise out of some of JAX's calls: a Ctrl-C that falls into one leaves at once."""
    if unraisable.exc_type is KeyboardInterrupt:
        leave()
    else:
        sys.__unraisablehook__(unraisable)


def main() -> None:
    """The command line. A mistake of the user's ends in one sentence and exit status 2."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the whole run)
        elif isinstance(stream, io.TextIOWrapper):  # an encoding that lacks a character is no reason to end
            stream.reconfigure(errors="backslashreplace")
    hook, sys.unraisablehook = sys.unraisablehook, lost
    progress.enable()
    warnings.formatwarning = format_warning
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["train"]:
            train(arguments[1:])
            return
        if arguments[:1] == ["bench"]:
            bench(arguments[1:])
            return
        command = parsed(
            lambda: tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, prog="v2t", description=__doc__)
        )
        start_jax()
        together = isinstance(command, Invert | Evaluate)
        with joined(command.distributed) if together else contextlib.nullcontext():
            if not isinstance(command, Env):  # that reports what doesn't work
                check_devices()
            command.run()
            sys.stdout.flush()
    except InputError as error:
        print(f"v2t: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        # What is left of the output goes nowhere, silently.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `v2t ... | head`: the reader has gone
            raise SystemExit(0) from None
        print(
            f"v2t: {error.filename or 'the output'}: {error.strerror or error}; mend that and try again.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except RuntimeError as error:
        import jax

        from v2t_jax.parallel.processes import explained

        said = explained(error) if isinstance(error, jax.errors.JaxRuntimeError) else None
        if said is None:
            raise
        print(f"v2t: {said}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        leave()
    finally:
        sys.unraisablehook = hook
        progress.disable()
