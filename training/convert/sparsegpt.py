"""SparseGPT: masks and weights in one sweep over the columns (Frantar and Alistarh 2023, Algorithm 1).

Columns are pruned from left to right. What pruning one of them does to the output is compensated at once by the
columns to its right, in the best way there is: with the Cholesky factor U of the inverse of the damped gram matrix,
inverse = U^T U, an error e = w / U[j, j] of column j moves column i by -e U[j, i]. The mask of a group is chosen when
the sweep reaches it, by the errors w^2 / U[j, j]^2 that its columns would leave.

The paper prunes the weights W of the dense layer, for which the targets are X W^T. Here the targets may come from
other inputs (those of the dense model) or from other weights (those before an unstructured pruning). Around the W0
that fits them best, ridge included,

    W0 = (cross + ridge W) (G + ridge I)^-1,

the objective is a constant and the same quadratic form in W' - W0. So the sweep starts from W0; it is W itself where
the targets are X W^T.

The order of the columns leaves nothing to choose for the columns of a transposable mask: patterns are row-wise.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from functools import partial

import torch
from torch import Tensor

from tnm_pipeline.training.convert.least_squares import dampings
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Problem, Solution
from tnm_pipeline.training.pattern import Pattern

DAMPING = 1e-2  # of the mean diagonal, as published
_COLUMNS_AT_ONCE = 128  # as published; columns beyond the block are moved by one GEMM a block


def sparsegpt(problem: Problem) -> Solution:
    """Sweep over the columns: O(K^3 + O K^2), nearly all of it in GEMMs; float64 factors, float32 sweep.

    When the damped gram matrix is not positive definite, it gets more damping, as in `refit`; should none do, the
    result is the weights masked by magnitude, and its damping says infinity.

    Args:
        problem: with a row-wise pattern.

    Returns:
        The new weights, their mask, and the damping that was needed.
    """
    assert not problem.pattern.transposable, "methods.find_method refuses this"
    objective, shared = problem.objective, problem.shared
    for damping in dampings(DAMPING, objective):
        lower = shared.get(f"sparsegpt: lower {damping}", partial(_factor, objective, damping))
        upper = shared.get(f"sparsegpt: upper {damping}", partial(_factor_of_inverse, lower))
        if len(upper):
            columns, mask = _sweep(_best(objective, problem.weight, lower, damping), upper, problem.pattern)
            return Solution(columns.T.double().contiguous(), mask.T.contiguous(), damping)
    mask = problem.project(problem.weight)
    return Solution(torch.where(mask, problem.weight, 0.0), mask, float("inf"))


def _factor(objective: Objective, damping: float) -> Tensor:
    """L of the damped gram matrix L L^T, in units of its mean diagonal, (K, K) float64; (0, 0) if there is none."""
    damped = objective.gram / objective.mean_diagonal
    damped.diagonal().add_(damping)
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(damped)
    return lower[:0, :0] if bool(failed) else lower


def _factor_of_inverse(lower: Tensor) -> Tensor:
    """U, (K, K) float32, of the inverse U^T U of L L^T; (0, 0) if there is none."""
    upper: Tensor
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper[:0, :0] if bool(failed) else upper.float()


def _best(objective: Objective, weight: Tensor, lower: Tensor, damping: float) -> Tensor:
    """W0, one column of it a row: (K, O) float32."""
    missed = objective.residual_cross / objective.mean_diagonal + damping * (weight - objective.base)
    return (objective.base.T + torch.cholesky_solve(missed.T, lower)).float().contiguous()


def _sweep(columns: Tensor, upper: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune from the first column to the last.

    Args:
        columns: (K, O) float32, one column of the weights a row; used up.
        upper: (K, K) float32, U.
        pattern: row-wise.

    Returns:
        The weights, (K, O), zero off the mask, and the mask, (K, O) bool.
    """
    diagonal = upper.diagonal()[:, None]
    moves = upper / diagonal  # of all columns, for each unit that pruning takes from one
    mask = torch.zeros_like(columns, dtype=torch.bool)
    block = max(_COLUMNS_AT_ONCE // pattern.m, 1) * pattern.m  # no group crosses its end
    for first in range(0, len(columns), block):
        last = min(first + block, len(columns))
        taken = torch.empty_like(columns[first:last])
        for column in range(first, last):
            if (column - first) % pattern.m == 0:
                group = slice(column, min(column + pattern.m, last))
                mask[group] = _largest(columns[group].abs() / diagonal[group], pattern.n)
            torch.mul(columns[column], ~mask[column], out=taken[column - first])
            columns[column + 1 : last].addr_(moves[column, column + 1 : last], taken[column - first], alpha=-1)
        columns[last:].addmm_(moves[first:last, last:].T, taken, alpha=-1)
    return columns.mul_(mask), mask


def _largest(scores: Tensor, count: int) -> Tensor:
    """Which entries of each column are its largest, at most `count` of them; the first ones among equals."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order[:count], True)
