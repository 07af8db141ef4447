"""The masked kernel: a dense product with the masked weight. The contract for every other kernel."""

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """Forward: weight * mask. Backward: the gradient of the masked weight, unmasked, goes to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def masked_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight that both sparse products of a layer multiply with.

    Used as the weight of `linear` or `conv2d`, autograd computes the forward product and the input gradient
    with the masked weight, and the weight gradient densely: pruned weights keep learning and may come back
    (straight-through, Hubara et al. 2021, section 3.3).

    Args:
        weight: any shape, floating.
        mask: bool, same shape.

    Returns:
        weight * mask, same shape and dtype.
    """
    result: Tensor = _StraightThrough.apply(weight, mask)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return result
