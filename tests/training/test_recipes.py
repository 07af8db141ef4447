"""When masks are recomputed, what pruned weights count, and what a recipe refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES, Recipe, RecipeError, recipe_named

GUIDE = Path(__file__).parents[2] / "docs/guide.md"


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


def test_masks_are_not_recomputed_in_a_dense_tail() -> None:
    assert refreshes(Recipe("mine", refresh_every=20, dense_from=0.5), 200) == [20, 40, 60, 80]


@pytest.mark.parametrize("name", ["static", "dynamic", "paper", "s-ste"])
def test_most_recipes_mask_fully_from_the_first_step_on(name: str) -> None:
    recipe = RECIPES[name]
    assert not recipe.leaks
    assert [recipe.leak(step, None) for step in (0, 1, 10**6)] == [0, 0, 0]
    recipe.check_length(None)


def test_gradual_fades_pruned_weights_out_between_a_tenth_and_half_of_the_training() -> None:
    recipe = RECIPES["gradual"]
    steps = [0, 9, 10, 20, 30, 40, 49, 50, 100, 101]
    assert [recipe.leak(step, 100) for step in steps] == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0.025, 0, 0, 0])
    assert recipe.leak(50, 100) == 0  # exactly: the layer is masked from here on
    assert recipe.leak(10, 100) == 1
    assert refreshes(recipe, 200) == [40, 80, 120]  # frozen at 140


def test_a_dense_tail_is_the_last_sixth() -> None:
    recipe = RECIPES["dense-tail"]
    assert [recipe.leak(step, 60) for step in (0, 30, 49, 50, 59, 60, 61)] == [0, 0, 0, 1, 1, 1, 1]


def test_a_ramp_may_end_in_a_dense_tail() -> None:
    recipe = Recipe("mine", ramp=(0.0, 0.5), dense_from=0.5)
    assert [recipe.leak(step, 8) for step in range(9)] == [1, 0.75, 0.5, 0.25, 1, 1, 1, 1, 1]


def test_what_the_presets_are() -> None:
    assert [(recipe.name, recipe.refresh_every, recipe.solver) for recipe in RECIPES.values()] == [
        ("static", None, "exact"),
        ("dynamic", 40, "exact"),
        ("paper", 40, "greedy"),
        ("gradual", 40, "exact"),
        ("dense-tail", 40, "exact"),
        ("s-ste", 40, "exact"),
    ]
    paper = RECIPES["paper"]
    assert (paper.decay, paper.freeze_at, paper.lr_scale, paper.leaks, paper.soft_threshold) == (0, 1, 1, False, False)
    gradual = RECIPES["gradual"]
    assert (gradual.decay, gradual.freeze_at, gradual.lr_scale, gradual.from_dense) == (2e-3, 0.7, 1, True)
    plain = replace(RECIPES["dense-tail"], name="dynamic", dense_from=None, summary=RECIPES["dynamic"].summary)
    assert plain == RECIPES["dynamic"]
    assert [name for name, recipe in RECIPES.items() if recipe.ends_dense] == ["dense-tail"]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_summary_says_what_is_guaranteed(recipe: Recipe) -> None:
    wanted = "ends dense" if recipe.ends_dense else "forward only" if recipe.soft_threshold else "both ways"
    said = [words for words in ("ends dense", "forward only", "both ways") if words in recipe.summary]
    assert said == [wanted]
    assert "\n" not in recipe.summary


def test_the_guide_has_a_row_for_every_recipe() -> None:
    section = GUIDE.read_text(encoding="utf-8").split("## Recipes")[1].split("\n## ")[0]
    rows = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(RECIPES)


def test_recipes_are_found_by_name() -> None:
    assert all(recipe_named(name) is RECIPES[name] and RECIPES[name].name == name for name in RECIPES)
    with pytest.raises(
        RecipeError, match=r"unknown recipe 'magic': choose one of static .*; dynamic .*; s-ste "
    ) as caught:
        recipe_named("magic")
    assert all(recipe.summary in str(caught.value) for recipe in RECIPES.values())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"refresh_every": 0}, r"a mask period of 0 \(refresh_every\): .* give 1 or more, or None"),
        ({"refresh_every": -3}, "a mask period of -3"),
        ({"decay": -1e-3}, "decay is -0.001: .* 0 .* or more"),
        ({"decay": float("nan")}, "decay is nan"),
        ({"decay": float("inf")}, "decay is inf"),
        ({"lr_scale": 0.0}, "lr_scale is 0: .* more than 0"),
        ({"lr_scale": float("nan")}, "lr_scale is nan"),
        ({"freeze_at": 1.5}, "freeze_at is 1.5: .* from 0 to 1"),
        ({"freeze_at": -0.1}, "freeze_at is -0.1"),
        ({"freeze_at": float("nan")}, "freeze_at is nan"),
        ({"dense_from": 1.0}, "dense_from is 1: .* between 0 and 1, or None"),
        ({"dense_from": 0.0}, "dense_from is 0"),
        ({"ramp": (0.5, 0.1)}, r"ramp is \(0.5, 0.1\): give two rising fractions"),
        ({"ramp": (0.5, 0.5)}, "two rising fractions"),
        ({"ramp": (-0.1, 0.5)}, "two rising fractions"),
        ({"ramp": (0.1, 50)}, "two rising fractions"),
        ({"ramp": (0.1, float("nan"))}, "two rising fractions"),
        ({"ramp": (0.1, 0.9), "dense_from": 0.8}, "the second at most dense_from, 0.8"),
        ({"soft_threshold": True, "decay": 1e-3}, "leave decay, ramp and dense_from out"),
        ({"soft_threshold": True, "dense_from": 0.5}, "leave decay, ramp and dense_from out"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"^recipe mine: .*{said}"):
        Recipe("mine", **wrong)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    for freeze_at in (0.0, 1.0):
        Recipe("mine", refresh_every=1, freeze_at=freeze_at, ramp=(0.0, 1.0))
    Recipe("mine", ramp=(0.0, 0.8), dense_from=0.8)


def test_a_soft_threshold_refuses_transposable_patterns() -> None:
    with pytest.raises(RecipeError, match=r"s-ste is forward only: .*4:8-T asks .* dynamic, or the pattern 4:8$"):
        RECIPES["s-ste"].check_pattern(Pattern(4, 8, transposable=True))
    RECIPES["s-ste"].check_pattern(Pattern(4, 8))
    RECIPES["gradual"].check_pattern(Pattern(4, 8, transposable=True))


@pytest.mark.parametrize("name", ["gradual", "dense-tail"])
def test_fractions_need_a_length(name: str) -> None:
    with pytest.raises(RecipeError, match=f"recipe {name} .*: pass total_steps"):
        RECIPES[name].check_length(None)
    RECIPES[name].check_length(1)


@pytest.mark.parametrize("name", ["dynamic", "gradual"])
def test_no_training_is_shorter_than_a_step(name: str) -> None:
    with pytest.raises(RecipeError, match=r"total_steps is 0: .* at least 1"):
        RECIPES[name].check_length(0)
