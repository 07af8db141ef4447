"""The masked kernel: a dense product with the masked weight. The contract for every other kernel."""

import torch
from torch import Tensor

from tnm_pipeline.training.kernels.straight_through import straight_through


def masked_weight(weight: Tensor, mask: Tensor, leak: Tensor | None = None) -> Tensor:
    """The weight that both sparse products of a layer multiply with.

    Args:
        weight: any shape, floating.
        mask: bool, same shape.
        leak: what is left of pruned weights, 0-dim, floating: at 1 the product is dense, at 0 it is masked. A tensor,
            so that compiled code reads it anew each time. None: 0.

    Returns:
        weight * (1 where kept, leak elsewhere), same shape and dtype; straight-through gradient.
    """
    used = mask.view(torch.uint8).to(weight.dtype)  # on a CPU bytes become floats eight times as fast as bools do
    if leak is not None:
        used.clamp_min_(leak)
    return straight_through(weight, used.mul_(weight.detach()))  # in place: a new large tensor costs more than its sums
