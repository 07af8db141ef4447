"""How far off a layer's outputs would be, before it is converted.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from tnm_pipeline.training.convert.admm import admm
from tnm_pipeline.training.convert.damping import TRIED, Halves, Trial
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.meter import Repair
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.problem import Problem, pieces
from tnm_pipeline.training.pattern import Pattern


class Estimate(NamedTuple):
    """Of one layer under one pattern.

    Attributes:
        relative_error: ||Y' - Y|| / ||Y - dense bias||.
        squared_error: (O,) float64, mean over rows of (y' - y)^2.
    """

    relative_error: float
    squared_error: Tensor


def estimate_fitted(
    fitted: Objective,
    tested: Objective,
    weight: Tensor,
    pattern: Pattern,
    *,
    repair: Repair,
    group: Group,
    halves: Halves,
) -> Estimate:
    """The error that ADMM's weights make on other samples than those that they are fitted to.

    A conversion by another method makes more.

    The other samples matter: where a layer's inputs are many and the examples few, the error that a fit leaves on its
    own samples is half of what it makes elsewhere.

    Args:
        fitted: objective to fit, on the dense model's own inputs and outputs, not centred.
        tested: the same sums over samples to predict the error on.
        weight: (O, K), the weights to be converted.
        pattern: the rule.
        repair: as of the layer's sensitivity.
        group: whose threads share the rows.
        halves: of what is fitted to, to choose the damping by, as in a conversion.
    """
    shifts, old = repair != "nothing", weight.double()
    trial = Trial(halves, old[:TRIED], pattern, "exact", centred=shifts)
    problem = Problem(fitted.centred() if shifts else fitted, old, pattern, choose_damping=trial.best)
    parts = [problem.rows(part) for part in pieces(len(weight), pattern)]
    return estimate_weight(tested, torch.cat([one.weight for one in admm(parts, group)]), repair)


def estimate_weight(objective: Objective, weight: Tensor, repair: Repair) -> Estimate:
    """The error of any new weight, less what is repaired: exact on the data of the objective.

    Args:
        objective: on the dense model's own inputs and outputs, not centred.
        weight: (O, K), the new one.
        repair: what a bias or a re-tuned batch norm takes off the error of each output.
    """
    sums = objective if repair == "nothing" else objective.centred()
    change = weight.double() - sums.base
    turned = change @ sums.gram
    errors = (turned * change).sum(1)
    if repair == "shift and scale":
        along = (turned * sums.base).sum(1)
        spread = sums.target_squares
        errors = errors - torch.where(spread > 0, along.square() / spread, 0.0)
    errors = errors.clamp(min=0.0)
    total = float(errors.sum())
    relative = sqrt(total / objective.target_square) if objective.target_square else float(total > 0)
    return Estimate(relative, errors / objective.samples)
