"""Mask, cast and transpose as one Triton kernel: 9 bytes moved for each weight of float32, where operators move 15.

Shape legend: O = out features, I = in features.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]  # optional: `prepare` looks for it first
import triton.language as tl  # pyright: ignore[reportMissingImports]  # as above
from torch import Tensor

from tnm_pipeline.training.masks.exact.cuda_jit import compiled

_TILE = 64  # a side; rows of 64 two-byte values are 128 bytes, in the matrix and in its transpose
_WARPS = 4


def launch(weight: Tensor, mask: Tensor, cast: Tensor, transposed: Tensor | None = None) -> None:
    """Write the masked weight, and its transpose if there is a place for it.

    Args:
        weight: (O, I), float32, float16 or bfloat16, contiguous, not empty, on the current device.
        mask: (O, I) bool, contiguous.
        cast: (O, I), float16 or bfloat16, contiguous; written.
        transposed: (I, O), of the same dtype, contiguous; written, or None.
    """
    rows, columns = weight.shape
    tiles = triton.cdiv(rows, _TILE) * triton.cdiv(columns, _TILE)
    transpose = transposed is not None
    arguments = (weight, mask.view(torch.int8), cast, transposed if transpose else cast, rows, columns)
    _kernel[(tiles,)](*arguments, side=_TILE, transpose=transpose, num_warps=_WARPS)


@compiled()
def _kernel(
    weight: tl.tensor,
    mask: tl.tensor,
    cast: tl.tensor,
    transposed: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    side: tl.constexpr,
    transpose: tl.constexpr,
) -> None:
    """One tile of `side` x `side`."""
    across = tl.cdiv(columns, side)
    row = (tl.program_id(0) // across) * side + tl.arange(0, side)
    column = (tl.program_id(0) % across) * side + tl.arange(0, side)
    # Places in 64 bits: a matrix may have more than 2^31 entries.
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    value = tl.load(weight + place, mask=inside, other=0.0)
    kept = tl.load(mask + place, mask=inside, other=0) != 0
    value = tl.where(kept, value, 0.0).to(cast.dtype.element_ty)
    tl.store(cast + place, value, mask=inside)
    if transpose:
        place = column.to(tl.int64)[:, None] * rows + row[None, :]
        inside = (column < columns)[:, None] & (row < rows)[None, :]
        tl.store(transposed + place, tl.trans(value), mask=inside)
