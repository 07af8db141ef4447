"""Layers whose forward product and input gradient use a sparse weight; the weight gradient is dense."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.kernels.masked import masked_weight
from tnm_pipeline.training.kernels.soft_threshold import matching_scale, soft_weight
from tnm_pipeline.training.pattern import Pattern


class SparseLinear(nn.Linear):
    """A Linear that multiplies with `used_weight(layer)`.

    Attributes:
        mask: bool buffer of the weight's shape, `True` = kept.
        leak: 0-dim buffer, what is left of pruned weights; None: nothing.
        scale: 0-dim buffer, of a soft threshold; None: the mask prunes.
        soft: the pattern of the soft threshold.
    """

    mask: Tensor
    leak: Tensor | None
    scale: Tensor | None
    soft: Pattern | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Linear's own name
        """(..., I) -> (..., O), as Linear."""
        return F.linear(input, used_weight(self), self.bias)


class SparseConv2d(nn.Conv2d):
    """A Conv2d that multiplies with `used_weight(layer)`; attributes as in `SparseLinear`."""

    mask: Tensor
    leak: Tensor | None
    scale: Tensor | None
    soft: Pattern | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Conv2d's own name
        """(B, I, H, W) -> (B, O, H', W'), as Conv2d."""
        output: Tensor = self._conv_forward(input, used_weight(self), self.bias)
        return output


SparseLayer = SparseLinear | SparseConv2d

_SPARSE_OF: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
_PLAIN_OF = {sparse: plain for plain, sparse in _SPARSE_OF.items()}


def used_weight(layer: SparseLayer) -> Tensor:
    """What a layer multiplies with, of the weight's shape and dtype; its gradient goes straight to the weight."""
    if layer.scale is not None and layer.soft is not None:
        return soft_weight(layer.weight, layer.scale, layer.soft)
    return masked_weight(layer.weight, layer.mask, layer.leak)


def make_sparse(
    layer: nn.Module, mask: Tensor, *, leak: float | None = None, soft: Pattern | None = None
) -> SparseLayer:
    """Turn a plain layer into its sparse twin in place: same object, same parameters, same names.

    Args:
        layer: exactly a Linear or a Conv2d.
        mask: bool, of the weight's shape; becomes the persistent buffer `mask`.
        leak: what is left of pruned weights at first; becomes the persistent buffer `leak`. None: nothing, ever.
        soft: row-wise pattern of a soft threshold, whose scale becomes the persistent buffer `scale`; the mask prunes
            nothing then.
    """
    weight = layer.get_parameter("weight")
    layer.register_buffer("mask", mask)
    layer.register_buffer("leak", None if leak is None else torch.tensor(leak, device=weight.device))
    layer.register_buffer("scale", None if soft is None else matching_scale(weight, soft))
    layer.__class__ = _SPARSE_OF[type(layer)]
    sparse = cast(SparseLayer, layer)
    sparse.soft = soft
    return sparse


@torch.no_grad()
def make_plain(layer: SparseLayer) -> Tensor:
    """Write what the layer multiplies with into its weight and turn it back into a plain one, in place.

    Returns:
        The mask that the layer had; with a soft threshold, where the weight is not zero now.
    """
    layer.weight.copy_(used_weight(layer))
    mask = layer.mask if layer.soft is None else layer.weight.detach() != 0
    del layer.mask, layer.leak, layer.scale, layer.soft
    cast(nn.Module, layer).__class__ = _PLAIN_OF[type(layer)]
    return mask
