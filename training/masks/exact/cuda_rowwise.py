"""Plain N:M as a Triton kernel: a weight is kept if fewer than N of its group go before it.

Before it go the larger ones and, from the left, the equal ones. Each thread counts them for one weight, so reads and
writes are as consecutive as the matrix.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]  # optional: see `cuda_jit`
import triton.language as tl  # pyright: ignore[reportMissingImports]  # as above
from torch import Tensor

from tnm_pipeline.training.masks.exact.cuda_jit import compiled

_LANES = 512  # weights at once, in whole groups
_WARPS = 4
_INF = tl.constexpr(0x7F800000)


def solve_rows(matrix: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Keep the N largest of every group of a row, equal ones from the left.

    Args:
        matrix: (O, K), float32, float16 or bfloat16, any strides, on the current CUDA device.
        n: weights kept.
        m: group size.

    Returns:
        (O, K) bool, contiguous; and whether every weight is finite, one bool left on the device.
    """
    rows, columns = matrix.shape
    mask = torch.empty(rows, columns, dtype=torch.bool, device=matrix.device)
    finite = torch.ones((), dtype=torch.bool, device=matrix.device)
    width = triton.next_power_of_2(m)
    groups = _LANES // width
    programs = rows * -(-columns // (groups * m))
    _solve_groups[(programs,)](
        matrix,
        mask.view(torch.int8),
        finite.view(torch.int8),
        columns,
        *matrix.stride(),
        n=n,
        m=m,
        width=width,
        groups=groups,
        num_warps=_WARPS,
    )
    return mask, finite


@compiled(unspecialised=("row_stride",))
def _solve_groups(
    weights: tl.tensor,
    mask: tl.tensor,
    finite: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    n: tl.constexpr,
    m: tl.constexpr,
    width: tl.constexpr,
    groups: tl.constexpr,
) -> None:
    """Solve `groups` neighbours in one row; tensors are (groups, width), of which M lanes count."""
    programs = tl.cdiv(columns, groups * m)
    row = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs) * groups
    lane = tl.arange(0, width)[None, :]
    column = (first + tl.arange(0, groups)[:, None]) * m + lane
    inside = (lane < m) & (column < columns)
    weight = tl.load(weights + row * row_stride + column.to(tl.int64) * column_stride, mask=inside, other=0.0)
    key = tl.abs(weight.to(tl.float32)).to(tl.int32, bitcast=True)  # magnitudes order as their bits
    tl.store(finite + tl.zeros_like(key), 0, mask=key >= _INF)
    before = tl.zeros_like(key)
    for k in tl.static_range(m):
        other = tl.gather(key, tl.full(key.shape, k, tl.int32), 1)
        before += ((other > key) | ((other == key) & (k < lane))).to(tl.int32)
    tl.store(mask + row * columns + column, (before < n).to(tl.int8), mask=inside)
