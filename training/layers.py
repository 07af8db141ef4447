"""Layers whose forward product and input gradient use a sparse weight; the weight gradient is dense."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tnm_pipeline.training.distributed import change_type, full, local, local_part, plain_type
from tnm_pipeline.training.kernels.masked import masked_weight
from tnm_pipeline.training.kernels.masked_linear import by_panels, masked_linear
from tnm_pipeline.training.kernels.sampled_gradient import sampled_conv2d, sampled_linear
from tnm_pipeline.training.kernels.semi_structured import PackedWeight, sparse_linear
from tnm_pipeline.training.kernels.soft_threshold import matching_scale, soft_weight
from tnm_pipeline.training.pattern import Pattern


class SparseLinear(nn.Linear):
    """A Linear that multiplies with `used_weight(layer)`.

    Attributes:
        mask: bool buffer of the weight's shape, `True` = kept.
        leak: 0-dim buffer, what is left of pruned weights; None: nothing.
        scale: 0-dim buffer, of a soft threshold; None: the mask prunes.
        soft: the pattern of the soft threshold.
        sampled: whether the weight gradient is computed with a sample of the output gradient.
        guard: the hook that keeps the layer from being bypassed.
        packed: the weight for sparse products; None: all products are masked.
    """

    mask: Tensor
    leak: Tensor | None
    scale: Tensor | None
    soft: Pattern | None
    sampled: bool
    guard: RemovableHandle
    packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Linear's own name
        """(..., I) -> (..., O), as Linear."""
        if self.packed is not None and self.packed.serves(input, self.weight, self.mask):
            return sparse_linear(input, self.weight, self.packed, self.bias)
        if self.sampled:
            return sampled_linear(input, used_weight(self), self.bias)
        if self.soft is None and by_panels(input, self.weight):
            return masked_linear(input, self.weight, self.mask, self.leak, self.bias)
        return F.linear(input, used_weight(self), self.bias)


class SparseConv2d(nn.Conv2d):
    """A Conv2d that multiplies with `used_weight(layer)`; attributes as in `SparseLinear`."""

    mask: Tensor
    leak: Tensor | None
    scale: Tensor | None
    soft: Pattern | None
    sampled: bool
    guard: RemovableHandle
    packed: PackedWeight | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Conv2d's own name
        """(B, I, H, W) -> (B, O, H', W'), as Conv2d."""
        if self.sampled:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode)
            return sampled_conv2d(padded, used_weight(self), self.bias, self.stride, self.dilation)
        output: Tensor = self._conv_forward(input, used_weight(self), self.bias)
        return output


SparseLayer = SparseLinear | SparseConv2d

_SPARSE_OF: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
_PLAIN_OF = {sparse: plain for plain, sparse in _SPARSE_OF.items()}


def used_weight(layer: SparseLayer, weight: Tensor | None = None) -> Tensor:
    """What a layer multiplies with, of the weight's shape and dtype; its gradient goes straight to the weight.

    Args:
        layer: whose mask.
        weight: whole; None: the layer's own, which is whole in a forward pass.
    """
    weight = layer.weight if weight is None else weight
    if layer.scale is not None and layer.soft is not None:
        return soft_weight(weight, layer.scale, layer.soft)
    return masked_weight(weight, layer.mask, layer.leak)


def make_sparse(
    layer: nn.Module,
    mask: Tensor,
    *,
    leak: float | None = None,
    soft: Pattern | None = None,
    sampled: bool = False,
) -> SparseLayer:
    """Turn a plain layer into its sparse twin in place: same object, same parameters, same names.

    Args:
        layer: exactly a Linear or a Conv2d.
        mask: bool, of the weight's shape; becomes the persistent buffer `mask`.
        leak: what is left of pruned weights at first; becomes the persistent buffer `leak`. None: nothing, ever.
        soft: row-wise pattern of a soft threshold, whose scale becomes the persistent buffer `scale`; the mask prunes
            nothing then.
        sampled: compute the weight gradient with a sample of the output gradient; see `kernels/sampled_gradient.py`.
    """
    weight = layer.get_parameter("weight")
    layer.register_buffer("mask", mask)
    layer.register_buffer("leak", None if leak is None else torch.tensor(leak, device=weight.device))
    layer.register_buffer("scale", None if soft is None else matching_scale(full(weight), soft))
    change_type(layer, _SPARSE_OF[plain_type(layer)])
    sparse = cast(SparseLayer, layer)
    sparse.soft, sparse.sampled = soft, sampled
    # In eval mode nn.TransformerEncoderLayer reads its layers' weights itself, mask or not, unless one of them has a
    # forward hook.
    sparse.guard = layer.register_forward_pre_hook(_do_nothing)
    return sparse


def _do_nothing(*_: Any) -> None:
    """A forward hook that is only there to be seen."""


@torch.no_grad()
def make_plain(layer: SparseLayer) -> Tensor:
    """Write what the layer multiplies with into its weight and turn it back into a plain one, in place.

    Returns:
        The mask that the layer had; with a soft threshold, where the weight is not zero now.
    """
    used = used_weight(layer, full(layer.weight))
    local(layer.weight).copy_(local_part(used, layer.weight))
    mask = layer.mask if layer.soft is None else used.detach() != 0
    unmask(layer)
    return mask


def unmask(layer: SparseLayer) -> None:
    """Turn a sparse layer back into a plain one in place, its weight as it trains: with the pruned entries."""
    layer.guard.remove()
    vars(layer).pop("packed", None)
    del layer.mask, layer.leak, layer.scale, layer.soft, layer.sampled, layer.guard
    change_type(layer, _PLAIN_OF[plain_type(layer)])
