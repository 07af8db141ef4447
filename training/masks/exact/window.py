"""Tiles that cannot be read in place: at the edges, and of matrices whose rows are not consecutive in memory."""

from typing import Any

from tnm_pipeline.training.masks.jit import inlined


@inlined
def read_window(
    bits: Any,
    offset: int,
    row_stride: int,
    column_stride: int,
    rows: int,
    columns: int,
    top: int,
    left: int,
    window: Any,
    height: int,
    width: int,
) -> None:
    """Copy a tile into `window` (height*width), with zeros beyond the matrix."""
    window[:] = 0
    for i in range(min(height, rows - top)):
        start = offset + (top + i) * row_stride + left * column_stride
        for j in range(min(width, columns - left)):
            window[i * width + j] = bits[start + j * column_stride]


@inlined
def write_window(window: Any, mask: Any, rows: int, columns: int, top: int, left: int, height: int, width: int) -> None:
    """Copy the part of a tile's mask that lies within the matrix."""
    for i in range(min(height, rows - top)):
        start = (top + i) * columns + left
        for j in range(min(width, columns - left)):
            mask[start + j] = window[i * width + j]
