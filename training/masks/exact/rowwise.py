"""Plain N:M: the N largest of every M consecutive weights along the reduction axis.

Exact because groups are independent. Weights are compared by their bits, which order like magnitudes, so nothing is
converted; equal weights are kept from the left.
"""

from functools import cache, reduce
from typing import Any

import numpy as np

from tnm_pipeline.training.masks.exact.network import selection_network
from tnm_pipeline.training.masks.exact.simd import INT32, Buffer, Value, deinterleave, maximum, minimum, vector_op
from tnm_pipeline.training.masks.exact.tile import LANES, as_float32, store_bytes
from tnm_pipeline.training.masks.exact.window import lies_in_place, read_window, write_window
from tnm_pipeline.training.masks.jit import FINGERPRINT, compiled


@vector_op
def solve_groups(bits: Buffer, at: Value, mask: Buffer, out: Value, largest: Buffer, n: int, m: int) -> None:
    """Solve 32 groups side by side, into L*M mask bytes."""
    loaded = [bits.load(at + first, LANES) for first in range(0, m * LANES, LANES)]
    sign = 1 << (loaded[0].element.width - 1)
    keys = deinterleave([key & (sign - 1) for key in loaded])
    peak = as_float32(reduce(maximum, keys), bits.dtype).bits_as(INT32)
    largest.store(0, maximum(peak, largest.load(0, LANES)))

    wires = list(keys)
    for high, low, keeps_high, keeps_low in selection_network(m, frozenset((n - 1,))):
        left, right = wires[high], wires[low]
        if keeps_high:
            wires[high] = maximum(left, right)
        if keeps_low:
            wires[low] = minimum(left, right)
    last = wires[n - 1]
    zero = last.like(0)
    one = last.like(1)
    room = last.like(n)  # for weights equal to the last one kept
    for key in keys:
        room = room - key.compare(">", last).where(one, zero)
    kept = peak.like(0)
    for column, key in enumerate(keys):
        tied = (key.compare("==", last) & room.compare(">", 0)).where(one, zero)
        room = room - tied
        chosen = key.compare(">", last) | tied.compare("==", 1)
        kept = kept | chosen.where(kept.like(1 << column), kept.like(0))
    store_bytes(mask, out, kept, m)


@cache
def rowwise_kernel(n: int, m: int) -> Any:
    """The kernel of one pattern; it takes a `Matrix` and its mask, flat bytes. A strip is one row."""
    width = LANES * m

    def solve_strips(matrix: Any, mask: Any, first_strip: int, last_strip: int, sources: str = FINGERPRINT) -> Any:
        """Solve rows `first_strip` to `last_strip`; returns the largest magnitude seen, as float32 bits."""
        window = np.empty(width, matrix.bits.dtype)
        window_mask = np.empty(width, np.uint8)
        largest = np.zeros(LANES, np.int32)
        for row in range(first_strip, last_strip):
            for left in range(0, matrix.columns, width):
                if lies_in_place(matrix, row, left, 1, width):
                    at = row * matrix.row_stride + left
                    solve_groups(matrix.bits, at, mask, row * matrix.columns + left, largest, n, m)
                else:
                    read_window(matrix, row, left, window, 1, width)
                    solve_groups(window, 0, window_mask, 0, largest, n, m)
                    write_window(matrix, row, left, window_mask, mask, 1, width)
        return largest.max()

    return compiled(solve_strips)
