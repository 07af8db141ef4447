"""Kept magnitude of Gaussian weights: integrals against closed forms and against draws."""

import math

import pytest
import torch

from tnm_pipeline.training.masks import kept_magnitude, solve
from tnm_pipeline.training.masks.gaussian import (
    estimate_kept_magnitude,
    rowwise_kept_magnitude,
    unstructured_kept_magnitude,
)
from tnm_pipeline.training.pattern import Pattern


def test_one_of_two_keeps_one_over_the_square_root_of_two() -> None:
    """The larger of two half-normals has mean 2 / sqrt(pi), each has sqrt(2 / pi)."""
    assert rowwise_kept_magnitude(Pattern(1, 2)) == pytest.approx(1 / math.sqrt(2), abs=1e-12)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:4", "5:16", "16:32"])
def test_the_integral_equals_the_mean_of_sorted_draws(text: str) -> None:
    pattern = Pattern.parse(text)
    groups = torch.randn(100_000, pattern.m, generator=torch.Generator().manual_seed(0), dtype=torch.float64).abs()
    largest = groups.sort(dim=1, descending=True).values[:, : pattern.n]
    expected = float(largest.sum(1).mean()) / pattern.m / math.sqrt(2 / math.pi)
    error = float(largest.sum(1).std()) / pattern.m / math.sqrt(2 / math.pi) / math.sqrt(len(groups))
    assert rowwise_kept_magnitude(pattern) == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9, 1.0])
def test_the_threshold_formula_equals_pruning_a_large_weight(density: float) -> None:
    weight = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.zeros(len(weight), dtype=torch.bool)
    mask[weight.abs().argsort(descending=True)[: round(density * len(weight))]] = True
    assert unstructured_kept_magnitude(density) == pytest.approx(kept_magnitude(weight, mask), abs=1e-3)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:2"])
def test_the_estimate_covers_the_integral(text: str) -> None:
    pattern = Pattern.parse(text)
    estimate = estimate_kept_magnitude(pattern, blocks=5000, seed=1)
    assert estimate.value == pytest.approx(rowwise_kept_magnitude(pattern), abs=4 * estimate.standard_error)


def test_the_standard_error_is_the_spread_of_estimates() -> None:
    pattern = Pattern(2, 4, transposable=True)
    estimates = [estimate_kept_magnitude(pattern, blocks=500, seed=seed) for seed in range(100)]
    spread = float(torch.tensor([estimate.value for estimate in estimates]).std())
    assert estimates[0].standard_error == pytest.approx(spread, rel=0.3)


@pytest.mark.parametrize(("text", "blocks", "known"), [("2:4-T", 50_000, 0.7025), ("4:8-T", 5000, 0.7428)])
def test_the_known_figures_of_transposable_patterns(text: str, blocks: int, known: float) -> None:
    estimate = estimate_kept_magnitude(Pattern.parse(text), blocks=blocks)
    assert estimate.standard_error < 1e-3
    assert estimate.value == pytest.approx(known, abs=4 * estimate.standard_error)


def test_an_estimate_is_the_kept_magnitude_of_one_weight() -> None:
    weight = torch.randn(40, 4, generator=torch.Generator().manual_seed(3))
    pattern = Pattern(2, 4, transposable=True)
    estimate = estimate_kept_magnitude(pattern, blocks=10, seed=3)
    assert estimate.value == pytest.approx(kept_magnitude(weight, solve(weight, pattern)), rel=1e-12)


def test_freedom_costs_nothing() -> None:
    """Each pattern allows every mask of the one before it, or more."""
    figures = [
        estimate_kept_magnitude(Pattern(2, 4, transposable=True), blocks=20_000).value,
        rowwise_kept_magnitude(Pattern(2, 4)),
        rowwise_kept_magnitude(Pattern(4, 8)),
        rowwise_kept_magnitude(Pattern(16, 32)),
        unstructured_kept_magnitude(0.5),
    ]
    assert figures == sorted(figures)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="estimate_kept_magnitude"):
        rowwise_kept_magnitude(Pattern(2, 4, transposable=True))
    with pytest.raises(ValueError, match="density"):
        unstructured_kept_magnitude(0.0)
    with pytest.raises(ValueError, match="at least 2 blocks"):
        estimate_kept_magnitude(Pattern(2, 4), blocks=1)
