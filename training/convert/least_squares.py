"""The best weights for a fixed mask.

Rows of W' do not interact: row o with kept columns s solves its own normal equations,

    (G[s, s] + damping I) w = cross[o, s] + damping w_old

with the objective's gram matrix G. The damping pulls towards the weights that are there rather than towards zero:
directions that the calibration data never shows keep their old values.

Shape legend: O = out features, K = reduction length, R = rows in a chunk, k = most weights kept in a row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tnm_pipeline.training.convert.conjugate_gradients import descend
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import DAMPING, Problem, Shared, Solution

TOLERANCE = 1e-3  # of the squared error; the held-out error does not notice less
_MOST_DAMPING = 1.0
MOST_KEPT_FOR_CHOLESKY = 64  # of a row: up to here factors cost milliseconds, beyond them 5 to 10 times the descent
_ENTRIES_AT_ONCE = 1 << 22  # float64 entries of the (R, k, k) systems: 32 MiB, three times over


def least_squares(problem: Problem) -> Solution:
    """Choose the mask by magnitude and fit what it keeps."""
    mask = problem.project(problem.weight)
    return refit(problem.objective, problem.weight, mask, damping=problem.damping, shared=problem.shared)


def refit(
    objective: Objective,
    weight: Tensor,
    mask: Tensor,
    *,
    start: Tensor | None = None,
    damping: float = DAMPING,
    tolerance: float = TOLERANCE,
    shared: Shared | None = None,
) -> Solution:
    """Minimise ||X W'^T - T||^2 + damping * mean diagonal * ||W' - W||^2 over the W' that are zero off the mask.

    Narrow rows by Cholesky factors, O k^3 / 6 multiply-adds; wide ones by conjugate gradients, O K^2 of them a step.
    From a magnitude mask of 2:4 on a sentence encoder, 8 to 17 steps at K = 384 and 17 to 33 at K = 1536.

    When the systems are not positive definite, all are solved again with ten times the damping. Should that of the mean
    diagonal not do, the gram matrix is not one; the result is then the limit of endless damping, the masked weights as
    they are, and its damping says infinity.

    Args:
        objective: of the layer, centred if its bias will follow.
        weight: (O, K) float64, the current weights, W.
        mask: (O, K) bool; rows may keep different columns and different counts.
        start: (O, K) float64, where wide rows start; what it has off the mask is ignored. `None` = W.
        damping: to start from, relative to the mean diagonal of the gram matrix; positive.
        tolerance: of conjugate gradients: how far above the least squared error to stop, relatively.
        shared: by all rows of the layer; `None` = these are all.

    Returns:
        The new weights, the damping that was needed, and the steps taken.
    """
    masked = torch.where(mask, weight, 0.0)
    begin = masked if start is None else torch.where(mask, start, 0.0)
    narrow = int(mask.sum(1).max()) <= MOST_KEPT_FOR_CHOLESKY
    for relative in dampings(damping, objective):
        ridge = relative * objective.mean_diagonal
        if narrow:
            factored = factor_rows(objective, weight, mask, ridge)
            solved = None if factored is None else (factored, 0)
        else:
            solved = descend(
                objective, weight, mask, begin, ridge=ridge, tolerance=tolerance, shared=shared or Shared()
            )
        if solved is not None:
            return Solution(solved[0], mask, relative, solved[1])
    return Solution(masked, mask, float("inf"))


def dampings(first: float, objective: Objective) -> Iterator[float]:
    """What to try on a layer: ten times as much after each failure, up to 1; nothing if the diagonal is negative."""
    relative, last = first, max(first, _MOST_DAMPING)
    while objective.mean_diagonal > 0:
        yield relative
        if relative >= last:
            return
        relative = min(10 * relative, last)


def factor_rows(objective: Objective, weight: Tensor, mask: Tensor, ridge: float) -> Tensor | None:
    """Solve every row's normal equations by Cholesky, exact to float64, in bounded memory.

    Args:
        objective: of the layer.
        weight: (O, K) float64, W.
        mask: (O, K) bool.
        ridge: absolute damping, positive.

    Returns:
        (O, K) float64, zero off the mask; `None` when a factorisation fails.
    """
    widest = int(mask.sum(1).max())
    solved = torch.zeros_like(weight)
    if widest == 0:
        return solved
    targets = objective.cross + ridge * weight
    rows_at_once = max(1, _ENTRIES_AT_ONCE // widest**2)
    for start in range(0, len(weight), rows_at_once):
        part = slice(start, start + rows_at_once)
        columns = mask[part].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :widest]
        kept = mask[part].gather(1, columns)
        systems = objective.gram[columns[:, :, None], columns[:, None, :]]
        if not bool(kept.all()):
            # a row that keeps fewer than k columns is filled up with equations that say 1 * w = 0
            systems *= kept[:, :, None] & kept[:, None, :]
        systems.diagonal(dim1=1, dim2=2).add_(torch.where(kept, ridge, 1.0))
        lower, failures = torch.linalg.cholesky_ex(systems)
        if bool(failures.any()):
            return None
        right = (targets[part].gather(1, columns) * kept)[:, :, None]
        # two triangular solves take a quarter of the time of torch.cholesky_solve on batches
        halfway = torch.linalg.solve_triangular(lower, right, upper=False)
        values = torch.linalg.solve_triangular(lower.mT, halfway, upper=True)
        solved[part] = solved[part].scatter(1, columns, values[:, :, 0])
    return solved
