"""SparseGPT against the published algorithm written out column by column, row by row."""

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Problem
from tnm_pipeline.training.convert.sparsegpt import DAMPING, sparsegpt
from tnm_pipeline.training.masks import count_violations
from tnm_pipeline.training.pattern import Pattern


def layer(inputs: int, samples: int = 500, outputs: int = 6) -> tuple[Tensor, Tensor]:
    """Correlated X (samples, inputs) and W; float64."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    x = x @ (mixing + torch.eye(inputs, dtype=torch.float64))
    return x, torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)


def column_by_column(best: Tensor, damped: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """One row after the other; the inverse is that of the columns still to come, made anew for each (OBS)."""
    weight, mask = best.clone(), torch.zeros(best.shape, dtype=torch.bool)
    columns = best.shape[1]
    inverses = [torch.linalg.inv(damped[column:, column:]) for column in range(columns)]
    for row in range(len(best)):
        for column in range(columns):
            if column % pattern.m == 0:
                group = range(column, min(column + pattern.m, columns))
                scores = {index: float(weight[row, index] ** 2 / inverses[index][0, 0]) for index in group}
                for index in sorted(scores, key=lambda index: -scores[index])[: pattern.n]:
                    mask[row, index] = True
            if not mask[row, column]:
                inverse = inverses[column]
                weight[row, column:] -= weight[row, column].clone() / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight, mask


@pytest.mark.parametrize(("text", "inputs"), [("2:4", 24), ("2:4", 160), ("1:4", 24), ("3:5", 150), ("4:8", 24)])
def test_equals_the_algorithm_column_by_column(text: str, inputs: int) -> None:
    x, w = layer(inputs)
    objective = Objective.of(x, x @ w.T, w)
    solution = sparsegpt(Problem(objective, w, Pattern.parse(text)))
    damped = objective.gram + DAMPING * objective.mean_diagonal * torch.eye(inputs)
    weight, mask = column_by_column(w, damped, Pattern.parse(text))
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-4, atol=1e-4)
    assert solution.damping == DAMPING


def test_other_targets_are_fitted_from_the_best_dense_weights() -> None:
    x, w = layer(24)
    targets = (x + 0.3 * x.roll(1, 0)) @ w.T
    sparse = torch.where(w.abs() > 0.5, w, 0.0)
    objective = Objective.of(x, targets, w)
    damped = objective.gram + DAMPING * objective.mean_diagonal * torch.eye(24)
    best = torch.linalg.solve(damped, (targets.T @ x + DAMPING * objective.mean_diagonal * sparse).T).T
    weight, mask = column_by_column(best, damped, Pattern(2, 4))
    solution = sparsegpt(Problem(objective, sparse, Pattern(2, 4)))
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, weight, rtol=1e-4, atol=1e-4)


def test_a_short_last_group_keeps_at_most_n() -> None:
    x, w = layer(27)
    solution = sparsegpt(Problem(Objective.of(x, x @ w.T, w), w, Pattern(2, 4)))
    kept = solution.mask.sum(1)
    assert count_violations(solution.mask.double(), Pattern(2, 4)).of(Pattern(2, 4)) == 0
    assert bool((kept == 6 * 2 + 2).all())


def test_inputs_never_seen_keep_their_weights() -> None:
    x, w = layer(24)
    x[:, ::4] = 0
    solution = sparsegpt(Problem(Objective.of(x, x @ w.T, w), w, Pattern(2, 4)))
    torch.testing.assert_close(
        solution.weight[:, ::4], torch.where(solution.mask, w, 0.0)[:, ::4], rtol=1e-5, atol=1e-5
    )


def test_rows_share_the_factors() -> None:
    x, w = layer(24)
    problem = Problem(Objective.of(x, x @ w.T, w), w, Pattern(2, 4))
    whole = sparsegpt(problem)
    for part in (slice(0, 2), slice(2, 6)):
        assert torch.equal(sparsegpt(problem.rows(part)).mask, whole.mask[part])


def test_indefinite_statistics_get_more_damping() -> None:
    x, w = layer(24)
    objective = Objective.of(x, x @ w.T, w)
    below = -0.05 * objective.mean_diagonal
    objective.gram[0] = objective.gram[:, 0] = 0
    objective.gram[0, 0] = below
    assert sparsegpt(Problem(objective, w, Pattern(2, 4))).damping == pytest.approx(0.1)
    objective.gram[0, 0] *= 100
    assert sparsegpt(Problem(objective, w, Pattern(2, 4))).damping == float("inf")
