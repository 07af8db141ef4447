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

PULLS = (0.1, 0.18, 0.32, 0.56, 1.0)  # rho, relative to the diagonal of H
STEPS = 5  # with each of them


def admm(problem: Problem) -> Solution:
    """Choose the mask by ADMM and fit what it keeps.

    O(iterations O K^2), in bfloat16 where the processor has it, and one inverse, O(K^3), for each pull, in float32;
    rows share the inverses.
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
        return replace(solution, iterations=len(PULLS) * STEPS)
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
    held = ideal * mask
    unmet = torch.zeros_like(ideal)
    past = PULLS[0]
    for pull in PULLS:
        response = problem.shared.get(f"admm: {damping}, {pull}", partial(_response, matrix, pull))
        unmet *= past / pull
        past = pull
        for _ in range(STEPS):
            moved = held.sub_(unmet).sub_(ideal).to(response.dtype) @ response
            pulled = moved.float().add_(ideal).add_(unmet)
            mask = problem.project(pulled)
            held = pulled * mask
            unmet = pulled.sub_(held)
    return mask, held


def _response(matrix: Tensor, pull: float) -> Tensor:
    """What of a pull on one weight arrives at the others, in the dtype in which steps are multiplied."""
    return _inverse(matrix, pull).mul_(pull).to(step_dtype(matrix.device))


def step_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where there are instructions for it: a search needs no more, and the fit after it is in float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # processors with AMX have it too; the public torch.cpu.get_capabilities is younger than the oldest PyTorch
        native = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _damped(matrix: Tensor, ridge: float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(ridge)
    return damped


def _inverse(matrix: Tensor, ridge: float) -> Tensor:
    """The inverse of matrix + ridge I, same dtype."""
    return torch.cholesky_inverse(torch.linalg.cholesky(_damped(matrix, ridge)))
