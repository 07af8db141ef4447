"""Plain N:M: the N largest of every M consecutive weights along the reduction axis."""

import torch
from torch import Tensor


def solve_rowwise(groups: Tensor, n: int) -> Tensor:
    """Keep the N largest of every group: exact, because groups are independent.

    Args:
        groups: (G, M), non-negative floats.
        n: weights kept per group.

    Returns:
        (G, M) bool. Ties keep the first weight.
    """
    kept = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros(groups.shape, dtype=torch.bool, device=groups.device).scatter_(1, kept, True)
