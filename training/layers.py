"""Layers whose forward product and input gradient use the masked weight; the weight gradient is dense."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.kernels.masked import masked_weight


class SparseLinear(nn.Linear):
    """A Linear with a `mask` buffer of its weight's shape, bool, `True` = kept."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Linear's own name
        """(..., I) -> (..., O), as Linear with weight * mask."""
        return F.linear(input, masked_weight(self.weight, self.mask), self.bias)


class SparseConv2d(nn.Conv2d):
    """A Conv2d with a `mask` buffer of its weight's shape, bool, `True` = kept."""

    mask: Tensor

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Conv2d's own name
        """(B, I, H, W) -> (B, O, H', W'), as Conv2d with weight * mask."""
        output: Tensor = self._conv_forward(input, masked_weight(self.weight, self.mask), self.bias)
        return output


SparseLayer = SparseLinear | SparseConv2d

_SPARSE_OF: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
_PLAIN_OF = {sparse: plain for plain, sparse in _SPARSE_OF.items()}


def make_sparse(layer: nn.Module, mask: Tensor) -> SparseLayer:
    """Turn a plain layer into its sparse twin in place: same object, same parameters, same names.

    Args:
        layer: exactly a Linear or a Conv2d.
        mask: bool, of the weight's shape; becomes the persistent buffer `mask`.
    """
    layer.register_buffer("mask", mask)
    layer.__class__ = _SPARSE_OF[type(layer)]
    return cast(SparseLayer, layer)


@torch.no_grad()
def make_plain(layer: SparseLayer) -> Tensor:
    """Write the zeros into the weight and turn the layer back into a plain one, in place.

    Returns:
        The mask that the layer had.
    """
    mask = layer.mask
    layer.weight.mul_(mask)
    del layer.mask
    cast(nn.Module, layer).__class__ = _PLAIN_OF[type(layer)]
    return mask
