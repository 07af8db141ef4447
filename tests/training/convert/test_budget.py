"""The knapsack against trying everything, and what a budget means."""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnm_pipeline.training.convert import budget as module
from tnm_pipeline.training.convert.budget import Budget, BudgetError, choose
from tnm_pipeline.training.pattern import Pattern

ITEM = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), min_size=1, max_size=4)


def best_of_all(effects: list[list[float]], costs: list[list[int]], limit: float) -> float | None:
    """The smallest sum of effects within the limit, by trying every choice."""
    best = None
    for picks in product(*(range(len(item)) for item in effects)):
        if sum(cost[k] for cost, k in zip(costs, picks, strict=True)) <= limit:
            total = sum(effect[k] for effect, k in zip(effects, picks, strict=True))
            best = total if best is None else min(best, total)
    return best


@given(st.lists(ITEM, min_size=1, max_size=5), st.integers(0, 40))
def test_it_finds_what_trying_everything_finds(items: list[list[tuple[int, int]]], limit: int) -> None:
    effects = [[float(effect) for effect, _ in item] for item in items]
    costs = [[cost for _, cost in item] for item in items]
    expected = best_of_all(effects, costs, limit)
    if expected is None:
        with pytest.raises(BudgetError, match="the cheapest options cost"):
            choose(effects, costs, limit)
        return
    picks = choose(effects, costs, limit)
    assert sum(effect[k] for effect, k in zip(effects, picks, strict=True)) == expected
    assert sum(cost[k] for cost, k in zip(costs, picks, strict=True)) <= limit


@given(st.lists(ITEM, min_size=1, max_size=5), st.integers(0, 40))
def test_rounded_costs_never_exceed_the_limit(items: list[list[tuple[int, int]]], limit: int) -> None:
    """A grid far too coarse still gives a choice that is as good as any that spares a step per item."""
    effects = [[float(effect) for effect, _ in item] for item in items]
    costs = [[cost for _, cost in item] for item in items]
    least = sum(min(item) for item in costs)
    if least > limit:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STEPS", 10)
        picks = choose(effects, costs, limit)
    assert sum(cost[k] for cost, k in zip(costs, picks, strict=True)) <= limit
    spared = max(limit - len(items) * (limit - least) / 10, least)
    reached = sum(effect[k] for effect, k in zip(effects, picks, strict=True))
    expected = best_of_all(effects, costs, spared)
    assert expected is not None
    assert reached <= expected


def test_costs_may_be_fractions_and_large() -> None:
    third = Fraction(10**12, 3)
    costs = [[third, 3 * third], [third, 2 * third]]
    assert choose([[5.0, 1.0], [4.0, 3.0]], costs, 4 * third) == [1, 0]
    assert choose([[5.0, 1.0], [4.0, 3.0]], costs, 4 * third - 1) == [0, 1]


def test_ties_go_to_the_cheaper_and_then_to_the_first() -> None:
    assert choose([[1.0, 1.0, 1.0]], [[2, 1, 1]], 5) == [1]
    assert choose([[0.0, 1.0], [0.0, 1.0]], [[1, 0], [1, 0]], 1) == choose(
        [[0.0, 1.0], [0.0, 1.0]], [[1, 0], [1, 0]], 1
    )


def test_nothing_to_spend_is_enough_for_the_cheapest() -> None:
    assert choose([[1.0, 0.0], [0.0, 2.0]], [[0, 7], [3, 1]], 1) == [0, 1]


def test_what_a_budget_counts() -> None:
    dense, half = Budget(max_dense=0.13), Budget(work=0.6)
    assert [dense.cost(100, None), dense.cost(100, Pattern(2, 4))] == [100, 0]
    assert [half.cost(100, None), half.cost(100, Pattern(1, 4)), half.cost(10, Pattern(2, 3))] == [
        100,
        25,
        Fraction(20, 3),
    ]
    assert dense.limit(100) == 13  # exactly, although 0.13 is no binary fraction
    assert str(half) == "work = 0.6"


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({}, "give either max_dense"),
        ({"max_dense": 0.1, "work": 0.1}, "give either max_dense"),
        ({"work": 13.0}, r"work = 13.0 is not a share: .* 0\.13 for 13%"),
        ({"max_dense": float("nan")}, "is not a share"),
    ],
)
def test_a_budget_that_says_nothing_is_refused(shares: dict[str, float], words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        Budget(**shares)
