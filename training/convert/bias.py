"""The bias that a converted layer needs, in closed form.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.layout import to_gemm


def best_shift(objective: Objective, weight: Tensor) -> Tensor:
    """The d that minimises ||X W'^T + d - T||^2: mean(t) - W' mean(x).

    Args:
        objective: of the layer, not centred.
        weight: (O, K), W'.

    Returns:
        (O,) float64.
    """
    return (objective.target_sum - weight.double() @ objective.input_sum) / objective.samples


def shift_of(layer: nn.Linear | nn.Conv2d, dense: nn.Linear | nn.Conv2d) -> Tensor | None:
    """How far the layer's bias is from that of the dense layer: (O,) float64, `None` when neither has one."""
    if layer.bias is None and dense.bias is None:
        return None
    zero = torch.zeros(len(layer.weight), dtype=torch.float64, device=layer.weight.device)
    return (zero if layer.bias is None else layer.bias.detach().double()) - (
        zero if dense.bias is None else dense.bias.detach().double()
    )


@torch.no_grad()
def correct_bias(layer: nn.Linear | nn.Conv2d, dense: nn.Linear | nn.Conv2d, objective: Objective) -> None:
    """Set the layer's bias to the best one for its weight as stored. A layer without a bias is left alone.

    No parameter is created: where a batch norm follows, re-tuning it does the same.

    Args:
        layer: the converted layer, changed in place.
        dense: the same layer of the reference model.
        objective: of the layer, not centred.
    """
    if layer.bias is None:
        return
    shift = best_shift(objective, to_gemm(layer.weight))
    layer.bias.copy_(shift if dense.bias is None else dense.bias.double() + shift)
