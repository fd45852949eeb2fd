"""v2t: recover text from embeddings, and train the models that do."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import tyro

from v2t_jax import progress
from v2t_jax.cli import data, train
from v2t_jax.cli.audit import Audit
from v2t_jax.cli.defend import Defend, Study
from v2t_jax.cli.invert import Calibrate, Demo, Embed, Eval, Invert
from v2t_jax.cli.models import Convert, Embedders, Env, Push
from v2t_jax.config import Config, DistributedConfig
from v2t_jax.errors import InputError

UNNAMED = ("config", "settings")  # fields of commands whose own fields are options by their own paths
# What a call in Python gives, and a command by an option.
PYTHON = {
    "embedder=HttpEmbedder(...)": "embedder=https://HOST/v1 api.model=NAME",
    "dequantize(vectors, ranges)": "ranges=FILE",
}
UNWINDING_SECONDS = 5.0  # from Ctrl-C to the end, at most


@dataclass(frozen=True)
class Data:
    """Corpora and data sets: corpus, build, import, embed, hypotheses, tfds."""


@dataclass(frozen=True)
class Bench:
    """Measure speed, compile for TPUs that aren't here, and estimate how long training takes."""


# Data, Train and Bench are listed here, and parsed by `parse`.
LISTED = (
    Invert,
    Audit,
    Defend,
    Study,
    Embed,
    Embedders,
    Eval,
    Calibrate,
    Convert,
    Push,
    Data,
    Demo,
    Env,
    train.Train,
    Bench,
)
COMMANDS: dict[str, Any] = {command.__name__.lower(): command for command in LISTED}


def parse(arguments: list[str]) -> Any:
    """The command that the arguments describe. Without --help, what loads JAX is left to its `run`."""
    commands, prog = COMMANDS, "v2t"
    about: str | None = __doc__
    match arguments:
        case ["train", *options]:
            return train.parse(options)
        case ["data", *arguments]:
            commands, prog, about = data.COMMANDS, "v2t data", Data.__doc__
        case ["bench", *arguments]:
            start_jax()
            from v2t_jax.cli.bench import COMMANDS as commands

            prog, about = "v2t bench", Bench.__doc__
    return tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog=prog, description=about)


def start_jax() -> None:
    """Loads JAX, which takes a second or more, and lets it keep its compiled programs."""
    try:
        with progress.stage("starting JAX"):
            from v2t_jax.parallel.compile_cache import enable_compilation_cache

            enable_compilation_cache()
    except ValueError as error:
        raise InputError(f"JAX doesn't start ({error}); check the variables that begin with JAX_.") from error


def check_devices() -> None:
    """Refuses to go on without a device, as where JAX_PLATFORMS names one that isn't there."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        said = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} ({str(error) or type(error).__name__})"
        raise InputError(f"JAX finds no device for {said}; unset or fix it; 'v2t env' lists the devices.") from error


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
        if (fault := explained(error)) is None:
            traceback.print_exc()
        else:
            print(f"v2t: {fault}", file=sys.stderr)
        processes.leave(1 if fault is None else 2)


def explained(error: Exception) -> object:
    """What went wrong and what a user can do about it; None for a bug."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError):
        return f"{error.filename or 'the output'}: {error.strerror or error}; fix that and try again."
    from v2t_jax.parallel import processes

    return processes.explained(error)


def option_names(command: Any, prefix: str = "") -> Iterator[str]:
    """Names of the options of a command or of its class, as its fields and theirs: num_steps, api.model."""
    for field in dataclasses.fields(command):
        if dataclasses.is_dataclass(value := getattr(command, field.name, None)):
            yield from option_names(value, prefix if field.name in UNNAMED else f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


@contextlib.contextmanager
def naming_options(names: Iterable[str]) -> Iterator[None]:
    """Errors and warnings inside name arguments as Python does; here they are named as typed: `--num-steps 0`.

    An ordinary word, such as `search`, is an argument only before "=", or where a message begins with it.
    """
    names = sorted(names, key=len, reverse=True)
    every, compound = ("|".join(map(re.escape, some)) for some in (names, [n for n in names if {*"_."} & {*n}]))
    given = rf"({every})=(\S*?)(?=[,;:.)]*(?:\s|$))"
    pattern = rf"(?<![\w./'\"-])(?:{given}|({compound or '(?!)'})(?![\w/]|\.\w)|^({every})(?= is ))"

    def typed(found: re.Match[str]) -> str:
        option = f"--{(found[1] or found[3] or found[4]).replace('_', '-')}"
        return f"{option} {found[2].strip(chr(34))}" if found[1] else option

    def renamed(said: str) -> str:
        for python, options in PYTHON.items():
            said = said.replace(python, options)
        return re.sub(pattern, typed, said)

    formatted = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"v2t: warning: {renamed(str(message))}\n"
    try:
        yield
    except InputError as error:
        raise InputError(renamed(str(error))) from error
    finally:
        warnings.formatwarning = formatted


def run(arguments: list[str]) -> None:
    known = COMMANDS | data.COMMANDS if arguments[:1] == ["data"] else COMMANDS
    classes = [Config, *(known[word] for word in arguments[:2] if word in known)]
    typed = (re.match(r"--([a-z][\w.-]*)", argument) for argument in arguments)  # bench's commands would load JAX
    names = {name for one in classes for name in option_names(one)} | {one[1].replace("-", "_") for one in typed if one}
    with naming_options(names):
        command, name = parse(arguments), arguments[0]
    start_jax()
    several = joined(command.distributed) if name in ("invert", "eval", "train") else contextlib.nullcontext()
    with several, naming_options(option_names(command)):
        if name not in ("bench", "env"):  # which can do without, or report what fails
            check_devices()
        command.run()
        sys.stdout.flush()


def leave() -> NoReturn:
    """Ends the process at once after Ctrl-C."""
    print("v2t: interrupted", file=sys.stderr, flush=True)
    # Threads of XLA may still be computing: an ordinary exit would free their memory under them.
    os._exit(130)


def interrupt(*_: Any) -> NoReturn:
    """On Ctrl-C: unwinds, and leaves anyway if that takes too long."""
    last_resort = threading.Timer(UNWINDING_SECONDS, leave)
    last_resort.daemon = True
    last_resort.start()
    raise KeyboardInterrupt


def lost(unraisable: Any) -> None:
    """Leaves on a Ctrl-C during one of JAX's callbacks, out of which Python can't raise."""
    if unraisable.exc_type is KeyboardInterrupt:
        leave()
    else:
        sys.__unraisablehook__(unraisable)


def main() -> None:
    """The command line. An error that the user can fix ends in one sentence and exit status 2."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115 (for the whole run)
        elif isinstance(stream, io.TextIOWrapper):  # an encoding that lacks a character must not end the run
            stream.reconfigure(errors="backslashreplace")
    hook, sys.unraisablehook = sys.unraisablehook, lost
    progress.enable()
    try:
        run(sys.argv[1:])
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:  # the rest of the output is dropped silently
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # `v2t ... | head`: the reader has gone
            raise SystemExit(0) from None
        if (fault := explained(error)) is None:
            raise
        print(f"v2t: {fault}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        leave()
    finally:
        sys.unraisablehook = hook
        progress.disable()
