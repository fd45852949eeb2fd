"""The shape of the package: lines of each room, length of files and functions, what no file may use."""

import ast
import importlib
import inspect
from collections import Counter
from pathlib import Path

import flax.linen as nn
import pytest

import v2t_jax

PACKAGE = Path(v2t_jax.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80
# Lines of each room at most. Lower a number when its room shrinks; raise one only for a new capability.
BUDGETS = {
    "": 540,  # __init__, config, errors, progress
    "assets": 50,
    "audit": 648,
    "bench": 1499,
    "cli": 1301,
    "data": 2520,
    "decode": 378,
    "defences": 572,
    "embedders": 1368,
    "eval": 505,
    "interop": 894,
    "inversion": 2103,
    "models": 1501,
    "parallel": 549,
    "stores": 1096,
    "train": 1702,
    "vec2text": 532,
}


def lines_by_room() -> Counter[str]:
    rooms: Counter[str] = Counter()
    for name, text in FILES.items():
        rooms[name.rpartition("/")[0].partition("/")[0]] += len(text.splitlines())
    return rooms


def test_every_room_keeps_to_its_budget() -> None:
    rooms = lines_by_room()
    assert set(rooms) == set(BUDGETS)
    assert not {room: count for room, count in rooms.items() if count > BUDGETS[room]}


def test_no_file_is_too_long() -> None:
    lengths = {name: len(text.splitlines()) for name, text in FILES.items()}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FILE}


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{name}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for name, text in FILES.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION}


def test_nothing_private_of_jax_is_used() -> None:
    assert not [name for name, text in FILES.items() if "jax._src" in text]


@pytest.mark.parametrize("name", sorted(path.stem for path in (PACKAGE / "models").glob("[!_]*.py")))
def test_every_file_of_models_defines_flax_modules(name: str) -> None:
    module = importlib.import_module(f"v2t_jax.models.{name}")
    classes = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    assert any(issubclass(found, nn.Module) for found in classes)


if __name__ == "__main__":  # python -m tests.test_house prints the table
    for room, count in sorted(lines_by_room().items()):
        print(f"{room or 'top level':12} {count:6,} of {BUDGETS.get(room, 0):6,}")
    print(f"{'all':12} {lines_by_room().total():6,} of {sum(BUDGETS.values()):6,}")
