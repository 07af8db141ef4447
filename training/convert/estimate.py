"""How far off a layer's outputs would be, before it is converted.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from tnm_pipeline.training.convert.meter import Repair
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern


class Estimate(NamedTuple):
    """Of one layer under one pattern.

    Attributes:
        relative_error: ||Y' - Y|| / ||Y - dense bias||.
        squared_error: (O,) float64, mean over rows of (y' - y)^2.
    """

    relative_error: float
    squared_error: Tensor


def estimate_masked(objective: Objective, weight: Tensor, pattern: Pattern, repair: Repair) -> Estimate:
    """The error of nothing but a mask, by weight times norm of the input: O(O K^2), no fit.

    Cheap, and enough to tell layers apart; a fit brings some errors down by more than others, so where there is time
    `estimate_weight` of fitted weights chooses better.

    Args:
        objective: on the dense model's own inputs and outputs, not centred.
        weight: (O, K), the weights to be masked.
        pattern: the rule.
        repair: as of the layer's sensitivity.
    """
    importance = weight.double().abs() * objective.gram.diagonal().clamp(min=0).sqrt()
    mask = solve(weight, pattern, importance=importance)
    return estimate_weight(objective, torch.where(mask, weight, 0.0), repair)


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
