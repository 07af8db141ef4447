"""Does a tensor hold its pattern, and how much of the weight does a mask keep?

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tnm_pipeline.training.layout import pad_to_multiple, to_gemm
from tnm_pipeline.training.masks.keep import keep
from tnm_pipeline.training.pattern import Pattern


@dataclass(frozen=True)
class Violations:
    """Groups with more than N non-zero entries.

    Attributes:
        forward: among the groups of W, along the input axis.
        transposed: among the groups of W^T, along the output axis.
    """

    forward: int
    transposed: int

    def of(self, pattern: Pattern) -> int:
        """The violations that count for this pattern: W^T only matters when it is transposable."""
        return self.forward + (self.transposed if pattern.transposable else 0)


def count_violations(tensor: Tensor, pattern: Pattern) -> Violations:
    """Count the groups of W and of W^T that hold more than N non-zeros.

    Args:
        tensor: weight or mask, (O, I) or (O, I, H, W).
        pattern: N:M; both directions are counted whether or not it is transposable.

    Returns:
        The two counts. Edge groups shorter than M count as groups.
    """
    nonzero = pad_to_multiple((to_gemm(tensor.detach()) != 0).to(torch.int8), pattern.m)
    # M adds of strided slices: several times faster than a sum over a short axis.
    along_inputs = sum(nonzero[:, k :: pattern.m] for k in range(pattern.m))
    along_outputs = sum(nonzero[k :: pattern.m] for k in range(pattern.m))
    return Violations(_count_above(along_inputs, pattern.n), _count_above(along_outputs, pattern.n))


def kept_magnitude(weight: Tensor, mask: Tensor) -> float:
    """Sum of kept abs(w) over sum of abs(w), in [0, 1]; 1 for an all-zero weight.

    Args:
        weight: any shape, float.
        mask: bool, same shape.
    """
    magnitude = weight.detach().abs()
    total = float(magnitude.sum(dtype=torch.float64))
    return float(keep(magnitude, mask).sum(dtype=torch.float64)) / total if total else 1.0


def _count_above(kept: Tensor | int, n: int) -> int:
    return int((torch.as_tensor(kept) > n).count_nonzero())
