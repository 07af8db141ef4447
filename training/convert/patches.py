"""A layer's inputs and outputs as the rows of its GEMM, a bounded number at a time.

Shape legend: B = batch, I and O = in and out channels, S = samples (rows), K = reduction length, L = output positions.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ENTRIES_AT_ONCE = 1 << 22  # float64 entries of the (S, K) slice: 32 MiB


def gemm_rows(layer: nn.Linear | nn.Conv2d, inputs: Tensor, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut one call of a layer into slices of X and Y with ``X @ to_gemm(layer.weight).T + layer.bias == Y``.

    Args:
        layer: Linear, or Conv2d with one group.
        inputs: what the layer received: (..., K) or (B, I, height, width) or (I, height, width).
        outputs: what it returned, (..., O) or (B, O, height, width) or (O, height, width).

    Yields:
        (S, K) and (S, O), float64.
    """
    if isinstance(layer, nn.Linear):
        rows_at_once = max(1, _ENTRIES_AT_ONCE // layer.in_features)
        x, y = inputs.reshape(-1, layer.in_features), outputs.reshape(-1, layer.out_features)
        for some_x, some_y in zip(torch.split(x, rows_at_once), torch.split(y, rows_at_once), strict=True):
            yield some_x.double(), some_y.double()
        return
    if inputs.dim() == 3:
        inputs, outputs = inputs[None], outputs[None]
    entries_per_image = prod(outputs.shape[2:]) * layer.in_channels * prod(layer.kernel_size)
    images_at_once = max(1, _ENTRIES_AT_ONCE // entries_per_image)
    for images, maps in zip(torch.split(inputs, images_at_once), torch.split(outputs, images_at_once), strict=True):
        yield unfold(layer, images.double()), maps.double().permute(0, 2, 3, 1).flatten(0, 2)


def unfold(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """The patches that a convolution multiplies with, columns in the order of `to_gemm`: input channels fastest.

    Args:
        layer: Conv2d with one group; stride, dilation, padding and padding mode are honoured.
        images: (B, I, height, width).

    Returns:
        (B*L, kh*kw*I), same dtype.
    """
    # torch's own amounts, the only place where it resolves padding="same"; left, right, top, bottom
    amounts = layer._reversed_padding_repeated_twice
    padded = F.pad(images, amounts, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    columns = F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    batch, _, positions = columns.shape
    return columns.reshape(batch, layer.in_channels, -1, positions).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
