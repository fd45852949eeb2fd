"""v2t: recover text from embeddings, and train the models that do."""

import contextlib
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import tyro

from v2t_jax import progress
from v2t_jax.cli import train
from v2t_jax.cli.data import Data
from v2t_jax.cli.invert import Demo, Embed, Evaluate, Invert
from v2t_jax.cli.models import Convert, Embedders, Env, Push
from v2t_jax.config import DistributedConfig
from v2t_jax.errors import InputError

UNWINDING_SECONDS = 5.0  # from Ctrl-C to the end, at most


@dataclass(frozen=True)
class _Bench:
    """Measure speed, and compile for TPUs that aren't here: v2t bench --help."""


COMMANDS: dict[str, Any] = {
    **{"invert": Invert, "embed": Embed, "embedders": Embedders, "eval": Evaluate, "convert": Convert, "push": Push},
    **{"data": Data, "demo": Demo, "env": Env},
    **{"train": train.Train, "bench": _Bench},  # listed here; parsed by `parse`
}


def parse(arguments: list[str]) -> Any:
    """The command that the arguments describe. Without --help, what loads JAX is left to its `run`."""
    if arguments[:1] == ["train"]:
        return train.parse(arguments[1:])
    commands, prog, about = COMMANDS, "v2t", __doc__
    if arguments[:1] == ["bench"]:
        start_jax()
        from v2t_jax.cli.bench import COMMANDS as commands

        prog, about, arguments = "v2t bench", "Measure speed, and compile for TPUs that aren't here.", arguments[1:]
    return tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog=prog, description=about)


def start_jax() -> None:
    """Loads JAX, which takes a second or more, and lets it keep its compiled programs."""
    try:
        with progress.stage("starting JAX"):
            from v2t_jax.parallel.compile_cache import enable_compilation_cache

            enable_compilation_cache()
    except ValueError as error:
        raise InputError(
            f"JAX doesn't start ({error}); check the environment variables that begin with JAX_."
        ) from error


def check_devices() -> None:
    """Refuses to go on without a device, as where JAX_PLATFORMS names one that isn't there."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX finds no device for JAX_PLATFORMS={platforms!r} ({str(error) or type(error).__name__}); unset or fix "
            "it, and see with 'v2t env' which devices there are."
        ) from error


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


def run(arguments: list[str]) -> None:
    command = parse(arguments)
    start_jax()
    together = isinstance(command, Invert | Evaluate | train.Train)
    with joined(command.distributed) if together else contextlib.nullcontext():
        if isinstance(command, tuple(COMMANDS.values())) and not isinstance(command, Env):  # which reports what fails
            check_devices()
        command.run()
        sys.stdout.flush()


def leave() -> NoReturn:
    """Ends the process at once after Ctrl-C."""
    print("v2t: interrupted", file=sys.stderr)
    sys.stderr.flush()
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


def fail(message: object) -> NoReturn:
    print(f"v2t: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def main() -> None:
    """The command line. An error that the user can fix ends in one sentence and exit status 2."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the whole run)
        elif isinstance(stream, io.TextIOWrapper):  # an encoding that lacks a character must not end the run
            stream.reconfigure(errors="backslashreplace")
    hook, sys.unraisablehook = sys.unraisablehook, lost
    warnings.formatwarning = lambda message, *_, **__: f"v2t: warning: {message}\n"
    progress.enable()
    try:
        run(sys.argv[1:])
    except InputError as error:
        fail(error)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the rest of the output is dropped silently
        if isinstance(error, BrokenPipeError):  # `v2t ... | head`: the reader has gone
            raise SystemExit(0) from None
        fail(f"{error.filename or 'the output'}: {error.strerror or error}; fix that and try again.")
    except RuntimeError as error:
        from v2t_jax.parallel.processes import explained

        if (fault := explained(error)) is None:
            raise
        fail(fault)
    except KeyboardInterrupt:
        leave()
    finally:
        sys.unraisablehook = hook
        progress.disable()
