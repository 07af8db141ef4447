"""AdaPrune, the paper's method: Adam on the kept weights of one layer (Hubara et al. 2021, section 4).

The published code passes all calibration samples through the layer at every step. Here the same full-batch gradient
comes from the gram matrix, ``W' G - cross``, at a cost that does not depend on the number of samples: the baseline is
faster than the published code and otherwise the same. A cosine schedule and a learning rate relative to the weights
replace the published constant one, because they do better.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.objective import Objective, Solution

ITERATIONS = 1000
LEARNING_RATE = 0.03  # of the weights' root mean square; 0.03 to 0.3 are alike on digits, 0.01 stops short


def adaprune(
    objective: Objective,
    weight: Tensor,
    mask: Tensor,
    *,
    iterations: int = ITERATIONS,
    learning_rate: float = LEARNING_RATE,
) -> Solution:
    """Descend from the masked weights with Adam, the learning rate falling to zero along a cosine.

    Runs in float32 as the published code does; O(iterations O K^2).

    Args:
        objective: of the layer, centred if its bias will follow.
        weight: (O, K) float64, the current weights.
        mask: (O, K) bool.
        iterations: Adam steps.
        learning_rate: of the first step, relative to the root mean square of the kept weights.
    """
    start = torch.where(mask, weight, 0.0)
    # Adam is blind to the objective's scale but for its epsilon: the unit diagonal keeps that negligible
    gram = (objective.gram / objective.mean_diagonal).float()
    cross = (objective.cross / objective.mean_diagonal).float()
    kept = mask.float()
    spread = float(start[mask].square().mean().sqrt()) if bool(mask.any()) else 0.0
    parameter = nn.Parameter(start.float())
    optimizer = torch.optim.Adam([parameter], lr=learning_rate * spread, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=iterations)
    for _ in range(iterations):
        parameter.grad = torch.addmm(cross, parameter.detach(), gram, beta=-1).mul_(kept)
        optimizer.step()
        schedule.step()
    return Solution(parameter.detach().double())
