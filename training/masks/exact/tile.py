"""What is done to a tile, 32 blocks of one block row at once: one block in each vector lane.

Words and layouts, L = 32 lanes, M = group size:

- bits: the weights as integers of their width: int32 (float32), int16 (float16), uint16 (bfloat16).
- tile: int16, element (i, j) of the 32 blocks at (i*M + j)*L. A weight is floor(abs(w) * s) - 2^14, where s is
  the power of two that brings its block's largest into [2^14, 2^15). Scaling is exact, so comparing a floored weight
  with an integer gives the same answer as comparing the weight itself: that is why int16 can *prove* a mask optimal.
- prices: int16, the dual variable of row i (or column j) of the 32 blocks at i*L.
- kept: int32, row i of the 32 masks at i*L, column j as bit j.
"""

from typing import Any

from llvmlite import ir
from numba import types

from tnm_pipeline.training.masks.exact.network import selection_network
from tnm_pipeline.training.masks.exact.simd import (
    FLOAT32,
    FLOAT64,
    INT8,
    INT16,
    INT32,
    INT64,
    Buffer,
    Value,
    deinterleave,
    maximum,
    minimum,
    vector_op,
)

LANES = 32
PRICE_SHIFT = 34  # from the tile's scale, the largest in [2^14, 2^15), to the paths', in [2^48, 2^49)


def magnitude(bits: Buffer, at: Value | int, lanes: int) -> Value:
    """Absolute values of the weights from position `at`, as float32."""
    return as_float32(bits.load(at, lanes), bits.dtype)


def as_float32(bits: Value, dtype: Any) -> Value:
    """Absolute values of weights given as bits of a buffer's dtype."""
    if dtype == types.int32:
        return (bits & 0x7FFFFFFF).bits_as(FLOAT32)
    magnitudes = (bits & 0x7FFF).unsigned_to(INT32)
    if dtype == types.uint16:
        return (magnitudes << 16).bits_as(FLOAT32)
    # float16, by integers as not every processor converts it: 112 more in the exponent, twice that for Inf and NaN.
    bias = magnitudes.like(112 << 23)
    extra = magnitudes.compare(">=", 0x7C00).where(bias, bias.like(0))
    normal = ((magnitudes << 13) + bias + extra).bits_as(FLOAT32)
    return magnitudes.compare("<", 0x400).where(magnitudes.to(FLOAT32) * 2.0**-24, normal)


def store_bytes(mask: Buffer, at: Value, kept: Value, m: int) -> None:
    """Spread M bits in each lane over L*M bytes of 0 and 1, in the order of the matrix."""
    bits = kept.to(ir.IntType(m)) if m < kept.element.width else kept
    word = 64 if LANES * m % 64 == 0 else 32  # one mask register at a time: LLVM splits longer ones badly
    words = bits.bits_as(ir.IntType(word), LANES * m // word)
    for index in range(words.lanes):
        mask.store(at + index * word, words.lane(index).bits_as(ir.IntType(1), word).unsigned_to(INT8))


@vector_op
def prefetch_row(bits: Buffer, at: Value, m: int) -> None:
    """Ask for L*M weights that will be wanted soon."""
    bits.prefetch(at, m * LANES)


@vector_op
def read_block_row(bits: Buffer, at: Value, scales: Buffer, column: Value, block: Buffer, row: Value, m: int) -> None:
    """Write a row of `block`, (M*M) int64: floor(abs(w) * s * 2^34), where s is the block's scale, at `column`."""
    weights = magnitude(bits, at, m).to(FLOAT64)
    scale = scales.load(column, m).bits_as(FLOAT32).to(FLOAT64)
    block.store(row * m, (weights * scale * 2.0**PRICE_SHIFT).to(INT64))


@vector_op
def raise_peaks(bits: Buffer, at: Value, peaks: Buffer, m: int) -> None:
    """Take one row into the running maxima of the tile's L*M columns (magnitudes order as their int32 bits)."""
    for first in range(0, m * LANES, LANES):
        row = magnitude(bits, at + first, LANES).bits_as(INT32)
        peaks.store(first, maximum(row, peaks.load(first, LANES)))


@vector_op
def find_scales(peaks: Buffer, scales: Buffer, largest: Buffer, m: int) -> None:
    """From the columns' maxima, each column's scale as float32 bits; also raises `largest`, L running maxima.

    A block of denormals would need a scale beyond float32: it gets the largest there is, and ends up unproven.
    """
    columns = deinterleave([peaks.load(first, LANES) for first in range(0, m * LANES, LANES)])
    peak = columns[0]
    for column in columns[1:]:
        peak = maximum(peak, column)
    largest.store(0, maximum(peak, largest.load(0, LANES)))
    exponent = minimum(peak.like(127 + 127 + 14) - (peak >> 23), peak.like(254))
    scale = exponent << 23
    for first in range(0, m * LANES, LANES):
        scales.store(first, scale.shuffle(scale, [(first + lane) // m for lane in range(LANES)]))


@vector_op
def quantise(bits: Buffer, at: Value, scales: Buffer, tile: Buffer, row: Value, m: int) -> None:
    """Write row `row` of the tile."""
    vectors = []
    for first in range(0, m * LANES, LANES):
        scaled = magnitude(bits, at + first, LANES) * scales.load(first, LANES).bits_as(FLOAT32)
        vectors.append(scaled.to(INT32).to(INT16) - (1 << 14))
    for column, vector in enumerate(deinterleave(vectors)):
        tile.store((row * m + column) * LANES, vector)


@vector_op
def reprice(
    tile: Buffer, first: Value, step: int, others: Buffer, own: Buffer, line: Value, n: int, m: int, gain: int
) -> None:
    """Move the price of one line (a row or a column) to where N of its weights are worth keeping.

    Between the N-th and the (N+1)-th largest of weight minus the other price, every price is best for the dual; the
    midpoint is taken, rounded up, and then overshot by gain/8 of the way.

    Args:
        tile: the weights.
        first: position of the line's first weight.
        step: from one of its weights to the next.
        others: prices of the lines that cross this one.
        own: prices of this line and its parallels.
        line: its number among them.
        n: weights kept.
        m: group size.
        gain: eighths of over-relaxation.
    """
    wires = [tile.load(first + k * step, LANES).intrinsic("ssub.sat", others.load(k * LANES, LANES)) for k in range(m)]
    for high, low, keeps_high, keeps_low in selection_network(m, frozenset((n - 1, n))):
        left, right = wires[high], wires[low]
        if keeps_high:
            wires[high] = maximum(left, right)
        if keeps_low:
            wires[low] = minimum(left, right)
    inside, outside = wires[n - 1], wires[n]
    price = (inside | outside) - ((inside ^ outside) >> 1)  # their mean, rounded up, without overflow
    if gain:
        move = price.intrinsic("ssub.sat", own.load(line * LANES, LANES)) >> 3
        price = price.intrinsic("sadd.sat", move * gain)
    own.store(line * LANES, price)


@vector_op
def keep_row(
    tile: Buffer, row: Value, columns: Buffer, rows: Buffer, kept: Buffer, proven: Buffer, n: int, m: int
) -> None:
    """Keep the weights of a row that reach the sum of both prices; clear `proven` where they are not N."""
    price = rows.load(row * LANES, LANES)
    chosen = price.like(0).unsigned_to(INT32) if m > 16 else price.like(0)
    for column in range(m):
        bar = price.intrinsic("sadd.sat", columns.load(column * LANES, LANES))
        reaches = tile.load((row * m + column) * LANES, LANES).compare(">=", bar)
        chosen = chosen | reaches.where(chosen.like(1 << column), chosen.like(0))
    full = chosen.intrinsic("ctpop").compare("==", n)
    proven.store(0, full.where(proven.load(0, LANES), price.like(0)))
    kept.store(row * LANES, chosen if m > 16 else chosen.unsigned_to(INT32))


@vector_op
def write_row(kept: Buffer, row: Value, mask: Buffer, at: Value, m: int) -> None:
    """Spread the kept bits of a row over L*M bytes of 0 and 1 in the order of the matrix."""
    store_bytes(mask, at, kept.load(row * LANES, LANES), m)
