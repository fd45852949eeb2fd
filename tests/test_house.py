"""The shape of the package: lines a room, length of files and functions, what no file may use."""

import ast
from pathlib import Path

import pytest

import v2t_jax

PACKAGE = Path(v2t_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80

# Lines of Python in each room at most. A new capability brings its own; growth of what is there needs a reason.
BUDGETS = {
    "": 460,  # __init__, config, errors, progress
    "assets": 200,
    "bench": 600,
    "cli": 620,
    "data": 950,
    "decode": 360,
    "embedders": 850,
    "eval": 300,
    "interop": 700,
    "inversion": 1050,
    "models": 1100,
    "parallel": 400,
    "train": 1100,
    "vec2text": 540,
}
MOST_LINES = 9000


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def lines_by_room() -> dict[str, int]:
    rooms: dict[str, int] = {}
    for path in FILES:
        parts = path.relative_to(PACKAGE).parts
        room = parts[0] if len(parts) > 1 else ""
        rooms[room] = rooms.get(room, 0) + lines(path)
    return rooms


def test_every_room_keeps_to_its_budget() -> None:
    rooms = lines_by_room()
    assert set(rooms) == set(BUDGETS)
    assert not {room: count for room, count in rooms.items() if count > BUDGETS[room]}
    assert sum(rooms.values()) <= MOST_LINES


def test_no_file_is_too_long() -> None:
    assert not {name(path): lines(path) for path in FILES if lines(path) > MOST_LINES_OF_A_FILE}


def test_no_function_is_too_long() -> None:
    found = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MOST_LINES_OF_A_FUNCTION:
                    found[f"{name(path)}:{node.name}"] = length
    assert not found


def test_nothing_private_of_jax_is_used() -> None:
    assert not [name(path) for path in FILES if "jax._src" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_file_of_models_defines_flax_modules(path: Path) -> None:
    classes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)]
    assert any(ast.unparse(base) == "nn.Module" for node in classes for base in node.bases)


if __name__ == "__main__":  # python -m tests.test_house prints the table
    for room, count in sorted(lines_by_room().items()):
        print(f"{room or 'top level':12} {count:6,} of {BUDGETS.get(room, 0):6,}")
    print(f"{'all':12} {sum(lines_by_room().values()):6,} of {MOST_LINES:6,}")
