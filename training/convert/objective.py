"""What a converted layer should achieve, as sums whose size does not depend on the number of samples.

A layer computes ``x W^T + b``. Conversion wants new weights W' and a bias that reproduce targets t, the outputs of the
dense layer without its bias:

    || X W'^T + d - T ||^2,    d = (new bias) - (bias of the dense layer)

Expanded, this needs X only through X^T X, T^T X, the sums of x and t, and ||T||^2. Those are accumulated batch by batch
in float64; the error of any candidate, its gradient and its minimum follow without seeing the data again.

The best d for a given W' is ``mean(t) - W' mean(x)``. With it, the objective is the same one over centred data, so a
layer with a bias is fitted on `Objective.centred` and its bias is set afterwards; a layer without one is fitted as is.

Source: the objective is that of Hubara et al. 2021, section 4 (AdaPrune).

Shape legend: S = samples (tokens, or images x positions), O = out features, K = reduction length of the GEMM matrix.
"""

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Objective:
    """Sums over samples of one layer; those of two sets of samples add up with ``+``.

    Attributes:
        gram: (K, K) float64, X^T X.
        cross: (O, K) float64, T^T X.
        input_sum: (K,) float64.
        target_sum: (O,) float64.
        target_square: ||T||^2, the sum over samples and outputs.
        samples: S.
    """

    gram: Tensor
    cross: Tensor
    input_sum: Tensor
    target_sum: Tensor
    target_square: float
    samples: int

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor) -> "Objective":
        """Sum over one set of samples: O(S K (K + O)).

        Args:
            inputs: (S, K), any float dtype.
            targets: (S, O), the dense outputs without bias.
        """
        x, t = inputs.double(), targets.double()
        return cls(x.T @ x, t.T @ x, x.sum(0), t.sum(0), float(t.square().sum()), len(x))

    def __add__(self, other: "Objective") -> "Objective":
        return Objective(
            self.gram + other.gram,
            self.cross + other.cross,
            self.input_sum + other.input_sum,
            self.target_sum + other.target_sum,
            self.target_square + other.target_square,
            self.samples + other.samples,
        )

    def centred(self) -> "Objective":
        """The objective over x - mean(x) and t - mean(t): what is left to W' when the bias is always the best one."""
        mean_input = self.input_sum / self.samples
        return replace(
            self,
            gram=self.gram - torch.outer(self.input_sum, mean_input),
            cross=self.cross - torch.outer(self.target_sum, mean_input),
            input_sum=torch.zeros_like(self.input_sum),
            target_sum=torch.zeros_like(self.target_sum),
            target_square=self.target_square - float(self.target_sum.square().sum()) / self.samples,
        )

    @property
    def live_inputs(self) -> int:
        """Columns of X that are not zero throughout. The rank of the problem is at most this, and at most S."""
        return int((self.gram.diagonal() > 0).sum())

    @property
    def mean_diagonal(self) -> float:
        """Mean of the diagonal of the gram matrix, the unit of damping; 1 when no input was ever non-zero."""
        return float(self.gram.diagonal().mean()) or 1.0

    def is_finite(self) -> bool:
        """Whether no sum met NaN or Inf."""
        sums = (self.gram.sum(), self.cross.sum(), self.input_sum.sum(), self.target_sum.sum())
        return bool(torch.isfinite(torch.stack(sums)).all()) and self.target_square < float("inf")

    def squared_error(self, weight: Tensor, shift: Tensor | None = None) -> float:
        """||X W'^T + d - T||^2.

        Args:
            weight: (O, K), W'.
            shift: (O,), d; `None` = zero.
        """
        w = weight.double()
        error = float(((w @ self.gram) * w).sum() - 2 * (w * self.cross).sum()) + self.target_square
        if shift is not None:
            d = shift.double()
            cross = d @ (w @ self.input_sum - self.target_sum)
            error += float(2 * cross + self.samples * d.square().sum())
        return max(error, 0.0)  # the terms cancel: a perfect fit can come out as -1e-16 of ||T||^2

    def relative_error(self, weight: Tensor, shift: Tensor | None = None) -> float:
        """||X W'^T + d - T|| / ||T||, exact to about 1e-7.

        T excludes the dense bias, so that a large bias cannot make a bad fit look small. Where T is zero, a layer that
        should be silent scores 0 if it is and 1 if it is not.

        Args:
            weight: (O, K), W'.
            shift: (O,), d; `None` = zero.
        """
        squared = self.squared_error(weight, shift)
        if self.target_square == 0:
            return float(squared > 0)
        return sqrt(squared / self.target_square)


@dataclass(frozen=True, eq=False)
class Solution:
    """What a method returns.

    Attributes:
        weight: (O, K) float64, zero wherever the mask is `False`.
        damping: what was added to the diagonal of the gram matrix, relative to its mean; 0 for methods that add none.
    """

    weight: Tensor
    damping: float = 0.0
