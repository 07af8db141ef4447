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
    used = masked_entries(weight.detach(), mask, leak, out=torch.empty_like(weight))
    return straight_through(weight, used)


def masked_entries(weight: Tensor, mask: Tensor, leak: Tensor | None, *, out: Tensor) -> Tensor:
    """The entries of `masked_weight` in a place that is given, without a gradient.

    Args:
        weight: any shape, floating, detached or within `no_grad`.
        mask: bool, same shape.
        leak: 0-dim, floating; None: 0.
        out: same shape and dtype as the weight; written.

    Returns:
        `out`.
    """
    out.copy_(mask.view(torch.uint8))  # on a CPU bytes become floats eight times as fast as bools do
    if leak is not None:
        out.clamp_min_(leak)
    return out.mul_(weight)  # in place: a new large tensor costs more than its sums
