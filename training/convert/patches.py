"""A layer's inputs and outputs as the rows of its GEMM, a bounded number at a time.

Shape legend: B = batch, T = positions of a sequence, I and O = in and out channels, S = samples (rows), K = reduction
length, L = output positions.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ENOUGH_ROWS = 1 << 17  # of a convolution: four digits of every sum, at a fraction of the time
ENTRIES_AT_ONCE = 1 << 22  # of the (S, K) slice: 16 MiB in float32


def gemm_rows(
    layer: nn.Linear | nn.Conv2d,
    inputs: Tensor,
    outputs: Tensor | None = None,
    real: Tensor | None = None,
    every: int = 1,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Cut one call of a layer into slices of X and Y with ``X @ to_gemm(layer.weight).T + layer.bias == Y``.

    Args:
        layer: Linear, or Conv2d with one group.
        inputs: what the layer received: (..., K) or (B, I, height, width) or (I, height, width).
        outputs: of the shape that it returns, (..., O) or (B, O, height, width) or (O, height, width); `None` = no Y.
        real: (B, T) bool, positions that are no padding; they count if the layer's input begins with these axes.
        every: of a convolution's output positions, row by row, take only every so-manieth of each image.

    Yields:
        (S, K) and (S, O) or `None`; float64 stays, other dtypes become float32.
    """
    inputs, outputs = _full(inputs), None if outputs is None else _full(outputs)
    if isinstance(layer, nn.Linear):
        yield from _linear_rows(layer, inputs, outputs, real)
        return
    if inputs.dim() == 3:
        inputs, outputs = inputs[None], None if outputs is None else outputs[None]
    positions = _positions(layer, inputs, every)
    images_at_once = max(1, ENTRIES_AT_ONCE // (positions * layer.in_channels * prod(layer.kernel_size)))
    for start in range(0, len(inputs), images_at_once):
        part = slice(start, start + images_at_once)
        maps = None if outputs is None else outputs[part].flatten(2)[:, :, ::every].transpose(1, 2).flatten(0, 1)
        yield unfold(layer, inputs[part], every), maps


def count_rows(layer: nn.Linear | nn.Conv2d, inputs: Tensor, real: Tensor | None = None, every: int = 1) -> int:
    """How many rows `gemm_rows` would give."""
    if isinstance(layer, nn.Conv2d):
        images = inputs if inputs.dim() == 4 else inputs[None]
        return len(images) * _positions(layer, images, every)
    if real is not None and inputs.shape[:-1] == real.shape:
        return int(real.sum())
    return inputs.numel() // layer.in_features


def stride(rows: int) -> int:
    """How far apart the positions are that are looked at, given all rows; odd, not to follow the columns of images."""
    return max(1, rows // _ENOUGH_ROWS) // 2 * 2 + 1


def _linear_rows(
    layer: nn.Linear, inputs: Tensor, outputs: Tensor | None, real: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    x = inputs.reshape(-1, layer.in_features)
    y = None if outputs is None else outputs.reshape(-1, layer.out_features)
    kept = real.flatten().nonzero()[:, 0] if real is not None and inputs.shape[:-1] == real.shape else None
    rows_at_once = max(1, ENTRIES_AT_ONCE // layer.in_features)
    for start in range(0, len(x) if kept is None else len(kept), rows_at_once):
        # indices copy rows, no more than are at work; slices do not
        part = slice(start, start + rows_at_once) if kept is None else kept[start : start + rows_at_once]
        yield x[part], None if y is None else y[part]


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _positions(layer: nn.Conv2d, images: Tensor, every: int) -> int:
    return -(-prod(output_size(layer, images)) // every)


def output_size(layer: nn.Conv2d, images: Tensor) -> tuple[int, int]:
    """Height and width of what a convolution returns for (B, I, height, width)."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    given = (images.shape[2] + top + bottom, images.shape[3] + left + right)
    height, width = (
        (side - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel, stride, dilation in zip(given, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    )
    return height, width


def unfold(layer: nn.Conv2d, images: Tensor, every: int = 1) -> Tensor:
    """The patches that a convolution multiplies with, columns in the order of `to_gemm`: input channels fastest.

    Args:
        layer: Conv2d with one group; stride, dilation, padding and padding mode are honoured.
        images: (B, I, height, width).
        every: take only every so-manieth of the L output positions.

    Returns:
        (B * ceil(L / every), kh*kw*I), same dtype.
    """
    # torch's own amounts, the only place where it resolves padding="same"; left, right, top, bottom
    amounts = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(images, amounts, mode=mode) if any(amounts) else images
    if prod(layer.kernel_size) == 1:
        strided = padded[:, :, :: layer.stride[0], :: layer.stride[1]]
        return strided.flatten(2)[:, :, ::every].transpose(1, 2).flatten(0, 1)
    columns = F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)[:, :, ::every]
    batch, _, positions = columns.shape
    return columns.reshape(batch, layer.in_channels, -1, positions).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
