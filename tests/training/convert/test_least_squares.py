"""Least squares with a fixed mask: Cholesky against lstsq row by row, conjugate gradients against Cholesky."""

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert import conjugate_gradients
from tnm_pipeline.training.convert import least_squares as module
from tnm_pipeline.training.convert.least_squares import factor_rows, least_squares, refit
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Problem, Shared
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern

WIDE = 192  # at 2:4, more kept weights than Cholesky is used for


def layer(inputs: int = 16, samples: int = 400, outputs: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated X (samples, inputs) of unequal scales, T with noise, W; float64."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    mixing += torch.eye(inputs, dtype=torch.float64)
    scales = torch.logspace(-1, 1, inputs, dtype=torch.float64)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64) @ mixing * scales
    w = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / scales
    noise = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    return x, x @ w.T + noise, w


def by_rows(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """The definition: one numpy.linalg.lstsq per row, on the columns that the row keeps."""
    solution = np.zeros(mask.shape)
    for row, kept in enumerate(mask.numpy()):
        solution[row, kept] = np.linalg.lstsq(x.numpy()[:, kept], t.numpy()[:, row])[0]
    return torch.from_numpy(solution)


def penalised(objective: Objective, weight: Tensor, old: Tensor, ridge: float) -> float:
    return objective.squared_error(weight) + ridge * float((weight - old).square().sum())


@pytest.fixture
def always_descend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KEPT_FOR_CHOLESKY", -1)


@pytest.mark.parametrize("text", ["2:4", "2:4-T", "1:4"])
def test_narrow_rows_equal_lstsq(text: str) -> None:
    x, t, w = layer()
    mask = solve(w, Pattern.parse(text))
    solution = refit(Objective.of(x, t, w), w, mask, damping=1e-14)
    torch.testing.assert_close(solution.weight, by_rows(x, t, mask), rtol=1e-5, atol=1e-5)
    assert solution.iterations == 0


@pytest.mark.usefixtures("always_descend")
def test_conjugate_gradients_equal_lstsq() -> None:
    x, t, w = layer()
    mask = solve(w, Pattern(2, 4))
    solution = refit(Objective.of(x, t, w), w, mask, damping=1e-14, tolerance=1e-12)
    best = by_rows(x, t, mask)
    torch.testing.assert_close(x @ solution.weight.T, x @ best.T, rtol=1e-4, atol=1e-3)
    assert solution.iterations > 0


@pytest.mark.parametrize("base", ["weight", "zero", "other"])
def test_conjugate_gradients_equal_cholesky(base: str) -> None:
    x, t, w = layer(WIDE)
    mask = solve(w, Pattern(2, 4))
    around = {"weight": w, "zero": w * 0, "other": w + 0.1}[base]
    objective = Objective.of(x, t, around).centred()
    ridge = 1e-3 * objective.mean_diagonal
    exact = factor_rows(objective, w, mask, ridge)
    assert exact is not None
    least = penalised(objective, exact, w, ridge)
    for tolerance in (1e-2, 1e-4, 1e-6):
        solution = refit(objective, w, mask, damping=1e-3, tolerance=tolerance)
        assert penalised(objective, solution.weight, w, ridge) <= least * (1 + 2 * tolerance)
        assert not solution.weight[~mask].any()


@pytest.mark.parametrize("inputs", [16, WIDE])
def test_rows_may_keep_different_counts_even_none(inputs: int) -> None:
    x, t, w = layer(inputs)
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    mask[3] = False
    mask[4] = True
    solution = refit(Objective.of(x, t, w), w, mask, damping=1e-14, tolerance=1e-10)
    best = by_rows(x, t, mask)
    torch.testing.assert_close(x @ solution.weight.T, x @ best.T, rtol=1e-4, atol=0.01)
    assert not solution.weight[~mask].any()
    assert (solution.iterations > 0) == (inputs == WIDE)


def test_all_zero_mask_keeps_nothing() -> None:
    x, t, w = layer()
    assert not refit(Objective.of(x, t, w), w, torch.zeros_like(w, dtype=torch.bool)).weight.any()


def test_a_good_start_saves_steps_and_ends_in_the_same_place() -> None:
    x, t, w = layer(WIDE)
    objective, mask = Objective.of(x, t, w), solve(w, Pattern(2, 4))
    cold = refit(objective, w, mask, damping=1e-4, tolerance=1e-8)
    near = cold.weight + 1e-3 * w  # off the mask too, which is to be ignored
    warm = refit(objective, w, mask, damping=1e-4, tolerance=1e-8, start=near)
    assert warm.iterations < cold.iterations
    assert objective.squared_error(warm.weight) == pytest.approx(objective.squared_error(cold.weight), rel=1e-6)
    assert not warm.weight[~mask].any()


def test_chunks_do_not_change_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, w = layer()
    objective, mask = Objective.of(x, t, w), solve(w, Pattern(2, 4))
    whole = refit(objective, w, mask).weight
    monkeypatch.setattr(module, "_ENTRIES_AT_ONCE", 5 * 8 * 8)
    torch.testing.assert_close(refit(objective, w, mask).weight, whole)


def test_rows_share_a_matrix_for_each_damping() -> None:
    x, t, w = layer(WIDE)
    objective, mask, shared = Objective.of(x, t, w), solve(w, Pattern(2, 4)), Shared()
    for damping in (1e-3, 1e-1):
        alone = refit(objective, w, mask, damping=damping, tolerance=1e-8).weight
        for part in (slice(0, 4), slice(4, 12)):
            rows = objective.rows(part)
            some = refit(rows, w[part], mask[part], damping=damping, tolerance=1e-8, shared=shared)
            torch.testing.assert_close(some.weight, alone[part], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("inputs", [16, WIDE])
def test_inputs_never_seen_keep_their_weights(inputs: int) -> None:
    x, t, w = layer(inputs)
    x[:, :4] = 0
    problem = Problem(Objective.of(x, t, w), w, Pattern(2, 4))
    solution = least_squares(problem)
    torch.testing.assert_close(solution.weight[:, :4], torch.where(solution.mask, w, 0.0)[:, :4])


@pytest.mark.parametrize("inputs", [16, WIDE])
def test_fewer_samples_than_inputs_are_fitted(inputs: int) -> None:
    x, t, w = layer(inputs, samples=5)
    objective = Objective.of(x, t, w)
    solution = refit(objective, w, solve(w, Pattern(2, 4)), damping=1e-8)
    assert solution.damping == 1e-8
    assert objective.relative_error(solution.weight) < 1e-2  # more unknowns than samples


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter(scale: float) -> None:
    x, t, w = layer(WIDE)
    mask = solve(w, Pattern(2, 4))
    plain = refit(Objective.of(x, t, w), w, mask).weight
    scaled = refit(Objective.of(x * scale, t * scale, w), w, mask).weight
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("inputs", [16, WIDE])
def test_damping_grows_until_the_systems_are_solvable(inputs: int) -> None:
    x, t, w = layer(inputs)
    objective = Objective.of(x, t, w)
    below = -0.005 * objective.mean_diagonal
    objective.gram[0] = objective.gram[:, 0] = 0
    objective.gram[0, 0] = below
    mask = solve(w, Pattern(2, 4))
    mask[0, :4] = torch.tensor([True, True, False, False])
    assert refit(objective, w, mask, damping=1e-4).damping == pytest.approx(1e-2)


@pytest.mark.parametrize("inputs", [16, WIDE])
@pytest.mark.parametrize("share", [0.5, 10.0])
def test_statistics_that_cannot_be_leave_the_masked_weights(inputs: int, share: float) -> None:
    x, t, w = layer(inputs)
    objective = Objective.of(x, t, w)
    eigenvalues, vectors = torch.linalg.eigh(objective.gram)
    eigenvalues[: inputs // 2] = -share * 2 * eigenvalues.mean()  # at 10 even the mean of the diagonal is negative
    problem = Problem(replace(objective, gram=vectors * eigenvalues @ vectors.T), w, Pattern(2, 4))
    solution = least_squares(problem)
    assert solution.damping == inf
    assert torch.equal(solution.weight, torch.where(solution.mask, w, 0.0))


def wide_layer(samples: int = 600, noise: float = 1.0) -> tuple[Objective, Tensor, Tensor]:
    """An objective of inputs that are alike up to some noise, weights, and a mask of 2:4."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(samples, 24, generator=generator, dtype=torch.float64)
    x = hidden @ torch.randn(24, WIDE, generator=generator, dtype=torch.float64)
    x += noise * torch.randn(samples, WIDE, generator=generator, dtype=torch.float64)
    w = torch.randn(16, WIDE, generator=generator, dtype=torch.float64)
    return Objective.of(x, x @ w.T, w), w, solve(w, Pattern(2, 4))


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Have bfloat16; the dtypes of the matrices that are solved with, in their order."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    used: list[torch.dtype] = []
    solve_rows = conjugate_gradients._solve

    def watched(matrix: Tensor, *arguments: Any) -> Any:
        used.append(matrix.dtype)
        return solve_rows(matrix, *arguments)

    monkeypatch.setattr(conjugate_gradients, "_solve", watched)
    return used


@pytest.mark.parametrize(
    ("tolerance", "dtype"), [(1e-2, torch.bfloat16), (1e-3, torch.bfloat16), (1e-4, torch.float32)]
)
def test_coarse_fits_take_rounded_steps_and_come_as_close(
    rounding: list[torch.dtype], tolerance: float, dtype: torch.dtype
) -> None:
    x, t, w = layer(WIDE, 2 * WIDE, 16)
    objective, mask = Objective.of(x, t, w), solve(w, Pattern(2, 4))
    ridge = 1e-2 * objective.mean_diagonal
    exact = factor_rows(objective, w, mask, ridge)
    assert exact is not None
    solution = refit(objective, w, mask, damping=1e-2, tolerance=tolerance)
    assert rounding == [dtype]
    least = penalised(objective, exact, w, ridge)
    assert least < penalised(objective, solution.weight, w, ridge) <= least * (1 + 2 * tolerance)


def test_rounded_steps_that_miss_their_claim_are_taken_again(
    rounding: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs so alike that rounding the matrix changes the problem."""
    objective, w, mask = wide_layer(noise=0.02)
    solution = refit(objective, w, mask, damping=1e-5)
    assert rounding == [torch.bfloat16, torch.float32]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    exact = refit(objective, w, mask, damping=1e-5)
    assert solution.damping == exact.damping == 1e-5
    assert torch.equal(solution.weight, exact.weight)
