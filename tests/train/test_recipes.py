"""Every recipe loads, and says what it takes and gives."""

import re
from pathlib import Path

import pytest

import v2t_jax
from v2t_jax.config import Config, load_recipe

RECIPES = sorted((Path(v2t_jax.__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_load_and_say_what_they_take(recipe: Path) -> None:
    assert isinstance(load_recipe(str(recipe)), Config)
    said = recipe.read_text().split('"""')[1]
    assert f"v2t train configs/{recipe.name} --workdir runs/{recipe.stem}" in said
    assert re.search("hardware|cores|chips", said, re.I), "no hardware"
    assert re.search("BLEU|scores?", said), "no score"
    # Times that nobody measured say so.
    assert "cores" in said or "Not yet run" in said or "see the README's table" in said
