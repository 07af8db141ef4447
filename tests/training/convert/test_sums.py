"""Sums in fixed point: any order gives the same bits, and the bits are right."""

import math
import random

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.sums import ExactGram, ExactSum, reach

CPU = torch.device("cpu")


def terms(count: int = 50, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of very different magnitudes, so that floating-point sums do depend on the order."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-6, 0, count)
    return [(torch.randn(3, 4, generator=generator) * size * scale).to(dtype) for size in sizes]


def total(some: list[Tensor], bound: float) -> Tensor:
    summed = ExactSum((3, 4), bound, CPU)
    for term in some:
        summed.add(term)
    return summed.total(Group())


def bound_of(some: list[Tensor]) -> float:
    return float(torch.stack(some).double().abs().sum(0).max())


def test_any_order_gives_the_same_bits() -> None:
    some = terms()
    expected = total(some, bound_of(some))
    naive = sum(some, torch.zeros(3, 4))
    orders_that_differ = 0
    for seed in range(10):
        shuffled = some.copy()
        random.Random(seed).shuffle(shuffled)  # noqa: S311  # no secret
        assert torch.equal(total(shuffled, bound_of(some)), expected)
        orders_that_differ += not torch.equal(sum(shuffled, torch.zeros(3, 4)), naive)
    assert orders_that_differ > 0


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("slack", [1, 1000])
def test_total_is_as_exact_as_float64(scale: float, slack: int) -> None:
    some = terms(scale=scale, dtype=torch.float64)
    bound = bound_of(some) * slack
    summed = total(some, bound)
    unit = bound * 2.0**-61
    for row in range(3):
        for column in range(4):
            exact = math.fsum(float(term[row, column]) for term in some)
            assert abs(float(summed[row, column]) - exact) <= 0.5 * unit * len(some) + abs(exact) * 2**-52


def test_the_bound_itself_and_its_negative_fit() -> None:
    for bound in (1.0, 3.7, 2.0**20):
        summed = ExactSum((2,), bound, CPU)
        summed.add(torch.tensor([bound, -bound], dtype=torch.float64))
        assert summed.total(Group()).tolist() == [bound, -bound]


def test_nothing_and_zeros_are_zero() -> None:
    assert not ExactSum((2,), 0.0, CPU).total(Group()).any()
    summed = ExactSum((2,), 0.0, CPU)
    summed.add(torch.zeros(2))
    assert not summed.total(Group()).any()


def test_reach_is_the_largest_absolute_value() -> None:
    assert reach([torch.tensor([1.0, -3.0]), torch.tensor([[2.5]])]) == 3.0
    assert reach([torch.tensor([1.0, 4.0], dtype=torch.bfloat16)]) == 4.0
    assert reach([]) == 0.0
    assert reach([torch.empty(0, 4), torch.tensor([-2.0])]) == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_reach_notices_what_is_not_finite(value: float) -> None:
    assert reach([torch.ones(3), torch.tensor([1.0, value, 2.0])]) == float("inf")
    assert reach([torch.tensor([value]), torch.ones(3)]) == float("inf")


@pytest.mark.parametrize("width", [1, 5, 128, 129, 383])
def test_gram_matrices_are_summed_in_blocks(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(7, width, generator=generator, dtype=torch.float64) for _ in range(3)]
    grams = []
    for order in (rows, rows[::-1]):
        summed = ExactGram(width, float(torch.cat(rows).square().sum()), CPU)
        for x in order:
            summed.add(x)
        grams.append(summed.total(Group()))
    torch.testing.assert_close(grams[0], sum((x.T @ x for x in rows), torch.zeros(width, width)))
    assert torch.equal(grams[0], grams[1])
