"""The matrix as kernels see it, and tiles of it that cannot be read in place.

Those are tiles at the edges, and all tiles of matrices whose rows are not consecutive in memory.
"""

from typing import Any, NamedTuple

from tnm_pipeline.training.masks.jit import inlined


class Matrix(NamedTuple):
    """A matrix where it lies: weight (i, j) is `bits[i * row_stride + j * column_stride]`.

    Attributes:
        bits: flat array, int32 for float32, int16 for float16, uint16 for bfloat16.
        rows: of the matrix.
        columns: of the matrix.
        row_stride: elements from a row to the next.
        column_stride: elements from a column to the next.
    """

    bits: Any
    rows: int
    columns: int
    row_stride: int
    column_stride: int


@inlined
def lies_in_place(matrix: Any, top: int, left: int, height: int, width: int) -> Any:
    """Whether a tile is wholly within the matrix and its rows are consecutive."""
    return matrix.column_stride == 1 and left + width <= matrix.columns and top + height <= matrix.rows


@inlined
def read_window(matrix: Any, top: int, left: int, window: Any, height: int, width: int) -> None:
    """Copy a tile into `window` (height*width), with zeros beyond the matrix."""
    window[:] = 0
    for i in range(min(height, matrix.rows - top)):
        start = (top + i) * matrix.row_stride + left * matrix.column_stride
        for j in range(min(width, matrix.columns - left)):
            window[i * width + j] = matrix.bits[start + j * matrix.column_stride]


@inlined
def write_window(matrix: Any, top: int, left: int, window: Any, mask: Any, height: int, width: int) -> None:
    """Copy the part of a tile's mask that lies within the matrix into its mask (rows*columns)."""
    for i in range(min(height, matrix.rows - top)):
        start = (top + i) * matrix.columns + left
        for j in range(min(width, matrix.columns - left)):
            mask[start + j] = window[i * width + j]
