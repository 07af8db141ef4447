"""Any prunable weight as its GEMM matrix, and back.

Shape legend: O = out features or channels, I = in features or channels, H and W = kernel height and width,
K = reduction length of the product (I, or H*W*I), M = group size.
"""

import torch
from torch import Tensor, nn

PRUNABLE = (nn.Linear, nn.Conv2d)


def to_gemm(weight: Tensor) -> Tensor:
    """View or copy a weight as the (O, K) matrix that its product multiplies with.

    A convolution's K runs over kernel positions with **input channels fastest**, so that groups of M
    consecutive columns lie along input channels: the axis that TensorRT reads.

    Args:
        weight: (O, I) or (O, I, H, W), any float or bool dtype.

    Returns:
        (O, K), K = I or H*W*I. Shares memory with `weight` where strides allow.

    Raises:
        ValueError: another number of dimensions.
    """
    if weight.dim() == 2:
        return weight
    if weight.dim() == 4:
        return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    raise ValueError(f"a weight of shape {tuple(weight.shape)} has no GEMM form: only Linear and Conv2d weights do")


def from_gemm(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Undo `to_gemm`.

    Args:
        matrix: (O, K).
        shape: of the weight, (O, I) or (O, I, H, W).

    Returns:
        The weight-shaped tensor, contiguous, same dtype.
    """
    if len(shape) == 2:
        return matrix.reshape(shape).contiguous()
    out_channels, in_channels, height, width = shape
    return matrix.reshape(out_channels, height, width, in_channels).permute(0, 3, 1, 2).contiguous()


def pad_to_multiple(matrix: Tensor, m: int) -> Tensor:
    """Append zero rows and columns until M divides both sides.

    Args:
        matrix: (O, K).
        m: group size.

    Returns:
        (ceil(O/M)*M, ceil(K/M)*M); `matrix` itself when nothing is missing.
    """
    rows, columns = matrix.shape
    missing_rows, missing_columns = -rows % m, -columns % m
    if not missing_rows and not missing_columns:
        return matrix
    return nn.functional.pad(matrix, (0, missing_columns, 0, missing_rows))


def to_blocks(matrix: Tensor, m: int) -> Tensor:
    """Cut a matrix into M x M tiles: M outputs by M inputs, row-major over the tiles.

    Args:
        matrix: (O, K), both multiples of M.
        m: group size.

    Returns:
        (O/M * K/M, M, M).
    """
    rows, columns = matrix.shape
    return matrix.reshape(rows // m, m, columns // m, m).permute(0, 2, 1, 3).reshape(-1, m, m)


def from_blocks(blocks: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `to_blocks`.

    Args:
        blocks: (O/M * K/M, M, M).
        rows: O.
        columns: K.

    Returns:
        (O, K).
    """
    m = blocks.shape[-1]
    return blocks.reshape(rows // m, columns // m, m, m).permute(0, 2, 1, 3).reshape(rows, columns)
