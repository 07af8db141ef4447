"""The bias that a converted layer needs, in closed form.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.objective import Objective


def best_shift(objective: Objective, weight: Tensor) -> Tensor:
    """The d that minimises ||X W'^T + d - T||^2: mean(r) - (W' - B) mean(x).

    Args:
        objective: of the layer, not centred.
        weight: (O, K), W'.

    Returns:
        (O,) float64.
    """
    change = weight.double() - objective.base
    return (objective.residual_sum - change @ objective.input_sum) / objective.samples


def shift_of(layer: nn.Linear | nn.Conv2d, dense: nn.Linear | nn.Conv2d) -> Tensor | None:
    """How far the layer's bias is from that of the dense layer: (O,) float64, `None` when neither has one."""
    if layer.bias is None and dense.bias is None:
        return None
    zero = torch.zeros(len(layer.weight), dtype=torch.float64, device=layer.weight.device)
    return (zero if layer.bias is None else layer.bias.detach().double()) - (
        zero if dense.bias is None else dense.bias.detach().double()
    )
