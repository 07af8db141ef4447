"""Tensors in, masks out: picks the kernel, gives it the weight's memory as it is, and shares out the block rows.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnm_pipeline.training.masks.exact.rowwise import rowwise_kernel
from tnm_pipeline.training.masks.exact.transposable import transposable_kernel
from tnm_pipeline.training.masks.exact.two_four import LARGEST_SAFE, two_four_kernel
from tnm_pipeline.training.masks.exact.window import Matrix
from tnm_pipeline.training.masks.jit import call
from tnm_pipeline.training.masks.sharing import share_out
from tnm_pipeline.training.pattern import Pattern

# The numpy type that tells the kernels how to read a weight's bits.
_BITS = {torch.float32: np.int32, torch.float16: np.int16, torch.bfloat16: np.uint16}


def solve_on_cpu(matrix: Tensor, pattern: Pattern) -> tuple[Tensor, bool]:
    """The exact mask of a GEMM matrix, by abs(matrix).

    Args:
        matrix: (O, K), float32, float16 or bfloat16, on the CPU, any strides; read in place.
        pattern: the rule, any N:M.

    Returns:
        (O, K) bool, contiguous, the same for any number of threads; and whether every entry was finite, without which
        the mask means nothing.
    """
    if pattern.transposable and (pattern.n, pattern.m) == (2, 4):
        mask, largest = _run(two_four_kernel(), matrix, pattern)
        if largest <= LARGEST_SAFE or not np.isfinite(largest):
            return mask, bool(np.isfinite(largest))
    kernel = (transposable_kernel if pattern.transposable else rowwise_kernel)(pattern.n, pattern.m)
    mask, largest = _run(kernel, matrix, pattern)
    return mask, bool(np.isfinite(largest))


def _run(kernel: Callable[..., Any], matrix: Tensor, pattern: Pattern) -> tuple[Tensor, np.float32]:
    """The mask, and the largest magnitude: Inf or NaN if the matrix holds one."""
    rows, columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    extent = (rows - 1) * row_stride + (columns - 1) * column_stride + 1
    kind = _BITS[matrix.dtype]
    integers = torch.int32 if kind is np.int32 else torch.int16
    bits = matrix.as_strided((extent,), (1,)).view(integers).numpy().view(kind)
    mask = np.empty((rows, columns), np.bool_)  # numpy asks for huge pages, which halves the time of a large mask
    flat = mask.view(np.uint8).reshape(-1)
    strips = -(-rows // pattern.m) if pattern.transposable else rows

    source = Matrix(bits, rows, columns, row_stride, column_stride)

    def solve_strips(first: int, last: int) -> int:
        return int(call(kernel, str(pattern), source, flat, first, last))

    largest = max(share_out(solve_strips, strips, matrix.numel()))
    return torch.from_numpy(mask), np.int32(largest).view(np.float32)
