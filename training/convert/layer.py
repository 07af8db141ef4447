"""Convert one layer whose sums are known: mask, weight, bias, and the errors that remain.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

import time
from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.bias import best_shift, shift_of
from tnm_pipeline.training.convert.damping import TRIED, Halves, Trial
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Method, Problem, Solution, pieces
from tnm_pipeline.training.convert.result import ConvertedLayer
from tnm_pipeline.training.layout import from_gemm, to_gemm
from tnm_pipeline.training.masks import Solver, count_violations, kept_magnitude, solve
from tnm_pipeline.training.pattern import Pattern

Layer = nn.Linear | nn.Conv2d

# What the new weights answer for: half the dense model's inputs, half those that the converted model gives. With the
# latter alone a layer learns to repair few samples of its predecessors' errors; with the former alone, none.
OWN_SHARE = 0.5


def convert_layer(
    name: str,
    layer: Layer,
    dense: Layer,
    own: Objective,
    sequential: Objective,
    *,
    halves: Halves,
    pattern: Pattern,
    method: Method,
    solver: Solver,
    group: Group,
    normed: bool,
    tied: Sequence[tuple[Layer, Layer]] = (),
) -> tuple[ConvertedLayer, Tensor]:
    """Convert one layer in place.

    Args:
        name: of the layer.
        layer: of the converted model.
        dense: of the dense model.
        own: objective with the dense model's inputs.
        sequential: with the inputs that the layer will get; the same object for a conversion that is not sequential.
        halves: of the first `TRIED` outputs the own objective over either half of the samples.
        pattern: the rule.
        method: how weights are fitted.
        solver: of masks.
        group: who shares the work.
        normed: a batch norm follows that is re-tuned, and takes up the mean error of each channel as a bias would.
        tied: other layers with the same weight, in the converted and the dense model; all biases shift alike.

    Returns:
        The line of the report and the mask, weight-shaped.
    """
    began = time.perf_counter()
    old = to_gemm(layer.weight.detach()).double()
    users = [(layer, dense), *tied]
    biased = all(one.bias is not None for one, _ in users)
    shifts = normed or biased
    goal = own.centred() if shifts else own
    if sequential is not own:
        goal = (sequential.centred() if shifts else sequential).blended(goal, OWN_SHARE)
    by_magnitude = to_gemm(solve(layer.weight, pattern, solver))
    error_masked = _error(sequential, torch.where(by_magnitude, old, 0.0), layer, dense, normed)
    trial = Trial(halves, old[:TRIED], pattern, solver, centred=shifts)
    solution = _solve(Problem(goal, old, pattern, solver, choose_damping=trial.best), method, group)
    mask = from_gemm(solution.mask, layer.weight.shape)
    kept = kept_magnitude(layer.weight, mask)
    layer.weight.copy_(from_gemm(torch.where(solution.mask, solution.weight, 0.0), layer.weight.shape))
    stored = to_gemm(layer.weight.detach())
    if biased:
        shift = best_shift(sequential, stored)
        for one, other in users:
            assert one.bias is not None
            one.bias.copy_(shift if other.bias is None else other.bias.double() + shift)
    violations = count_violations(layer.weight, pattern).of(pattern)
    if violations:
        raise AssertionError(f"layer {name} breaks {pattern} in {violations} groups after conversion: a bug")
    error = _error(sequential, stored, layer, dense, normed)
    return ConvertedLayer(
        name=name,
        type=type(layer).__name__,
        pattern=str(pattern),
        shape=tuple(layer.weight.shape),
        gemm_shape=(old.shape[0], old.shape[1]),
        samples=sequential.samples,
        live_inputs=sequential.live_inputs,
        kept_magnitude=kept,
        error_masked=error_masked,
        error_own=error if sequential is own else _error(own, stored, layer, dense, normed),
        error=error,
        damping=solution.damping if isfinite(solution.damping) else None,
        iterations=solution.iterations,
        seconds=time.perf_counter() - began,
        violations=violations,
    ), mask


def _solve(problem: Problem, method: Method, group: Group) -> Solution:
    """Share the rows out in pieces that do not depend on the number of workers, and put the solution together."""
    parts = [problem.rows(part) for part in pieces(len(problem.weight), problem.pattern)]
    mine = group.mine(len(parts))
    solved = dict(zip(mine, method([parts[index] for index in mine], group), strict=True))

    def gathered(pieces: dict[int, Tensor]) -> Tensor:
        return torch.cat(group.exchange([pieces.get(index) for index in range(len(parts))], problem.weight.device))

    facts = gathered(
        {
            index: torch.tensor([[one.damping, one.iterations]], dtype=torch.float64, device=one.weight.device)
            for index, one in solved.items()
        }
    )
    damping, iterations = facts.amax(0).tolist()
    return Solution(
        gathered({index: one.weight for index, one in solved.items()}),
        gathered({index: one.mask for index, one in solved.items()}),
        damping,
        int(iterations),
    )


def _error(objective: Objective, weight: Tensor, layer: Layer, dense: Layer, normed: bool) -> float:
    shift = best_shift(objective, weight) if normed else shift_of(layer, dense)
    return objective.relative_error(weight, shift)
