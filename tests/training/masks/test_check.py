"""Counting violations and kept magnitude, against their definitions in loops."""

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.masks import count_violations, kept_magnitude
from tnm_pipeline.training.masks.check import Violations
from tnm_pipeline.training.pattern import Pattern


def by_loops(weight: Tensor, pattern: Pattern) -> Violations:
    """Groups lie along input channels (or, transposed, output channels) of one kernel position."""
    positions = weight.reshape(*weight.shape[:2], -1)
    outputs, inputs, kernel = positions.shape
    forward = transposed = 0
    for k in range(kernel):
        for o in range(outputs):
            for start in range(0, inputs, pattern.m):
                group = positions[o, start : start + pattern.m, k].tolist()
                forward += sum(value != 0 for value in group) > pattern.n
        for i in range(inputs):
            for start in range(0, outputs, pattern.m):
                group = positions[start : start + pattern.m, i, k].tolist()
                transposed += sum(value != 0 for value in group) > pattern.n
    return Violations(forward, transposed)


@pytest.mark.parametrize("text", ["2:4", "1:4-T", "4:8-T", "2:3"])
@pytest.mark.parametrize("shape", [(8, 16), (7, 9), (2, 3), (8, 24, 3, 3), (5, 24, 1, 2)])
def test_violations_equal_the_count_by_loops(text: str, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.4)
    pattern = Pattern.parse(text)
    assert count_violations(weight, pattern) == by_loops(weight, pattern)


def test_a_single_weight_too_many_is_found_anywhere() -> None:
    """Starting from a weight that just holds 2:4-T, filling any zero breaks one group of W and one of W^T."""
    pattern = Pattern(2, 4, transposable=True)
    tile = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    weight = tile.repeat(2, 3)
    assert count_violations(weight, pattern) == Violations(0, 0)
    for row, column in (weight == 0).nonzero().tolist():
        broken = weight.clone()
        broken[row, column] = 1e-30
        assert count_violations(broken, pattern) == Violations(1, 1)


def test_nan_counts_as_a_weight_and_negative_zero_does_not() -> None:
    assert count_violations(torch.tensor([[1.0, 1, float("nan"), 0]]), Pattern(2, 4)).forward == 1
    assert count_violations(torch.tensor([[1.0, 1, -0.0, 0]]), Pattern(2, 4)).forward == 0


def test_only_a_transposable_pattern_minds_the_transpose() -> None:
    violations = Violations(forward=2, transposed=3)
    assert violations.of(Pattern(2, 4)) == 2
    assert violations.of(Pattern(2, 4, transposable=True)) == 5


def test_kept_magnitude() -> None:
    weight = torch.tensor([[3.0, -1.0], [-2.0, 4.0]])
    mask = torch.tensor([[True, False], [False, True]])
    assert kept_magnitude(weight, mask) == 0.7
    assert kept_magnitude(weight, torch.zeros_like(mask)) == 0.0
    assert kept_magnitude(torch.zeros(2, 2), mask) == 1.0


def test_kept_magnitude_of_many_half_precision_weights_does_not_overflow() -> None:
    weight = torch.full((512, 512), 8.0, dtype=torch.float16)
    mask = torch.arange(512).remainder(2).bool().expand(512, 512)
    assert kept_magnitude(weight, mask) == 0.5
