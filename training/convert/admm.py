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

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.least_squares import dampings, refit
from tnm_pipeline.training.convert.problem import Problem, Solution
from tnm_pipeline.training.convert.step_dtype import step_dtype
from tnm_pipeline.training.convert.unit_diagonal import unit_diagonal
from tnm_pipeline.training.masks import keep

PULLS = 7  # their number; more of fewer steps find better masks
STEPS = 3  # with each of them
_WEAKEST, _STRONGEST = 0.1, 1.0  # rho, relative to the diagonal of H; each is larger than the last by one factor
_GROWTH = (_STRONGEST / _WEAKEST) ** (1 / (PULLS - 1))
_INVERTED = 3  # so-manieth pulls, the first and the last among them, have an inverse of their own


def admm(parts: Sequence[Problem], group: Group) -> list[Solution]:
    """Choose the mask by ADMM and fit what it keeps.

    O(iterations O K^2), in bfloat16 where the processor has it, and three or four inverses, O(K^3), in float32. The
    parts step together, so that no more than one of the pulls is in memory.
    """
    if not parts:
        return []
    layer = parts[0]  # the gram matrix and what depends on it are the same for all
    if not bool((layer.objective.gram.diagonal() > 0).any()):  # no input ever changed: nothing but magnitude is known
        return group.each(_by_magnitude, parts)
    for damping in dampings(layer.damping, layer.objective):
        try:
            searches = _search(parts, damping, group)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing from torch's list of names
            continue
        return group.each(partial(_Search.fit, damping=damping), searches)
    return group.each(_by_magnitude, parts)


def _by_magnitude(problem: Problem) -> Solution:
    return refit(problem.objective, problem.weight, problem.project(problem.weight), shared=problem.shared)


def _search(parts: Sequence[Problem], damping: float, group: Group) -> list["_Search"]:
    """Find the masks.

    Raises:
        torch.linalg.LinAlgError: with the weakest pull the damped gram matrix is not positive definite.
    """
    gram, shared = parts[0].objective.gram, parts[0].shared
    ridge = damping * parts[0].objective.mean_diagonal
    diagonal = gram.diagonal() + ridge
    if not bool((diagonal > 0).all()):
        raise torch.linalg.LinAlgError("the damped diagonal is not positive")  # type: ignore[attr-defined]
    scale = diagonal.sqrt()
    matrix = shared.get(f"unit diagonal, {ridge}", lambda: unit_diagonal(gram, ridge))
    searches = group.each(partial(_Search, ridge=ridge, scale=scale), parts)
    if any(one.begins_off_its_minimum for one in searches):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:  # else there is no minimum. Another damping is no way out: other processes would not take it
            group.each(partial(_Search.move_to_minimum, inverse=torch.cholesky_inverse(lower)), searches)
    for response in _responses(matrix):
        group.each(partial(_Search.pull, response=response), searches)
    return searches


class _Search:
    """The iteration on some rows, in units in which H has a unit diagonal: (O, K) float32 each.

    Attributes:
        mask: of the last step, bool.
    """

    def __init__(self, problem: Problem, ridge: float, scale: Tensor) -> None:
        """Start at the base, under the mask of the weights.

        Args:
            problem: the rows.
            ridge: absolute damping.
            scale: (K,), the units.
        """
        objective = problem.objective
        self._problem, self._scale = problem, scale
        self._ideal = (objective.base * scale).float()
        # minus half of the gradient there
        self._slope = ((objective.residual_cross + ridge * (problem.weight - objective.base)) / scale).float()
        self.mask = problem.project(problem.weight * scale)
        self._held = keep(self._ideal, self.mask)
        self._unmet = torch.zeros_like(self._ideal)

    @property
    def begins_off_its_minimum(self) -> bool:
        """False where a dense layer is fitted to its own inputs."""
        return bool(self._slope.any())

    def move_to_minimum(self, inverse: Tensor) -> None:
        """Start at W* instead.

        Args:
            inverse: (K, K) float32, of H.
        """
        self._ideal.addmm_(self._slope, inverse)
        self._held = keep(self._ideal, self.mask)

    def pull(self, response: Tensor) -> None:
        """Take the steps of one pull, the last one's plus one factor.

        Args:
            response: (K, K), its matrix of `_responses`.
        """
        for _ in range(STEPS):
            fixed = self._unmet.add_(self._ideal)
            moved = self._held.sub_(fixed).to(response.dtype) @ response
            pulled = fixed.add_(moved)
            self.mask = self._problem.project(pulled)
            self._held = keep(pulled, self.mask)
            self._unmet = pulled.sub_(self._held)
        self._unmet /= _GROWTH  # what is unmet is counted in units of the pull

    def fit(self, damping: float) -> Solution:
        """The best weights for the mask, found from those that the search holds."""
        problem, start = self._problem, self._held.double().div_(self._scale)
        objective, weight, shared = problem.objective, problem.weight, problem.shared
        solution = refit(objective, weight, self.mask, start=start, damping=damping, shared=shared)
        return replace(solution, iterations=PULLS * STEPS)


def _responses(matrix: Tensor) -> Iterator[Tensor]:
    """What of each pull on one weight arrives at the others, rho (H + rho I)^-1, by growing pull.

    In the eigenvectors of H these are 1 / (1 + lambda / rho): over log rho a sigmoid, so nearly straight from one
    inverse to the next that means of the two, within 0.016, serve for the pulls between them.

    Args:
        matrix: (K, K) float32, H.

    Yields:
        (K, K), in the dtype that steps multiply in.
    """
    dtype = step_dtype(matrix.device)
    weaker = stronger = _response(matrix, 0)
    for number in range(PULLS):
        step = number % _INVERTED
        if step == 0:
            weaker = stronger
            yield weaker.to(dtype)
            stronger = _response(matrix, number + _INVERTED) if number + _INVERTED < PULLS else stronger
        else:
            yield torch.lerp(weaker, stronger, step / _INVERTED).to(dtype)


def _response(matrix: Tensor, number: int) -> Tensor:
    """The response to a pull that has an inverse of its own: (K, K) float32."""
    pull = _WEAKEST * _GROWTH**number
    pulled = matrix.clone()
    pulled.diagonal().add_(pull)
    return torch.cholesky_inverse(torch.linalg.cholesky(pulled)).mul_(pull)
