"""The soft threshold of S-STE (Hu et al., NeurIPS 2024, arXiv:2409.09099): N:M as a continuous function of the weight.

A hard mask makes the product jump when two magnitudes of a group change places. Here kept weights shrink by the largest
pruned magnitude of their group, so that a weight is zero at the moment when it changes sides.

Shape legend: O = out features or channels, I = in features or channels, M = group size.
"""

import torch
from torch import Tensor

from tnm_pipeline.training.kernels.straight_through import straight_through
from tnm_pipeline.training.pattern import Pattern


def soft_threshold(weight: Tensor, pattern: Pattern) -> Tensor:
    """sign(w) * relu(abs(w) - t), t = the (M-N)-th smallest magnitude of the M consecutive inputs around w.

    Args:
        weight: (O, I) or (O, I, H, W), I a multiple of M.
        pattern: row-wise.

    Returns:
        Same shape and dtype; at most N non-zeros in each group along the inputs, fewer where magnitudes tie.
    """
    magnitude = weight.abs().unflatten(1, (-1, pattern.m))  # (O, I/M, M, ...)
    excess = magnitude - _pruned_at_most(magnitude, pattern).unsqueeze(2)
    return torch.copysign(excess.relu_().flatten(1, 2), weight)


def _pruned_at_most(magnitude: Tensor, pattern: Pattern) -> Tensor:
    """The (M-N)-th smallest of each group, (O, I/M, ...): a bubble sort of whole slices, 6 times as fast as `sort`."""
    rising = list(magnitude.unbind(2))
    for done in range(pattern.m - pattern.n):
        for other in range(done + 1, pattern.m):
            rising[done], rising[other] = (
                torch.minimum(rising[done], rising[other]),
                torch.maximum(rising[done], rising[other]),
            )
    return rising[pattern.m - pattern.n - 1]


def soft_weight(weight: Tensor, scale: Tensor, pattern: Pattern) -> Tensor:
    """The weight that a layer multiplies with: scale * soft_threshold(weight), straight-through gradient.

    Args:
        weight: (O, I) or (O, I, H, W), I a multiple of M.
        scale: 0-dim, floating.
        pattern: row-wise.

    Returns:
        Same shape and dtype as the weight.
    """
    return straight_through(weight, soft_threshold(weight.detach(), pattern) * scale)


@torch.no_grad()
def matching_scale(weight: Tensor, pattern: Pattern) -> Tensor:
    """The scale that brings the thresholded weight closest to the dense one in least squares: w.S(w) / S(w).S(w).

    Computed once, when training begins, and kept: that is the paper's rule.

    Args:
        weight: (O, I) or (O, I, H, W), I a multiple of M.
        pattern: row-wise.

    Returns:
        0-dim float32 on the weight's device; 1 where S(w) is all zero.
    """
    used = soft_threshold(weight, pattern).double()
    norm = used.square().sum()
    return torch.where(norm > 0, (weight * used).sum() / norm, 1.0).float()
