"""ADMM: the mask holds the pattern on any shape, and the error is below what magnitude masks reach."""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.convert.networks import violations
from tnm_pipeline.training.convert import admm as module
from tnm_pipeline.training.convert.admm import PULLS, _responses, admm
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.least_squares import least_squares
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Problem, Solution
from tnm_pipeline.training.pattern import Pattern

PATTERNS = ["2:4", "1:4", "4:8", "2:4-T", "1:4-T", "4:8-T"]


def layer(outputs: int, inputs: int, samples: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """X (samples, inputs), whose inputs are correlated and of different energies, and W; float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(samples, max(1, inputs // 3), generator=generator, dtype=torch.float64)
    mixing = torch.randn(hidden.shape[1], inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    energies = torch.logspace(-1, 1, inputs, dtype=torch.float64)[torch.randperm(inputs, generator=generator)]
    x = (hidden @ mixing + 0.5 * noise) * energies
    return x, torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def solved(x: Tensor, w: Tensor, text: str = "2:4") -> tuple[Problem, Solution]:
    problem = Problem(Objective.of(x, x @ w.T, w), w, Pattern.parse(text))
    solution = admm([problem], Group())[0]
    assert solution.weight.dtype == torch.float64
    assert solution.mask.dtype == torch.bool
    assert bool(torch.isfinite(solution.weight).all())
    assert not solution.weight[~solution.mask].any()
    assert violations(solution.mask, problem.pattern) == 0
    return problem, solution


def error(problem: Problem, solution: Solution) -> float:
    return problem.objective.relative_error(solution.weight)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 24), (3, 8), (10, 21), (1, 4), (9, 5)])
def test_mask_holds_the_pattern_on_any_shape(outputs: int, inputs: int, text: str) -> None:
    problem, solution = solved(*layer(outputs, inputs), text)
    if outputs % 8 == inputs % 8 == 0:
        assert int(solution.mask.sum()) == problem.weight.numel() * problem.pattern.n // problem.pattern.m


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_error_is_below_that_of_the_magnitude_mask_with_its_best_weights(text: str, seed: int) -> None:
    problem, solution = solved(*layer(32, 48, seed=seed), text)
    assert error(problem, solution) < 0.95 * error(problem, least_squares(problem))


def test_mask_is_nearly_the_best_of_all_where_all_can_be_tried() -> None:
    x, w = layer(12, 8)
    problem, solution = solved(x, w)
    halves = list(itertools.combinations(range(4), 2))
    found, best = problem.objective.squared_errors(solution.weight), torch.full((12,), torch.inf, dtype=torch.float64)
    for left, right in itertools.product(halves, halves):
        kept = [*left, *(4 + column for column in right)]
        fit = torch.linalg.lstsq(x[:, kept], x @ w.T).solution
        best = torch.minimum(best, (x[:, kept] @ fit - x @ w.T).square().sum(0))
    assert bool((found >= best * (1 - 1e-6)).all())
    assert float((found / best).median()) < 2


def test_dead_inputs_are_no_matter() -> None:
    x, w = layer(16, 24)
    x[:, [1, 2, 3, 9]] = 0
    problem, solution = solved(x, w)
    assert error(problem, solution) < error(problem, least_squares(problem))


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
@pytest.mark.parametrize("samples", [1, 5])
def test_fewer_samples_than_inputs(samples: int, text: str) -> None:
    problem, solution = solved(*layer(16, 24, samples), text)
    assert solution.damping < 1
    masked = Solution(torch.where(problem.project(problem.weight), problem.weight, 0.0), solution.mask)
    assert error(problem, solution) < error(problem, masked)


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_inputs_that_never_change_leave_the_magnitude_mask(text: str) -> None:
    _, w = layer(16, 24)
    objective = Objective.of(torch.full((50, 24), 0.1, dtype=torch.float64), torch.ones(50, 16), w)
    for silent in (objective.centred(), Objective.of(torch.zeros(50, 24), torch.zeros(50, 16), w)):
        assert not silent.gram.any()
        problem = Problem(silent, w, Pattern.parse(text))
        solution = admm([problem], Group())[0]
        assert torch.equal(solution.mask, problem.project(w))
        torch.testing.assert_close(solution.weight, torch.where(solution.mask, w, 0.0), rtol=1e-5, atol=1e-6)


def test_uncentred_constant_inputs_are_one_direction() -> None:
    _, w = layer(16, 24)
    problem, solution = solved(torch.full((50, 24), 0.3, dtype=torch.float64), w)
    assert error(problem, solution) < 0.05


@pytest.mark.parametrize("value", [-0.1, -1.0])
def test_a_gram_matrix_that_is_none_is_reported(value: float) -> None:
    x, w = layer(16, 24)
    objective = Objective.of(x, x @ w.T, w)
    broken = copy.copy(objective)
    eigenvalues, vectors = torch.linalg.eigh(objective.gram)
    eigenvalues[:8] = value * eigenvalues.max()
    object.__setattr__(broken, "gram", vectors @ torch.diag(eigenvalues) @ vectors.T)
    problem = Problem(broken, w, Pattern(2, 4))
    solution = admm([problem], Group())[0]
    assert solution.damping > 0.03
    assert violations(solution.mask, problem.pattern) == 0
    assert bool(torch.isfinite(solution.weight).all())
    if solution.damping == float("inf"):
        assert torch.equal(solution.weight, torch.where(problem.project(w), w, 0.0))
    assert value > -1 or solution.damping == float("inf")


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])  # powers of two round nothing
def test_units_of_the_inputs_change_nothing(scale: float) -> None:
    x, w = layer(16, 24)
    _, plain = solved(x, w)
    _, scaled = solved(x * scale, w)
    assert torch.equal(plain.mask, scaled.mask)
    torch.testing.assert_close(plain.weight, scaled.weight, rtol=1e-4, atol=1e-5)


def test_zeros_of_an_unstructured_weight_may_come_back_if_that_helps() -> None:
    x, w = layer(16, 24)
    sparse = torch.where(w.abs() > w.abs().median(), w, 0.0)
    problem = Problem(Objective.of(x, x @ w.T, w), sparse, Pattern(2, 4))
    assert error(problem, admm([problem], Group())[0]) < error(problem, least_squares(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_multiplied_in_what_the_processor_has(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The products that a search repeats, with its real matrices: W' as far as its pull has come to Z."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dtype is torch.bfloat16)
    made: list[tuple[Tensor, list[Tensor]]] = []

    def watched(matrix: Tensor) -> Iterator[Tensor]:
        made.append((matrix, list(_responses(matrix))))
        return iter(made[-1][1])

    monkeypatch.setattr(module, "_responses", watched)
    x, w = layer(32, 48)
    problem = Problem(Objective.of(x, x @ w.T, w), w, Pattern(2, 4))
    solution = admm([problem], Group())[0]
    ((matrix, responses),) = made
    torch.testing.assert_close(matrix.diagonal(), torch.ones(48))
    assert len(responses) == PULLS
    for number, response in enumerate(responses):
        pull = 10 ** (number / (PULLS - 1) - 1)
        expected = pull * torch.linalg.inv(matrix.double() + pull * torch.eye(48, dtype=torch.float64))
        inverted = number in {0, PULLS // 2, PULLS - 1}
        rounding = 2e-4 if dtype is torch.float32 else 2e-2
        off = float(torch.linalg.matrix_norm(response.double() - expected, ord=2))  # the most that any direction misses
        assert response.dtype == dtype
        assert off < rounding + (0.0 if inverted else 0.016)
        assert inverted or off > 1e-3  # such as an inverse of its own would have
    assert error(problem, solution) < 0.95 * error(problem, least_squares(problem))


def test_parts_step_together_to_what_each_comes_to_alone() -> None:
    x, w = layer(24, 40)
    whole = Problem(Objective.of(x, x @ w.T, w * 0.9), w, Pattern.parse("2:4-T"))
    parts = [whole.rows(slice(start, start + 8)) for start in (0, 8, 16)]
    together = admm(parts, Group(workers=3))
    assert admm([], Group()) == []
    for part, solution in zip(parts, together, strict=True):
        alone = admm([part], Group())[0]
        assert torch.equal(solution.weight, alone.weight)
        assert torch.equal(solution.mask, alone.mask)


def test_rows_that_need_a_minimum_which_is_none_change_nothing_for_others() -> None:
    """Other processes have other rows, and must come to the same."""
    x, w = layer(16, 24, samples=2000)
    vectors = torch.linalg.qr(x[:24]).Q
    gram = vectors @ torch.diag(torch.linspace(-0.07, 1, 24, dtype=torch.float64)) @ vectors.T
    cross = torch.zeros_like(w)
    cross[8:] = 0.1
    whole = Problem(replace(Objective.of(x, x @ w.T, w), gram=gram, residual_cross=cross), w, Pattern(2, 4))
    parts = [whole.rows(slice(start, start + 8)) for start in (0, 8)]
    for part, solution in zip(parts, admm(parts, Group()), strict=True):
        alone = admm([part], Group())[0]
        assert solution.iterations == PULLS * module.STEPS
        assert torch.equal(solution.weight, alone.weight)
        assert torch.equal(solution.mask, alone.mask)
