"""When masks are recomputed."""

import pytest

from tnm_pipeline.training.recipes import RECIPES, Recipe, recipe_named


def refreshes(recipe: Recipe, total: int | None, steps: int = 200) -> list[int]:
    return [step for step in range(1, steps + 1) if recipe.refreshes(step, total)]


def test_static_never_refreshes() -> None:
    assert refreshes(RECIPES["static"], 200) == []


def test_the_period_and_the_freeze() -> None:
    recipe = Recipe("mine", refresh_every=40, freeze_at=0.65)
    assert refreshes(recipe, 200) == [40, 80, 120]  # 0.65 * 200 = 130
    assert refreshes(recipe, None) == [40, 80, 120, 160, 200]


def test_masks_are_not_recomputed_after_the_last_step() -> None:
    """The weights would not be trained for the masks that they end with."""
    assert refreshes(Recipe("mine", refresh_every=40), 200) == [40, 80, 120, 160]


def test_recipes_are_found_by_name() -> None:
    assert {name: recipe_named(name).name for name in RECIPES} == {"static": "static", "dynamic": "dynamic"}
    with pytest.raises(ValueError, match="unknown recipe 'magic': choose one of static, dynamic"):
        recipe_named("magic")
