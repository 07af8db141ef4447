"""The mask and the weights together, by the alternating direction method of multipliers.

A mask chosen by magnitude knows nothing of the inputs. Here the problem ``min tr((W' - W*) H (W' - W*)^T)`` over the
W' that hold the pattern, with H the damped gram matrix and W* its unconstrained minimum, is split in two: W' is pulled
towards Z, which holds the pattern, and Z is the projection of W' plus what the pull has not achieved yet, U:

    W' = W* + rho (Z - U - W*) (H + rho I)^-1,      Z = projection of W' + U,      U = U + W' - Z

The pull rho grows until the masks stand still, and the weights are fitted to the mask they end with. All of it happens
in units in which every input has the same energy (unit diagonal of H): the projection keeps what matters to the
output, and one rho suits all columns. The projection is the exact solver, so any pattern is, row-wise or transposable.

Source: Meng, Behdin, Wang, Mazumder 2024, "ALPS" (section 3), for unstructured and row-wise N:M; the scaling, the fixed
schedule and the transposable projection are ours. docs/log.md has what
was tried.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tnm_pipeline.training.convert.least_squares import dampings, refit
from tnm_pipeline.training.convert.problem import Problem, Solution
from tnm_pipeline.training.convert.step_dtype import step_dtype
from tnm_pipeline.training.masks import keep

PULLS = 9  # their number; more of fewer steps find better masks
STEPS = 3  # with each of them
_WEAKEST, _STRONGEST = 0.1, 1.0  # rho, relative to the diagonal of H; each is larger than the last by one factor
_GROWTH = (_STRONGEST / _WEAKEST) ** (1 / (PULLS - 1))
_INVERTED = 4  # so-manieth pulls, the first and the last among them, have an inverse of their own


def admm(problem: Problem) -> Solution:
    """Choose the mask by ADMM and fit what it keeps.

    O(iterations O K^2), in bfloat16 where the processor has it, and three inverses, O(K^3), in float32; rows share the
    inverses.
    """
    objective, weight = problem.objective, problem.weight
    if not bool((objective.gram.diagonal() > 0).any()):  # no input ever changed: nothing but magnitude is known
        return refit(objective, weight, problem.project(weight), shared=problem.shared)
    for damping in dampings(problem.damping, objective):
        try:
            mask, start = _search(problem, damping)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing from torch's list of names
            continue
        solution = refit(objective, weight, mask, start=start, damping=damping, shared=problem.shared)
        return replace(solution, iterations=PULLS * STEPS)
    return refit(objective, weight, problem.project(weight), shared=problem.shared)


def _search(problem: Problem, damping: float) -> tuple[Tensor, Tensor]:
    """The mask, and weights to start fitting it from.

    Raises:
        torch.linalg.LinAlgError: the damped gram matrix is not positive definite.
    """
    objective, shared = problem.objective, problem.shared
    ridge = damping * objective.mean_diagonal
    scale = shared.get(f"admm: scale {damping}", lambda: (objective.gram.diagonal() + ridge).sqrt())
    matrix = shared.get(
        f"admm: matrix {damping}", lambda: _damped(objective.gram, ridge).div_(scale).div_(scale[:, None]).float()
    )
    ideal = (objective.base * scale).float()
    missing = (objective.residual_cross + ridge * (problem.weight - objective.base)) / scale
    if bool(missing.any()):  # not where a dense layer is fitted to its own inputs
        inverse = shared.get(f"admm: inverse {damping}", lambda: _inverse(matrix, 0.0))
        ideal.addmm_(missing.float(), inverse)
    mask, held = _alternate(problem, ideal, problem.project(problem.weight * scale), matrix, damping)
    return mask, held.double() / scale


def _alternate(problem: Problem, ideal: Tensor, mask: Tensor, matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The iteration, in units in which the matrix has a unit diagonal.

    Args:
        problem: gives the projection, and holds the inverses that its rows share.
        ideal: (O, K) float32, W*.
        mask: (O, K) bool, to start from.
        matrix: (K, K) float32, H.
        damping: in it, which the names of what is shared tell apart.

    Returns:
        The last mask and Z, (O, K) float32.
    """
    held = keep(ideal, mask)
    unmet = torch.zeros_like(ideal)
    responses = problem.shared.get(f"admm: responses {damping}", partial(_responses, matrix))
    for response in responses:
        for _ in range(STEPS):
            moved = held.sub_(unmet).sub_(ideal).to(response.dtype) @ response
            pulled = moved.float().add_(ideal).add_(unmet)
            mask = problem.project(pulled)
            held = keep(pulled, mask)
            unmet = pulled.sub_(held)
        unmet /= _GROWTH  # what is unmet is counted in units of the pull
    return mask, held


def _responses(matrix: Tensor) -> Tensor:
    """What of each pull on one weight arrives at the others, rho (H + rho I)^-1, in the dtype that steps multiply in.

    In the eigenvectors of H these are 1 / (1 + lambda / rho): over log rho a sigmoid, so nearly straight from one
    inverse to the next that means of the two, within 0.016, serve for the pulls between them.

    Args:
        matrix: (K, K) float32, H.

    Returns:
        (pulls, K, K), by growing pull.
    """
    responses = torch.empty(PULLS, *matrix.shape, dtype=step_dtype(matrix.device), device=matrix.device)
    weaker = torch.empty(0)
    for number in range(0, PULLS, _INVERTED):
        pull = _WEAKEST * _GROWTH**number
        stronger = _inverse(matrix, pull).mul_(pull)
        responses[number] = stronger
        for step in range(1, _INVERTED if number > 0 else 1):
            responses[number - step] = torch.lerp(stronger, weaker, step / _INVERTED)
        weaker = stronger
    return responses


def _damped(matrix: Tensor, ridge: float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(ridge)
    return damped


def _inverse(matrix: Tensor, ridge: float) -> Tensor:
    """The inverse of matrix + ridge I, same dtype."""
    return torch.cholesky_inverse(torch.linalg.cholesky(_damped(matrix, ridge)))
