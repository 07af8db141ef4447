"""Least squares on the kept weights by conjugate gradients: all rows of a layer at once, one GEMM a step.

Rows are independent problems and take their own step lengths; they share nothing but the matrix. It is scaled to a
unit diagonal (Jacobi's preconditioner), so that float32 suffices whatever the units of the inputs. The first residual
is computed in float64, and float32 carries only the correction: on layers of a sentence encoder, a tolerance of 1e-6
ends within 4e-6, relatively, of the least error. For coarse tolerances the steps are multiplied in bfloat16 where the
processor has it, and a product of some rows in float32 tells whether they gained what they claim.

What was tried instead of Jacobi's preconditioner, on the same layers: the inverse of the whole damped gram
matrix, masked, halves the steps and doubles their price; exact treatment of the 32 leading eigenvectors saves a
quarter of the steps and costs nearly as much.

Source: Hestenes and Stiefel 1952; the stopping rule estimates the remaining error from the last decreases, as in
Strakos and Tichy 2002.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Shared
from tnm_pipeline.training.convert.step_dtype import step_dtype
from tnm_pipeline.training.convert.unit_diagonal import unit_diagonal
from tnm_pipeline.training.masks import keep

_COARSE = 1e-3  # tolerance from which on steps may be rounded
_EVERY = 8  # so-manieth row of rounded steps is checked
_MOST_STEPS = 300
_WINDOW = 2  # steps summed up before their decreases are compared: single ones go up and down
_PERFECT = 1e-6  # a squared error under this share of ||T||^2 counts as none: float32 resolves no more
_CONVERGED = 1e-6  # share of a row's first squared residual under which its curvature is rounding


def descend(
    objective: Objective,
    weight: Tensor,
    mask: Tensor,
    start: Tensor,
    *,
    ridge: float,
    tolerance: float,
    shared: Shared,
) -> tuple[Tensor, int] | None:
    """Minimise ||X W'^T - T||^2 + ridge ||W' - W||^2 over the W' that are zero off the mask.

    The error falls at every step but for rounding, even where the steps run out. Rounded steps are discarded where they
    miss what they claim to gain by more than the tolerance, as every eighth row tells.

    Args:
        objective: of the layer.
        weight: (O, K) float64, W.
        mask: (O, K) bool.
        start: (O, K) float64, zero off the mask.
        ridge: absolute damping, positive.
        tolerance: stop when what is still to be gained is estimated at under this share of the error. Where it falls
            slowly, coarse estimates come short: at 1e-3, up to 5e-3 was left.
        shared: by all rows of the layer.

    Returns:
        (O, K) float64 and the number of steps; `None` when the damped gram matrix is not positive definite.
    """
    diagonal = objective.gram.diagonal() + ridge
    if not bool((diagonal > 0).all()):
        return None
    scale = diagonal.rsqrt()
    matrix = shared.get(f"unit diagonal, {ridge}", lambda: unit_diagonal(objective.gram, ridge))
    change, off = (start - objective.base) / scale, weight - objective.base
    slope = torch.add(objective.residual_cross, off, alpha=ridge) * scale
    product = _coarse_product(change, matrix) if tolerance >= _COARSE else _product(change, objective, ridge, scale)
    gradient = keep(slope - product, mask)
    unit = float(gradient.abs().max()) or 1.0
    error = float(((product - 2 * slope) * change).sum() + objective.residual_squares.sum())
    error += ridge * float(off.square().sum())
    least = _PERFECT * objective.target_square
    residual, kept = (gradient / unit).float(), mask.view(torch.uint8).float()
    goal = tolerance, error / unit**2, least / unit**2
    short, solved = step_dtype(matrix.device), None
    if tolerance >= _COARSE and short != matrix.dtype:
        rounded = shared.get(f"unit diagonal, {ridge}, rounded", lambda: matrix.to(short))
        solved = _solve(rounded, residual, kept, *goal)
        if solved is not None and not _gains_its_claim(matrix, residual, solved, tolerance * goal[1]):
            solved = None
    solved = solved or _solve(matrix, residual, kept, *goal)
    return None if solved is None else (start + solved.weight.double() * scale * unit, solved.steps)


def _product(change: Tensor, objective: Objective, ridge: float, scale: Tensor) -> Tensor:
    """A change, in units of unit diagonal, times the damped gram matrix in these units: (O, K) float64."""
    scaled = change * scale
    return torch.add(scaled @ objective.gram, scaled, alpha=ridge) * scale


def _coarse_product(change: Tensor, matrix: Tensor) -> Tensor:
    """The same with that matrix in float32, in half the time."""
    unit = float(change.abs().max()) or 1.0
    return ((change / unit).float() @ matrix).double() * unit


class _Solved(NamedTuple):
    """What the steps come to.

    Attributes:
        weight: (O, K) float32, y.
        steps: how many.
        gains: (O,), how much less each squared error is than at y = 0, as the steps add it up.
    """

    weight: Tensor
    steps: int
    gains: Tensor


def _gains_its_claim(matrix: Tensor, residual: Tensor, solved: _Solved, tolerance: float) -> bool:
    """Whether rounded steps gained what they claim, up to a squared error, as every eighth row tells."""
    weight = solved.weight[::_EVERY]
    gains = torch.linalg.vecdot((2 * residual[::_EVERY]).sub_(weight @ matrix), weight)
    missed = (gains - solved.gains[::_EVERY]).abs().mean() * len(residual)
    return float(missed) <= tolerance


def _solve(
    matrix: Tensor, residual: Tensor, kept: Tensor, tolerance: float, error: float, least: float
) -> _Solved | None:
    """Solve ``y C = residual`` on the kept entries of each row, from y = 0.

    Args:
        matrix: (K, K) float32 or bfloat16, C, with a unit diagonal; in its dtype steps are multiplied.
        residual: (O, K) float32, zero off the mask.
        kept: (O, K) float32, 1 = kept.
        tolerance: stop when no more than this share of the error is left to gain.
        error: at y = 0, in the units of the residual.
        least: what the tolerance is a share of at least, where the error itself vanishes.

    Returns:
        `None` when C is not positive definite.
    """
    solution = torch.zeros_like(residual)
    residual, direction = residual.clone(), residual.clone()
    squares = torch.linalg.vecdot(residual, residual)
    negligible = squares * _CONVERGED
    gained = torch.zeros_like(squares)
    gains: list[float] = []
    for step in range(_MOST_STEPS):
        product = (direction.to(matrix.dtype) @ matrix).float().mul_(kept)
        curvature = torch.linalg.vecdot(direction, product)
        usable = curvature > 0
        if bool((~usable & (squares > negligible)).any()):
            return None
        length = torch.where(usable, squares / curvature, 0.0)
        solution.addcmul_(length[:, None], direction)
        gained.addcmul_(length, squares)
        gains.append(float((length * squares).sum()))
        if _still_to_gain(gains) <= tolerance * max(error - sum(gains), least):
            return _Solved(solution, step + 1, gained)
        residual.addcmul_(length[:, None], product, value=-1)
        before, squares = squares, torch.linalg.vecdot(residual, residual)
        growth = torch.where(before > 0, squares / before, 0.0)
        torch.addcmul(residual, growth[:, None], direction, out=direction)
    return _Solved(solution, _MOST_STEPS, gained)


def _still_to_gain(gains: list[float]) -> float:
    """How far the error will still fall if it goes on at the rate of the last steps: the rest of a geometric series."""
    near = sum(gains[-_WINDOW:])
    if near == 0:
        return 0.0
    far = sum(gains[-2 * _WINDOW : -_WINDOW])
    return near**2 / (far - near) if len(gains) >= 2 * _WINDOW and far > near else float("inf")
