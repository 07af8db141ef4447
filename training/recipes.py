"""How sparse training goes, as data: when masks change, what pruned weights still count, where it ends."""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from tnm_pipeline.training.pattern import Pattern

if TYPE_CHECKING:  # configurations are read without torch
    from tnm_pipeline.training.masks.solve import Solver


class RecipeError(ValueError):
    """A recipe that cannot be meant, that does not exist, or that does not go with a pattern."""


@dataclass(frozen=True)
class Recipe:
    """One way to train with masks. Fractions are of the optimizer steps of the whole training.

    A layer multiplies with `weight * (1 where kept, leak where pruned)`. The leak is 0 unless `ramp` or `dense_from`
    say otherwise; with `soft_threshold` the layer computes its weight in another way.

    Attributes:
        name: what a config says.
        refresh_every: optimizer steps between mask updates; None: the first mask stays.
        decay: strength of the pull of pruned weights to zero: (1 - leak) * decay * w joins their gradient after
            clipping.
        freeze_at: fraction after which masks no longer change.
        lr_scale: learning rate as a multiple of the dense one.
        solver: of the masks.
        ramp: two fractions between which the leak falls linearly from 1 (dense) to 0 (masked); None: masked at once.
        dense_from: fraction after which the leak is 1: the training ends dense. None: it ends sparse.
        soft_threshold: kept weights shrink by the largest pruned magnitude of their group, so that the layer's weight
            is a continuous function of the dense one; along the inputs only. Masks then only measure the flip rate.
        sampled_gradient: compute weight gradients with an unbiased 2:4 sample of the output gradient, so that this
            third product can be sparse too; it adds noise, see `kernels/sampled_gradient.py`.
        from_dense: where a dense training comes first, begin with its weights instead of the initial ones.
        summary: what it is and which products can be sparse in the end, for people.

    Raises:
        RecipeError: a value is out of its range, or two of them contradict each other.
    """

    name: str
    refresh_every: int | None = None
    decay: float = 0.0
    freeze_at: float = 1.0
    lr_scale: float = 1.0
    _: KW_ONLY
    solver: "Solver" = "exact"
    ramp: tuple[float, float] | None = None
    dense_from: float | None = None
    soft_threshold: bool = False
    sampled_gradient: bool = False
    from_dense: bool = False
    summary: str = ""

    def __post_init__(self) -> None:
        wrong = next(self._complaints(), None)
        if wrong:
            raise RecipeError(f"recipe {self.name}: {wrong}")

    def _complaints(self) -> Iterator[str]:
        if self.refresh_every is not None and self.refresh_every < 1:
            yield (
                f"a mask period of {self.refresh_every} (refresh_every): it counts optimizer steps, so give 1 or more, "
                "or None to keep the first masks"
            )
        if not 0 <= self.decay < math.inf:
            yield f"decay is {self.decay:g}: pruned weights are pulled to zero, so give 0 (no pull) or more"
        if not 0 < self.lr_scale < math.inf:
            yield f"lr_scale is {self.lr_scale:g}: it multiplies the dense learning rate, so give more than 0"
        if not 0 <= self.freeze_at <= 1:
            yield f"freeze_at is {self.freeze_at:g}: it is a fraction of the training, from 0 to 1 (1: never freeze)"
        if self.dense_from is not None and not 0 < self.dense_from < 1:
            yield f"dense_from is {self.dense_from:g}: it is a fraction of the training between 0 and 1, or None"
        if self.ramp is not None and not 0 <= self.ramp[0] < self.ramp[1] <= (self.dense_from or 1):
            yield (
                f"ramp is {self.ramp}: give two rising fractions of the training, such as (0.1, 0.5)"
                + (f", the second at most dense_from, {self.dense_from:g}" if self.dense_from else "")
            )
        if self.soft_threshold and (self.leaks or self.decay):
            yield "a soft threshold shrinks weights by itself: leave decay, ramp and dense_from out"

    @property
    def leaks(self) -> bool:
        """Whether pruned weights ever count."""
        return self.ramp is not None or self.ends_dense

    @property
    def why_masked(self) -> str | None:
        """Why packed weights cannot stand in for the products of this recipe; None: they can."""
        if self.soft_threshold:
            return f"recipe {self.name} multiplies with weights that a soft threshold shrinks"
        if self.sampled_gradient:
            return "the output gradient is sampled, by a product of its own"
        return None

    @property
    def ends_dense(self) -> bool:
        """Whether the weights in the end hold no pattern."""
        return self.dense_from is not None

    def leak(self, step: int, total_steps: int | None) -> float:
        """What pruned weights are multiplied with after optimizer step `step`: 0 is masked, 1 is dense.

        Args:
            step: optimizer steps done.
            total_steps: of the whole training; only recipes that never leak do without.
        """
        if not self.leaks:
            return 0.0
        assert total_steps is not None, "refused by check_length"
        progress = step / total_steps
        if self.dense_from is not None and progress >= self.dense_from:
            return 1.0
        if self.ramp is None:
            return 0.0
        begin, end = self.ramp
        return min(1.0, max(0.0, (end - progress) / (end - begin)))

    def refreshes(self, step: int, total_steps: int | None) -> bool:
        """Whether masks are recomputed after optimizer step `step` (1 = the first).

        Args:
            step: optimizer steps done.
            total_steps: of the whole training; None: never freeze.
        """
        if self.refresh_every is None or step % self.refresh_every:
            return False
        return total_steps is None or step < min(self.freeze_at, self.dense_from or 1.0) * total_steps

    def check_pattern(self, pattern: Pattern) -> None:
        """Refuse a pattern that this recipe cannot give.

        Raises:
            RecipeError: a transposable one for a soft threshold.
        """
        if self.soft_threshold and pattern.transposable:
            raise RecipeError(
                f"recipe {self.name} is forward only: its soft threshold runs along the inputs, and {pattern} asks for "
                f"both directions; take the recipe dynamic, or the pattern {pattern.n}:{pattern.m}"
            )

    def check_length(self, total_steps: int | None) -> None:
        """Refuse a training whose fractions cannot be told.

        Args:
            total_steps: of the whole training; None: unknown.

        Raises:
            RecipeError: unknown for a recipe whose leak follows it, or less than 1.
        """
        if total_steps is None and self.leaks:
            raise RecipeError(
                f"recipe {self.name} changes what pruned weights count at fractions of the training: pass total_steps, "
                "the optimizer steps of the whole training"
            )
        if total_steps is not None and total_steps < 1:
            raise RecipeError(
                f"total_steps is {total_steps}: it counts the optimizer steps of the training, at least 1"
            )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Hubara et al. 2021, section 3.2.
        Recipe(
            "static",
            from_dense=True,
            summary="mask dense weights once and retrain; 2:4-T both ways",
        ),
        # Section 3.3 with the decay of Hu et al. 2024 and a larger rate: see docs/decisions for the measurements.
        Recipe(
            "dynamic",
            refresh_every=40,
            decay=5e-3,
            freeze_at=0.65,
            lr_scale=2.0,
            summary="masks follow the weights, pruned weights decay, twice the rate; 2:4-T both ways",
        ),
        # Section 3.3 as published.
        Recipe(
            "paper",
            refresh_every=40,
            solver="greedy",
            summary="Hubara et al. 2021: greedy masks every 40 steps, nothing else; meant for 4:8-T, both ways",
        ),
        Recipe(
            "gradual",
            refresh_every=40,
            decay=2e-3,
            freeze_at=0.7,
            ramp=(0.1, 0.5),
            from_dense=True,
            summary="from dense weights, pruned ones fade out between 10% and 50%; 2:4-T both ways",
        ),
        # Hu et al. 2024, section 4.4. The pull goes on after masks freeze and ends as the tail begins.
        Recipe(
            "dense-tail",
            refresh_every=40,
            decay=5e-3,
            freeze_at=0.65,
            lr_scale=2.0,
            dense_from=5 / 6,
            summary="as dynamic, the last sixth dense; ends dense: sparse products while it trains, none afterwards",
        ),
        # Hu et al., NeurIPS 2024 (arXiv:2409.09099), without FP8 and without sparse output gradients.
        Recipe(
            "s-ste",
            refresh_every=40,
            soft_threshold=True,
            summary="soft threshold with a fixed scale for each layer; forward only: row-wise patterns such as 2:4",
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        RecipeError: no such recipe; the message says what there is.
    """
    if name not in RECIPES:
        known = "; ".join(f"{recipe.name} ({recipe.summary})" for recipe in RECIPES.values())
        raise RecipeError(f"unknown recipe {name!r}: choose one of {known}")
    return RECIPES[name]
