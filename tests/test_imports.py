"""Imports go one way; importing the package is cheap: no torch or tensorflow, and no jax until it is used."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import v2t_jax

PACKAGE = Path(v2t_jax.__file__).parent

# A part (a module or folder of the package) imports from its own layer and from those before it.
LAYERS: list[set[str]] = [
    {"config", "errors", "progress"},
    {"decode", "models", "parallel"},
    {"assets", "data", "interop"},
    {"embedders", "stores"},
    {"inversion"},
    {"eval", "vec2text"},
    {"audit", "train"},
    {"bench", "defences"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Beyond the layers: these take functions instead, so that a model can be swapped without touching them.
NEVER = {"decode": {"models"}, "data": {"models"}}

FOREIGN = {"torch", "tensorflow"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> set[str]:
    """Every module that `name` imports, wherever in the file: `from a import b` counts as a.b and as a."""
    path = MODULES[name]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def part_of(module: str) -> str | None:
    """`v2t_jax.models.t5` -> `models`; None for the package itself and for others."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "v2t_jax" and len(pieces) > 1 else None


def test_every_part_has_a_layer() -> None:
    parts = {part for name in MODULES if (part := part_of(name)) is not None}
    assert parts <= set(LEVEL), f"place {sorted(parts - set(LEVEL))} in LAYERS of {Path(__file__).name}"


def test_imports_go_one_way() -> None:
    wrong = []
    for name in MODULES:
        part = part_of(name)
        if part is None:
            continue
        for other in {part_of(module) for module in imported(name)} & set(LEVEL):
            assert other is not None
            if LEVEL[other] > LEVEL[part] or other in NEVER.get(part, ()):
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {}
    for name in MODULES:
        # A folder's modules have the folder's own __init__ run before them: that alone is no circle.
        above = {module for module in MODULES if f"{name}.".startswith(f"{module}.")}
        graph[name] = (imported(name) & set(MODULES)) - above
    del graph["v2t_jax"]
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_no_module_names_torch_or_tensorflow() -> None:
    roots = {name: {module.split(".")[0] for module in imported(name)} for name in MODULES}
    assert not [name for name in MODULES if roots[name] & FOREIGN]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that are loaded after `statement`, in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return set(done.stdout.split())


def test_importing_the_package_is_light() -> None:
    assert not loaded_by("import v2t_jax") & {*FOREIGN, "jax", "flax", "numpy", "transformers", "rich"}


def test_importing_the_command_line_loads_no_torch_or_tensorflow() -> None:
    assert not loaded_by("import v2t_jax.cli.main") & FOREIGN


def test_the_packaged_embedder_is_loaded_without_transformers() -> None:
    assert "transformers" not in loaded_by(
        "from v2t_jax.embedders.load import load_embedder as l; l('all-MiniLM-L6-v2')"
    )


@pytest.mark.oracle  # where torch is installed, a library of ours could load it
def test_importing_the_command_line_beside_torch_does_not_load_it() -> None:
    __import__("torch")
    assert not loaded_by("import v2t_jax.cli.main") & FOREIGN


def test_public_names_are_listed_and_others_refused() -> None:
    assert set(v2t_jax.__all__) <= set(dir(v2t_jax))
    for name in v2t_jax.__all__:
        assert getattr(v2t_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = v2t_jax.nonsense
