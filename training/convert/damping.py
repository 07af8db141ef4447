"""How much damping a layer wants, tried on data that its weights were not fitted to.

A layer with few inputs and many samples wants none; one whose inputs outnumber what the samples tell apart wants as
much as the largest of its gram matrix. Nothing simpler than a trial tells them apart: weights for a plain mask are
fitted to one half of the samples and tested on the other. What is best for half of them is twice as much as all want,
in theory; measured, a little more than that is better: the inputs in production differ from those of both halves.

Shape legend: O = out features, K = reduction length, R = the rows that are tried.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tnm_pipeline.training.convert.bias import best_shift
from tnm_pipeline.training.convert.least_squares import refit
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import DAMPING
from tnm_pipeline.training.masks import Solver, solve
from tnm_pipeline.training.pattern import Pattern

GRID = (0.01, DAMPING, 0.1, 0.3, 1.0)  # of the mean diagonal
TRIED = 32  # outputs; a block that is cut off harms nothing here
_HALF = 1.5  # how much more damping a fit to half of the samples gets; docs/log.md
_TOLERANCE = 1e-2  # of the fits: errors of two dampings differ by more

Halves = Callable[[], tuple[Objective, Objective] | None]
"""Makes the same layer's objective over two halves of the samples; `None` if all samples are in one."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A layer's samples in two halves.

    Attributes:
        halves: objectives of R outputs on the dense model's own inputs, not centred; made for the trial alone.
        weight: (R, K) float64, their current weights.
        pattern: the rule.
        solver: of masks.
        centred: the bias will follow.
    """

    halves: Halves
    weight: Tensor
    pattern: Pattern
    solver: Solver
    centred: bool

    def best(self) -> float:
        """The damping of `GRID` with the least error on the other half; errors are taken to have one minimum.

        Without another half, `DAMPING`.
        """
        halves = self.halves()
        if halves is None:
            return DAMPING
        fitted, tested = halves
        if self.centred:
            fitted = fitted.centred()
        del halves  # sums of a wide layer are large
        diagonal = tested.centred_diagonal if self.centred else tested.gram.diagonal()
        norms = (fitted.gram.diagonal() + diagonal).clamp(min=0.0).sqrt()
        mask = solve(self.weight, self.pattern, self.solver, self.weight.abs() * norms)
        scale = fitted.target_squares + (tested.centred_target_squares if self.centred else tested.target_squares)

        @cache
        def error(index: int) -> float:
            fit = refit(fitted, self.weight, mask, damping=_HALF * GRID[index], tolerance=_TOLERANCE)
            # every output counts alike
            shift = best_shift(tested, fit.weight) if self.centred else None
            return float(torch.where(scale > 0, tested.squared_errors(fit.weight, shift) / scale, 0.0).sum())

        return GRID[_lowest(error, GRID.index(DAMPING), len(GRID))]


def _lowest(value: Callable[[int], float], start: int, count: int) -> int:
    """Downhill from a start to the first index whose neighbours are no lower."""
    at = start
    for step in (1, -1):
        while 0 <= at + step < count and value(at + step) < value(at):
            at += step
    return at
