"""Straight-through gradients: multiply with one weight, teach another."""

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, used: Tensor) -> Tensor:
        return used

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(weight: Tensor, used: Tensor) -> Tensor:
    """`used`, whose gradient goes to `weight` as it is (Hubara et al. 2021, section 3.3).

    As the weight of `linear` or `conv2d`, the forward product and the input gradient are computed with `used`, and
    `weight` gets the whole weight gradient: entries that are zero in `used` keep learning and may come back.

    Args:
        weight: any shape, floating; what the optimizer steps.
        used: same shape and dtype, without a gradient of its own.

    Returns:
        The values of `used`, sharing its memory.
    """
    result: Tensor = _StraightThrough.apply(weight, used)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return result
