"""The methods by name: an objective, a weight and its mask in, the new weight out."""

from collections.abc import Callable

import torch
from torch import Tensor

from tnm_pipeline.training.convert.adaprune import adaprune
from tnm_pipeline.training.convert.least_squares import least_squares
from tnm_pipeline.training.convert.objective import Objective, Solution

Method = Callable[[Objective, Tensor, Tensor], Solution]
"""Called as ``method(objective, weight, mask)``: weight (O, K) float64, mask (O, K) bool, `True` = kept."""


def magnitude(objective: Objective, weight: Tensor, mask: Tensor) -> Solution:
    """Keep what the mask keeps and change nothing else: the baseline of every other method.

    Args:
        objective: not read.
        weight: (O, K).
        mask: (O, K) bool.
    """
    return Solution(torch.where(mask, weight, 0.0))


METHODS: dict[str, Method] = {
    "least-squares": least_squares,
    "adaprune": adaprune,
    "magnitude": magnitude,
}
