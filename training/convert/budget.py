"""One option for each item, at the smallest total effect that a budget allows: the multiple-choice knapsack."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, gcd, isfinite, lcm

import numpy as np

from tnm_pipeline.training.pattern import Pattern

STEPS = 20_000  # of the grid; rounding up wastes at most one step per item

Cost = int | Fraction


class BudgetError(ValueError):
    """A budget that no choice can keep, or that says nothing."""


@dataclass(frozen=True)
class Budget:
    """What may remain of the multiply-adds of the chosen layers; exactly one of the two is set.

    Attributes:
        max_dense: the layers that stay dense hold at most this share of them, in [0, 1].
        work: at most this share of them remains, a layer at N:M keeping N/M of its own, in [0, 1].

    Raises:
        BudgetError: none or both are set, or outside [0, 1].
    """

    max_dense: float | None = None
    work: float | None = None

    def __post_init__(self) -> None:
        if (self.max_dense is None) == (self.work is None):
            raise BudgetError(
                "give either max_dense, the share of the work that may stay dense, or work, what may remain"
            )
        if not 0 <= self.share <= 1:
            raise BudgetError(f"{self} is not a share: it must be between 0 and 1, for example 0.13 for 13%")

    def __str__(self) -> str:
        return f"max_dense = {self.max_dense}" if self.work is None else f"work = {self.work}"

    @property
    def share(self) -> float:
        """The number that was given."""
        return float(self.max_dense if self.work is None else self.work)  # type: ignore[arg-type]  # one of them is set

    def cost(self, work: int, pattern: Pattern | None) -> Cost:
        """What an option takes from the budget.

        Args:
            work: multiply-adds of the dense layer.
            pattern: `None`: it stays dense.
        """
        if self.work is None:
            return work if pattern is None else 0
        return work if pattern is None else Fraction(work * pattern.n, pattern.m)

    def limit(self, work: int) -> Fraction:
        """The whole budget, for layers of so much work. A share of 0.13 is exactly 13%."""
        return Fraction(repr(self.share)) * work


def choose(effects: Sequence[Sequence[float]], costs: Sequence[Sequence[Cost]], limit: Cost) -> list[int]:
    """Pick one option per item: the sum of effects is the smallest with a sum of costs within the limit.

    Dynamic programming over what is spent beyond every item's cheapest option, O(options * STEPS). It is exact as long
    as those extra costs are multiples of a unit that goes into the budget at most `STEPS` times, as those of networks
    whose layers repeat are. Otherwise they are rounded up to 1/STEPS of the budget: the limit always holds, and the
    choice is at least as good as any that leaves one step per item unspent.

    Args:
        effects: (items)(options), finite.
        costs: the same shape, not negative.
        limit: on the sum of costs.

    Returns:
        The option of each item. Of choices with equal effects a cheaper one, then options listed first.

    Raises:
        BudgetError: even the cheapest options exceed the limit.
    """
    assert all(isfinite(effect) for item in effects for effect in item)
    spare = Fraction(limit) - sum(min(item) for item in costs)
    if spare < 0:
        raise BudgetError(f"the cheapest options cost {float(limit - spare):g}, and the limit is {float(limit):g}")
    steps, capacity = _on_grid([[Fraction(cost - min(item)) for cost in item] for item in costs], spare)
    best = np.zeros(capacity + 1)  # smallest effect of the items so far, for at most so many steps
    picks: list[np.ndarray] = []
    for item_effects, item_steps in zip(effects, steps, strict=True):
        following = np.full(capacity + 1, np.inf)
        picked = np.zeros(capacity + 1, dtype=np.int16)
        for option in sorted(range(len(item_steps)), key=item_steps.__getitem__):
            taken = item_steps[option]
            if taken > capacity:
                continue
            reached = best[: capacity + 1 - taken] + item_effects[option]
            better = reached < following[taken:]
            following[taken:][better] = reached[better]
            picked[taken:][better] = option
        best = following
        picks.append(picked)
    chosen: list[int] = []
    left = capacity
    for picked, item_steps in zip(reversed(picks), reversed(steps), strict=True):
        chosen.append(int(picked[left]))
        left -= item_steps[chosen[-1]]
    return chosen[::-1]


def _on_grid(extras: Sequence[Sequence[Fraction]], spare: Fraction) -> tuple[list[list[int]], int]:
    """Extra costs and what may be spent on them, in steps: exact ones if there are few enough."""
    scale = lcm(*(extra.denominator for item in extras for extra in item))
    unit = Fraction(gcd(*(int(extra * scale) for item in extras for extra in item)), scale)
    if unit == 0 or spare == 0:  # nothing to choose, or nothing to spend: any step will do
        unit = unit or Fraction(1)
    elif spare > unit * STEPS:
        unit = spare / STEPS
    return [[ceil(extra / unit) for extra in item] for item in extras], floor(spare / unit)
