"""The ten candidates of `two_four` as one Triton kernel: each weight is read once, each byte of the mask written once.

The sums are the CPU's, in the same order, and there is no product that could be fused into them: the masks are equal
bit for bit. A part of a mask is a pair: what it keeps, and which weights, weight (i, j) as bit 4*i + j.
"""

import numpy as np
import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]  # optional: see `cuda_jit`
from torch import Tensor

from tnm_pipeline.training.masks.exact.cuda_jit import compiled
from tnm_pipeline.training.masks.exact.two_four import LARGEST_SAFE

_BLOCKS = 128  # a program solves these side by side, one in each thread: its rows are read 16 bytes (float32) at a time
_WARPS = 4
_LARGEST_SAFE = tl.constexpr(int(np.float32(LARGEST_SAFE).view(np.int32)))


def solve_two_four(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The 2:4-T mask of every 4x4 block.

    Args:
        matrix: (O, K), float32, float16 or bfloat16, any strides, on the current CUDA device; continued with zeros to
            whole blocks.

    Returns:
        (ceil(O/4)*4, ceil(K/4)*4) bool; and whether the mask holds, one bool left on the device: not if a weight is
        not finite, or so large that sums could overflow.
    """
    rows, columns = matrix.shape
    strips, groups = -(-rows // 4), -(-columns // 4)
    mask = torch.empty(strips * 4, groups * 4, dtype=torch.bool, device=matrix.device)
    holds = torch.ones((), dtype=torch.bool, device=matrix.device)
    _solve_blocks[(strips * -(-groups // _BLOCKS),)](
        matrix,
        mask.view(torch.int32),
        holds.view(torch.int8),
        rows,
        columns,
        *matrix.stride(),
        groups,
        blocks=_BLOCKS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return mask, holds


@compiled(unspecialised=("rows", "groups"))
def _solve_blocks(
    weights: tl.tensor,
    words: tl.tensor,
    holds: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    groups: tl.tensor,
    blocks: tl.constexpr,
) -> None:
    """Solve `blocks` neighbours in one strip of four rows; a word of the mask is the row of one block."""
    programs = tl.cdiv(groups, blocks)
    top = (tl.program_id(0) // programs).to(tl.int64) * 4
    first = (tl.program_id(0) % programs) * blocks
    column = first * 4 + tl.arange(0, 4 * blocks)
    block: tl.tuple = ()
    for i in tl.static_range(4):
        at = weights + (top + i) * row_stride + column.to(tl.int64) * column_stride
        row = tl.load(at, mask=column < tl.where(top + i < rows, columns, 0), other=0.0)
        even, odd = tl.split(tl.reshape(tl.abs(row.to(tl.float32)), (2 * blocks, 2)))
        column_0, column_2 = tl.split(tl.reshape(even, (blocks, 2)))
        column_1, column_3 = tl.split(tl.reshape(odd, (blocks, 2)))
        block += (column_0, column_1, column_2, column_3)

    peak = block[0].to(tl.int32, bitcast=True)  # magnitudes order as their bits, with NaN above all
    for k in tl.static_range(1, 16):
        peak = tl.maximum(peak, block[k].to(tl.int32, bitcast=True))
    tl.store(holds + tl.zeros_like(peak), 0, mask=peak > _LARGEST_SAFE)

    kept = _best_mask(block)
    group = first + tl.arange(0, blocks)
    for i in tl.static_range(4):
        nibble = (kept >> (4 * i)) & 0xF
        word = (nibble * 0x204081) & 0x01010101  # bit j becomes byte j
        tl.store(words + (top + i) * groups + group, word, mask=group < groups)


@compiled()
def _best_mask(block: tl.tuple) -> tl.tensor:
    """The best mask of each block, 16 bits, from its 16 weights; the candidates are told in `two_four`."""
    top: tl.tuple = ()
    bottom: tl.tuple = ()
    whole: tl.tuple = ()
    for b in tl.static_range(4):
        for c in tl.static_range(b + 1, 4):
            top += (_better(_keep(block, b, 4 + c), _keep(block, c, 4 + b)),)
            bottom += (_better(_keep(block, 8 + b, 12 + c), _keep(block, 8 + c, 12 + b)),)
            upright = _both(_keep(block, b, 4 + b), _keep(block, 8 + c, 12 + c))
            swapped = _both(_keep(block, c, 4 + c), _keep(block, 8 + b, 12 + b))
            whole += (_better(upright, swapped),)
    best = _both(_both(top[0], bottom[0]), whole[5])
    for p in tl.static_range(1, 6):
        best = _better(best, _both(_both(top[p], bottom[p]), whole[5 - p]))
    for p in tl.static_range(3):
        best = _better(best, _both(whole[p], whole[5 - p]))
    return _better(best, _both(_crossed(top), _crossed(bottom)))[1]


@compiled()
def _crossed(half: tl.tuple) -> tl.tuple:
    """The best of a half whose rows share no column, from its best of each pair of columns."""
    best = _both(half[0], half[5])
    for p in tl.static_range(1, 3):
        best = _better(best, _both(half[p], half[5 - p]))
    return best


@compiled()
def _keep(block: tl.tuple, one: tl.constexpr, other: tl.constexpr) -> tl.tuple:
    """The part that keeps two weights."""
    total = block[one] + block[other]
    return total, tl.full(total.shape, (1 << one) | (1 << other), tl.int32)


@compiled()
def _both(one: tl.tuple, other: tl.tuple) -> tl.tuple:
    """Both parts together."""
    return one[0] + other[0], one[1] | other[1]


@compiled()
def _better(first: tl.tuple, second: tl.tuple) -> tl.tuple:
    """The part that keeps more; the first one when they keep the same."""
    wins = first[0] >= second[0]
    return tl.where(wins, first[0], second[0]), tl.where(wins, first[1], second[1])
