"""The exact transposable 2:4 mask of every 4x4 block: the best of ten candidates, without a loop or a branch.

See the four rows as two halves (rows 0, 1 and rows 2, 3). Each of the 90 masks with two kept per row and column falls
into one of ten classes, told by where each column's two kept weights lie:

- two columns are split between the halves, one of the others lies wholly in the top half, the last one wholly in the
  bottom half (6 classes: the pair that is split);
- two columns lie wholly in the top half, two wholly in the bottom half (3 classes: how the columns pair up);
- every column is split (1 class: each half picks its own pair of columns for its first row).

Within a class the rows and the halves decide independently, so its best mask is a sum of small maxima. Sums are
float32: the mask is optimal up to their rounding, 2^-22 of the block's kept sum. Equal sums go to the candidate named
first, so thread counts do not change the result.
"""

from collections.abc import Sequence
from functools import cache, reduce
from typing import Any, NamedTuple

import numpy as np

from tnm_pipeline.training.masks.exact.simd import INT8, INT16, INT32, Buffer, Value, deinterleave, maximum, vector_op
from tnm_pipeline.training.masks.exact.tile import magnitude
from tnm_pipeline.training.masks.exact.window import lies_in_place, read_window, write_window
from tnm_pipeline.training.masks.jit import FINGERPRINT, compiled

LANES = 16  # blocks at once
WIDTH = 4 * LANES
_AHEAD = 8 * WIDTH  # weights from asking for them to reading them
LARGEST_SAFE = 2.0**124  # sums of eight weights up to here do not overflow

_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_COMPLEMENT = 5  # the pair of the other two columns of pair p is 5 - p


class _Choice(NamedTuple):
    """Part of a mask: what it keeps, and which weights, weight (i, j) as bit 4*i + j."""

    total: Value
    kept: Value


def _both(*parts: _Choice) -> _Choice:
    """All of these parts together."""
    total, kept = parts[0]
    for part in parts[1:]:
        total, kept = total + part.total, kept | part.kept
    return _Choice(total, kept)


def _better(left: _Choice, right: _Choice) -> _Choice:
    """The part that keeps more, lane by lane; the first one when they keep the same."""
    wins = left.total.compare(">=", right.total)
    return _Choice(wins.where(left.total, right.total), wins.where(left.kept, right.kept))


def _best_mask(block: Sequence[Sequence[Value]]) -> Value:
    """The best mask of each block, 16 bits in int16 lanes, from its 4x4 weights."""

    def keep(*weights: tuple[int, int]) -> _Choice:
        total = reduce(Value.__add__, (block[i][j] for i, j in weights))
        return _Choice(total, total.bits_as(INT32).like(sum(1 << (4 * i + j) for i, j in weights)).to(INT16))

    # Per half: its two rows keep one column of the pair each.
    split = [[_better(keep((top, b), (top + 1, c)), keep((top, c), (top + 1, b))) for b, c in _PAIRS] for top in (0, 2)]
    # One column of the pair wholly in the top half, the other wholly in the bottom half.
    column = [[keep((top, j), (top + 1, j)) for j in range(4)] for top in (0, 2)]
    whole = [_better(_both(column[0][b], column[1][c]), _both(column[0][c], column[1][b])) for b, c in _PAIRS]
    mixed = [_both(split[0][p], split[1][p], whole[_COMPLEMENT - p]) for p in range(6)]
    columns = [_both(whole[p], whole[_COMPLEMENT - p]) for p in range(3)]
    crossed = [reduce(_better, [_both(half[p], half[_COMPLEMENT - p]) for p in range(3)]) for half in split]
    return reduce(_better, [*mixed, *columns, _both(*crossed)]).kept


@vector_op
def solve_blocks(
    bits: Buffer, at: Value, pitch: Value, ahead: Value, mask: Buffer, out: Value, mask_pitch: Value, largest: Buffer
) -> None:
    """Solve 16 blocks side by side: four rows of 64 weights, `pitch` apart, into four rows of mask bytes.

    Those from position `ahead` are asked for meanwhile: much faster on matrices beyond the cache.
    """
    for i in range(4):
        bits.prefetch(ahead + pitch * i, WIDTH)
    rows = [[magnitude(bits, at + pitch * i + first, LANES) for first in range(0, WIDTH, LANES)] for i in range(4)]
    peak = reduce(maximum, [vector.bits_as(INT32) for row in rows for vector in row])
    largest.store(0, maximum(peak, largest.load(0, LANES)))
    kept = _best_mask([deinterleave(row) for row in rows]).unsigned_to(INT32)
    for i in range(4):
        nibble = (kept >> (4 * i)) & 0xF
        word = (nibble * 0x204081) & 0x01010101  # bit j becomes byte j
        mask.store(out + mask_pitch * i, word.bits_as(INT8, WIDTH))


@cache
def two_four_kernel() -> Any:
    """The kernel of 2:4-T; it takes a `Matrix` and its mask, flat bytes."""

    def solve_strips(matrix: Any, mask: Any, first_strip: int, last_strip: int, sources: str = FINGERPRINT) -> Any:
        """Solve block rows `first_strip` to `last_strip`; returns the largest magnitude seen, as float32 bits."""
        window = np.empty(4 * WIDTH, matrix.bits.dtype)
        window_mask = np.empty(4 * WIDTH, np.uint8)
        largest = np.zeros(LANES, np.int32)
        for strip in range(first_strip, last_strip):
            top = strip * 4
            for left in range(0, matrix.columns, WIDTH):
                if lies_in_place(matrix, top, left, 4, WIDTH):
                    at = top * matrix.row_stride + left
                    ahead = at + _AHEAD
                    if left + _AHEAD >= matrix.columns:  # in the next strip
                        ahead += 4 * matrix.row_stride - matrix.columns
                    out = top * matrix.columns + left
                    solve_blocks(matrix.bits, at, matrix.row_stride, ahead, mask, out, matrix.columns, largest)
                else:
                    read_window(matrix, top, left, window, 4, WIDTH)
                    solve_blocks(window, 0, WIDTH, 0, window_mask, 0, WIDTH, largest)
                    write_window(matrix, top, left, window_mask, mask, 4, WIDTH)
        return largest.max()

    return compiled(solve_strips)
