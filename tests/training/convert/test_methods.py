"""What every method promises, and AdaPrune and magnitude against what they should find."""

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert.adaprune import descend
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.least_squares import refit
from tnm_pipeline.training.convert.methods import METHODS, MethodError, find_method, supports
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Problem
from tnm_pipeline.training.masks import count_violations, solve
from tnm_pipeline.training.pattern import Pattern

PATTERNS = ["2:4", "1:4", "4:8", "2:4-T"]
CASES = [(name, text) for name in METHODS for text in PATTERNS if supports(name, Pattern.parse(text))]


def layer(outputs: int = 16, inputs: int = 24, samples: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated X (samples, inputs), T with noise, W; float64."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mixing
    w = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    return x, x @ w.T + noise, w


@pytest.mark.parametrize(("name", "text"), CASES)
def test_solution_holds_the_pattern_and_beats_magnitude(name: str, text: str) -> None:
    x, t, w = layer()
    pattern = Pattern.parse(text)
    problem = Problem(Objective.of(x, t, w).centred(), w, pattern)
    solution = METHODS[name]([problem], Group())[0]
    assert solution.weight.dtype == torch.float64
    assert not solution.weight[~solution.mask].any()
    assert count_violations(solution.mask.double(), pattern).of(pattern) == 0
    assert int(solution.mask.sum()) == w.numel() * pattern.n // pattern.m
    error = problem.objective.squared_error(solution.weight)
    by_magnitude = problem.objective.squared_error(torch.where(solve(w, pattern), w, 0.0))
    assert error == by_magnitude if name == "magnitude" else error < 0.95 * by_magnitude


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_hold_the_pattern_and_fit_stay(name: str) -> None:
    x, _, w = layer()
    w[:, 1::2] = 0
    problem = Problem(Objective.of(x, x @ w.T, w), w, Pattern(2, 4))
    torch.testing.assert_close(METHODS[name]([problem], Group())[0].weight, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("samples", [0, 1, 5])
@pytest.mark.parametrize("name", METHODS)
def test_few_or_no_samples_change_nothing_for_the_worse(name: str, samples: int) -> None:
    x, _, w = layer(samples=max(samples, 1))
    problem = Problem(Objective.of(x * bool(samples), x * bool(samples) @ w.T, w), w, Pattern(2, 4))
    solution = METHODS[name]([problem], Group())[0]
    assert bool(torch.isfinite(solution.weight).all())
    assert solution.damping < 1
    masked = torch.where(solve(w, Pattern(2, 4)), w, 0.0)
    assert problem.objective.squared_error(solution.weight) <= problem.objective.squared_error(masked)
    if samples == 0:
        torch.testing.assert_close(solution.weight, masked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_independent_problems(name: str) -> None:
    x, t, w = layer()
    problem = Problem(Objective.of(x, t, w), w, Pattern(2, 4))
    whole = METHODS[name]([problem], Group())[0].weight
    part = METHODS[name]([problem.rows(slice(4, 8))], Group())[0].weight
    near = 1e-2 if name == "adaprune" else 1e-5  # its learning rate follows the rows' own spread
    torch.testing.assert_close(part, whole[4:8], rtol=near, atol=near)


def test_adaprune_approaches_the_least_error() -> None:
    x, t, w = layer()
    objective, mask = Objective.of(x, t, w).centred(), solve(w, Pattern(2, 4, transposable=True))
    closed = objective.squared_error(refit(objective, w, mask, damping=1e-9).weight)
    descended = objective.squared_error(descend(objective, w, mask))
    rounding = 1 + 1e-6  # descent runs in float32
    assert closed <= descended * rounding
    assert descended < 1.01 * closed


def test_adaprune_steps_like_adam_on_the_samples() -> None:
    x, t, w = layer()
    mask = solve(w, Pattern(2, 4))
    objective = Objective.of(x, t, w)
    parameter = torch.nn.Parameter(torch.where(mask, w, 0.0))
    optimizer = torch.optim.Adam([parameter], lr=0.1 * float(w[mask].square().mean().sqrt()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * ((parameter * mask) @ x.T - t.T).square().sum() / objective.mean_diagonal).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(descend(objective, w, mask, iterations=20), parameter.detach(), rtol=1e-4, atol=1e-4)


def test_methods_are_found_by_name() -> None:
    for name in METHODS:
        assert find_method(name, [Pattern(2, 4), Pattern(4, 8)]) is METHODS[name]
    assert find_method("least-squares", [Pattern(2, 4, transposable=True)]) is METHODS["least-squares"]
    with pytest.raises(MethodError, match=r"unknown conversion method 'adam': choose one of .*least-squares"):
        find_method("adam", [])


def test_row_wise_method_refuses_a_transposable_pattern() -> None:
    with pytest.raises(MethodError, match=r"sparsegpt cannot follow 4:8-T.*use 4:8, or one of .*least-squares"):
        find_method("sparsegpt", [Pattern(2, 4), Pattern(4, 8, transposable=True)])
