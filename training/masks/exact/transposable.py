"""The exact transposable mask of any N:M: dual sweeps, a proof, and augmenting paths for what is not proven.

Prices u of rows and v of columns bound the best mask from above; a mask that keeps exactly the weights with
w >= u + v, and of these exactly N in every row and column, meets the bound: it is optimal. The sweeps set each price
to its best value given the crossing ones, rows and columns in turn, overshooting a little because that converges
faster. Six sweeps prove 98% of Gaussian 4:8 blocks, ten 61% at 16:32; `paths` finishes the others.
"""

from functools import cache
from typing import Any

import numpy as np

from tnm_pipeline.training.masks.exact.paths import finish_block
from tnm_pipeline.training.masks.exact.tile import (
    LANES,
    PRICE_SHIFT,
    find_scales,
    keep_row,
    prefetch_row,
    quantise,
    raise_peaks,
    read_block_row,
    reprice,
    write_row,
)
from tnm_pipeline.training.masks.exact.window import lies_in_place, read_window, write_window
from tnm_pipeline.training.masks.jit import FINGERPRINT, compiled

_HIGHEST_PRICE = 1 << 14  # a weight of the tile lies in [-2^14, 2^14)

# By the smallest M they serve: sweeps, and eighths of over-relaxation. Fewer sweeps prove fewer blocks, more cost more
# than the paths they save (docs/log.md).
_SCHEDULE = {2: (6, 2), 12: (9, 3), 24: (10, 3)}


def schedule(m: int) -> tuple[int, int]:
    """Number of sweeps, and over-relaxation in eighths, for group size M."""
    return _SCHEDULE[max(size for size in _SCHEDULE if size <= m)]


@cache
def transposable_kernel(n: int, m: int) -> Any:
    """The kernel of one pattern; it takes a `Matrix` and its mask, flat bytes."""
    width = LANES * m
    sweeps, gain = schedule(m)

    def solve_strips(matrix: Any, mask: Any, first_strip: int, last_strip: int, sources: str = FINGERPRINT) -> Any:
        """Solve block rows `first_strip` to `last_strip`; returns the largest magnitude seen, as float32 bits."""
        window = np.empty(m * width, matrix.bits.dtype)
        peaks = np.empty(width, np.int32)
        scales = np.empty(width, np.int32)
        largest = np.zeros(LANES, np.int32)
        tile = np.empty(m * width, np.int16)
        row_prices = np.empty(width, np.int16)
        column_prices = np.empty(width, np.int16)
        kept = np.empty(width, np.int32)
        proven = np.empty(LANES, np.int16)
        window_mask = np.empty(m * width, np.uint8)
        block = np.empty(m * m, np.int64)
        block_prices = np.empty(m, np.int64)
        block_kept = np.empty(m, np.int64)
        scratch = np.empty((3, m), np.int64)

        for strip in range(first_strip, last_strip):
            top = strip * m
            for left in range(0, matrix.columns, width):
                whole = lies_in_place(matrix, top, left, m, width)
                if whole:
                    source, at, pitch = matrix.bits, top * matrix.row_stride + left, matrix.row_stride
                else:
                    read_window(matrix, top, left, window, m, width)
                    source, at, pitch = window, 0, width
                following = at + width  # the next tile: asked for while this one computes
                if left + width >= matrix.columns:
                    following += m * matrix.row_stride - matrix.columns

                peaks[:] = 0
                for i in range(m):
                    raise_peaks(source, at + i * pitch, peaks, m)
                find_scales(peaks, scales, largest, m)
                for i in range(m):
                    quantise(source, at + i * pitch, scales, tile, i, m)
                    prefetch_row(source, following + i * pitch, m)

                column_prices[:] = 0
                for i in range(m):
                    reprice(tile, i * width, LANES, column_prices, row_prices, i, n, m, 0)
                for _ in range(sweeps - 1):
                    for j in range(m):
                        reprice(tile, j * LANES, width, row_prices, column_prices, j, n, m, gain)
                    for i in range(m):
                        reprice(tile, i * width, LANES, column_prices, row_prices, i, n, m, gain)
                # The last one without overshoot and, with prices this close to weights, without saturation: every
                # column now has N or, where weights tie, more. So if every row has N, every column has.
                for k in range(width):
                    row_prices[k] = min(max(row_prices[k], -_HIGHEST_PRICE + 1), _HIGHEST_PRICE)
                for j in range(m):
                    reprice(tile, j * LANES, width, row_prices, column_prices, j, n, m, 0)
                proven[:] = 1
                for i in range(m):
                    keep_row(tile, i, column_prices, row_prices, kept, proven, n, m)

                for lane in range(LANES):
                    if proven[lane]:
                        continue
                    column = lane * m
                    for i in range(m):
                        read_block_row(source, at + i * pitch + column, scales, column, block, i, m)
                        block_kept[i] = kept[i * LANES + lane] & 0xFFFFFFFF
                        block_prices[i] = np.int64(column_prices[i * LANES + lane]) << PRICE_SHIFT
                    finish_block(block, block_prices, block_kept, scratch[0], scratch[1], scratch[2], n, m)
                    for i in range(m):
                        kept[i * LANES + lane] = np.int32(block_kept[i])

                if whole:
                    for i in range(m):
                        write_row(kept, i, mask, (top + i) * matrix.columns + left, m)
                else:
                    for i in range(m):
                        write_row(kept, i, window_mask, i * width, m)
                    write_window(matrix, top, left, window_mask, mask, m, width)
        return largest.max()

    return compiled(solve_strips)
