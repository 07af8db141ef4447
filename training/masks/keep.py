"""A matrix under its mask."""

from torch import Tensor, uint8


def keep(matrix: Tensor, mask: Tensor) -> Tensor:
    """Zeros in place of what a mask leaves out.

    On a CPU bytes become floats five to twenty times as fast as a product with, or a choice by, booleans takes.

    Args:
        matrix: any shape, floating, finite.
        mask: bool, same shape, dense in memory.

    Returns:
        A new tensor, matrix * mask; zeros have the sign of what they replace.
    """
    return mask.view(uint8).to(matrix.dtype).mul_(matrix)
