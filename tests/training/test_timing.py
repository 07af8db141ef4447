"""What wins a comparison, and that comparisons are taken in turns."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnm_pipeline.training.timing import Comparison, interleave

CPU = torch.device("cpu")


def times(masked: list[float], sparse: list[float], pack: list[float], prepare: float = 0.0) -> dict[str, list[float]]:
    return {"masked": masked, "prepare": [prepare] * len(masked), "sparse": sparse, "pack": pack}


def test_ratios_are_paired_and_packing_is_spread_over_micro_batches() -> None:
    growth = [1.0, 2.0, 3.0, 4.0, 5.0]
    measured = times([10 * t for t in growth], [5 * t for t in growth], [20 * t for t in growth])
    one = Comparison.of(measured, 1)
    assert (one.masked_ms, one.prepare_ms, one.sparse_ms, one.pack_ms) == (30, 0, 15, 60)
    assert (one.low, one.ratio, one.high) == pytest.approx((0.4, 0.4, 0.4))  # 10 / (5 + 20), in every round
    assert not one.wins
    many = Comparison.of(measured, 20)
    assert many.ratio == pytest.approx(10 / (5 + 1))
    assert many.wins
    prepared = Comparison.of(times([10.0, 10.0], [10.0, 10.0], [10.0, 10.0], prepare=5.0), 2)
    assert prepared.ratio == pytest.approx(12.5 / 15)


@pytest.mark.parametrize(("slower_rounds", "wins"), [(0, True), (3, True), (4, False), (8, False), (15, False)])
def test_it_wins_only_if_faster_in_more_than_three_quarters_of_the_rounds(slower_rounds: int, wins: bool) -> None:
    sparse = [1.1] * slower_rounds + [0.9] * (15 - slower_rounds)
    assert Comparison.of(times([1.0] * 15, sparse, [0.0] * 15), 1).wins is wins


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=30))
def test_equal_times_never_win(same: list[float]) -> None:
    comparison = Comparison.of(times(same, same, [0.0] * len(same)), 1)
    assert comparison.ratio == 1
    assert not comparison.wins
    assert comparison.masked_ms == statistics.median(same)


def test_products_of_very_different_sizes_are_told_apart() -> None:
    def compare(**sides: int) -> Comparison:
        squares = {name: torch.randn(side, side) for name, side in sides.items()}
        functions = {name: lambda square=square: square @ square for name, square in squares.items()}
        return Comparison.of(interleave(functions, CPU, rounds=5), 1)

    assert compare(masked=256, prepare=16, sparse=64, pack=16).wins
    assert not compare(masked=64, prepare=16, sparse=256, pack=16).wins
    assert not compare(masked=256, prepare=16, sparse=64, pack=512).wins  # what is won is lost to packing
    assert compare(masked=64, prepare=256, sparse=64, pack=16).wins


def test_functions_take_turns_after_warming_up() -> None:
    order: list[str] = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleave(functions, CPU, 3)
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert turns == ["a", "b"] * 4
    assert {name: len(rounds) for name, rounds in times.items()} == {"a": 3, "b": 3}
