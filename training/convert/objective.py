"""What a converted layer should achieve, as sums whose size does not depend on the number of samples.

A layer computes ``x W^T + b``. Conversion wants new weights W' and a bias that reproduce targets t, the outputs of the
dense layer without its bias:

    || X W'^T + d - T ||^2,    d = (new bias) - (bias of the dense layer)

Written around weights that are nearly right, W' = B + D with the dense layer's own B, this is ``|| X D^T + d - R ||^2``
with the residual ``R = T - X B^T``, which is zero on the dense model's own inputs. Expanded, it needs X only through
X^T X, R^T X, the sums of x and r, and ||R||^2; the error of any candidate, its gradient and its minimum follow without
seeing the data again, and no large terms cancel.

The best d for a given W' is ``mean(r) - D mean(x)``. With it, the objective is the same one over centred data, so a
layer with a bias is fitted on `Objective.centred` and its bias is set afterwards; a layer without one is fitted as is.

Source: the objective is that of Hubara et al. 2021, section 4 (AdaPrune).

Shape legend: S = samples (tokens, or images x positions), O = out features, K = reduction length of the GEMM matrix.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

_ROUNDING = 1e-6  # of float32 products, relative to the sum


@dataclass(frozen=True, eq=False)
class Objective:
    """Sums over samples of one layer; those of two sets of samples around the same base add up with ``+``.

    Attributes:
        gram: (K, K) float64, X^T X.
        base: (O, K) float64, B.
        residual_cross: (O, K) float64, R^T X.
        input_sum: (K,) float64.
        residual_sum: (O,) float64.
        residual_squares: (O,) float64, ||R||^2 of each output.
        target_squares: (O,) float64, ||T||^2 of each output.
        samples: S.
    """

    gram: Tensor
    base: Tensor
    residual_cross: Tensor
    input_sum: Tensor
    residual_sum: Tensor
    residual_squares: Tensor
    target_squares: Tensor
    samples: int

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, base: Tensor | None = None) -> "Objective":
        """Sum over one set of samples: O(S K (K + O)).

        Args:
            inputs: (S, K), any float dtype.
            targets: (S, O), the dense outputs without bias.
            base: (O, K), B; default: zeros.
        """
        x, t = inputs.double(), targets.double()
        around = t.new_zeros(t.shape[1], x.shape[1]) if base is None else base.double()
        r = t - x @ around.T
        return cls(x.T @ x, around, r.T @ x, x.sum(0), r.sum(0), r.square().sum(0), t.square().sum(0), len(x))

    def __add__(self, other: "Objective") -> "Objective":
        assert self.base is other.base or torch.equal(self.base, other.base), "sums around different weights"
        return Objective(
            self.gram + other.gram,
            self.base,
            self.residual_cross + other.residual_cross,
            self.input_sum + other.input_sum,
            self.residual_sum + other.residual_sum,
            self.residual_squares + other.residual_squares,
            self.target_squares + other.target_squares,
            self.samples + other.samples,
        )

    @cached_property
    def cross(self) -> Tensor:
        """(O, K) float64, T^T X."""
        return self.residual_cross + self.base @ self.gram

    def centred(self) -> "Objective":
        """The objective over x - mean(x) and t - mean(t): what is left to W' when the bias is always the best one."""
        mean_input = self.input_sum / self.samples
        gram = torch.addr(self.gram, self.input_sum, mean_input, alpha=-1)
        changes = self.centred_diagonal > 0
        gram.mul_(changes).mul_(changes[:, None])
        return replace(
            self,
            gram=gram,
            residual_cross=(self.residual_cross - torch.outer(self.residual_sum, mean_input)) * changes,
            input_sum=torch.zeros_like(self.input_sum),
            residual_sum=torch.zeros_like(self.residual_sum),
            residual_squares=(self.residual_squares - self.residual_sum.square() / self.samples).clamp_min_(0.0),
            target_squares=self.centred_target_squares,
        )

    @property
    def centred_diagonal(self) -> Tensor:
        """(K,) float64, the diagonal of the gram matrix of x - mean(x)."""
        diagonal = self.gram.diagonal()
        centred = diagonal - self.input_sum.square() / self.samples
        # what is left of an input that never changes is rounding
        return torch.where(centred > _ROUNDING * diagonal, centred, 0.0)

    @property
    def centred_target_squares(self) -> Tensor:
        """(O,) float64, ||T - mean(T)||^2 of each output."""
        target_sum = self.residual_sum + self.base @ self.input_sum
        return (self.target_squares - target_sum.square() / self.samples).clamp_min_(0.0)

    def blended(self, other: "Objective", share: float) -> "Objective":
        """(1 - share) of this objective and `share` of another one of as many samples, around the same base.

        Args:
            other: the other one.
            share: in [0, 1].
        """
        assert self.base is other.base, "sums around different weights"
        return Objective(
            torch.lerp(self.gram, other.gram, share),
            self.base,
            torch.lerp(self.residual_cross, other.residual_cross, share),
            torch.lerp(self.input_sum, other.input_sum, share),
            torch.lerp(self.residual_sum, other.residual_sum, share),
            torch.lerp(self.residual_squares, other.residual_squares, share),
            torch.lerp(self.target_squares, other.target_squares, share),
            self.samples,
        )

    def rows(self, part: slice) -> "Objective":
        """The objective of some of the outputs."""
        return replace(
            self,
            base=self.base[part],
            residual_cross=self.residual_cross[part],
            residual_sum=self.residual_sum[part],
            residual_squares=self.residual_squares[part],
            target_squares=self.target_squares[part],
        )

    @property
    def target_square(self) -> float:
        """||T||^2, the sum over samples and outputs."""
        return float(self.target_squares.sum())

    @property
    def live_inputs(self) -> int:
        """Columns of X that are not zero throughout. The rank of the problem is at most this, and at most S."""
        return int((self.gram.diagonal() > 0).sum())

    @property
    def mean_diagonal(self) -> float:
        """Mean of the diagonal of the gram matrix, the unit of damping; 1 when no input was ever non-zero."""
        return float(self.gram.diagonal().mean()) or 1.0

    def squared_errors(self, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        """||X W'^T + d - T||^2 of each output.

        Args:
            weight: (O, K), W'.
            shift: (O,), d; `None` = zero.

        Returns:
            (O,) float64.
        """
        change = weight.double() - self.base
        errors = ((change @ self.gram) * change).sum(1) - 2 * (change * self.residual_cross).sum(1)
        if shift is not None:
            d = shift.double()
            errors += d * (2 * (change @ self.input_sum - self.residual_sum) + self.samples * d)
        # the terms cancel where W' absorbs R: a perfect fit can come out as -1e-16 of ||R||^2
        return (errors + self.residual_squares).clamp_min_(0.0)

    def squared_error(self, weight: Tensor, shift: Tensor | None = None) -> float:
        """||X W'^T + d - T||^2, the sum over samples and outputs; arguments as of `squared_errors`."""
        return float(self.squared_errors(weight, shift).sum())

    def relative_error(self, weight: Tensor, shift: Tensor | None = None) -> float:
        """||X W'^T + d - T|| / ||T||.

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
