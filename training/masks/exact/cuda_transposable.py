"""The dual sweeps of `transposable` as a Triton kernel: a thread holds one row and one column of a block in registers.

A lane has 32 bits here, so a weight is floor(abs(w) * s) with the power of two s that brings its block's largest into
[2^27, 2^28), and a block is swept until its mask is proven. How it came about does not matter: where exactly N weights
in every row and column reach the sum u + v of their prices, any other choice of N in every row and column keeps less.
The mask is the only best one, so it is the one that the CPU finds, in whatever way. Where weights tie it can be that
no prices tell the kept from the others; such blocks stay unproven.
"""

import torch
import triton  # pyright: ignore[reportMissingImports]  # optional: see `cuda_jit`
import triton.language as tl  # pyright: ignore[reportMissingImports]  # as above
from torch import Tensor

from tnm_pipeline.training.masks.exact.cuda_jit import compiled
from tnm_pipeline.training.masks.exact.network import selection_network
from tnm_pipeline.training.masks.exact.transposable import schedule

_LINES = 32  # of neighbouring blocks, one line in each thread of a warp: prices then travel by shuffles alone
_SWEEPS = 64  # a model of them took 15 to prove the last of 20,000 Gaussian 4:8 blocks, 45 that of 1,500 at 16:32
_WEIGHT_BITS = tl.constexpr(28)
# Prices of weights below 2^28 stay near that. The bound is for the proof's sake: within it no sum leaves int32.
_HIGHEST_PRICE = tl.constexpr(1 << 29)
# Exponent fields of float32. Below the smallest, denormals would count, which a GPU may flush to zero.
_SMALLEST_EXPONENT = tl.constexpr(64)
_EXPONENT_OF_INF = tl.constexpr(255)


def prove_blocks(matrix: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The transposable N:M mask of every block, as far as the sweeps prove it.

    Args:
        matrix: (O, K), float32, float16 or bfloat16, any strides, on the current CUDA device; continued with zeros to
            whole blocks.
        n: weights kept.
        m: group size.

    Returns:
        (ceil(O/M)*M, ceil(K/M)*M) bool; and (ceil(O/M), ceil(K/M)) bool, whether a block's mask is proven. A block
        that is not finite never is.
    """
    rows, columns = matrix.shape
    strips, groups = -(-rows // m), -(-columns // m)
    mask = torch.empty(strips * m, groups * m, dtype=torch.bool, device=matrix.device)
    proven = torch.empty(strips, groups, dtype=torch.bool, device=matrix.device)
    lines = triton.next_power_of_2(m)
    blocks = _LINES // lines
    _sweep_blocks[(strips * -(-groups // blocks),)](
        matrix,
        mask.view(torch.int8),
        proven.view(torch.int8),
        rows,
        columns,
        *matrix.stride(),
        groups,
        n=n,
        m=m,
        lines=lines,
        blocks=blocks,
        network=tuple((step.high, step.low) for step in selection_network(m, frozenset((n - 1, n)))),
        gain=schedule(m)[1],
        sweeps=_SWEEPS,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return mask, proven


@compiled(unspecialised=("rows", "columns", "row_stride", "column_stride", "groups"))
def _sweep_blocks(
    weights: tl.tensor,
    mask: tl.tensor,
    proven_blocks: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    groups: tl.tensor,
    n: tl.constexpr,
    m: tl.constexpr,
    lines: tl.constexpr,
    blocks: tl.constexpr,
    network: tl.constexpr,
    gain: tl.constexpr,
    sweeps: tl.constexpr,
) -> None:
    """Solve `blocks` neighbours in one strip of M rows.

    Tensors are (blocks, lines): thread (b, i) owns row i and column i of block b; lines from M on idle. `by_row[k]`
    is its row's k-th weight, `by_column[k]` its column's.
    """
    programs = tl.cdiv(groups, blocks)
    strip = (tl.program_id(0) // programs).to(tl.int64)
    block = (tl.program_id(0) % programs) * blocks + tl.arange(0, blocks)[:, None]
    line = tl.arange(0, lines)[None, :]
    top = strip * m
    left = block.to(tl.int64) * m

    by_row: tl.tuple = ()
    by_column: tl.tuple = ()
    peak = tl.zeros((blocks, lines), tl.int32)
    for k in tl.static_range(m):
        inside = (line < m) & (top + line < rows) & (left + k < columns)
        weight = tl.load(weights + (top + line) * row_stride + (left + k) * column_stride, mask=inside, other=0.0)
        by_row += (tl.abs(weight.to(tl.float32)),)
        inside = (line < tl.where(top + k < rows, m, 0)) & (left + line < columns)
        weight = tl.load(weights + (top + k) * row_stride + (left + line) * column_stride, mask=inside, other=0.0)
        by_column += (tl.abs(weight.to(tl.float32)),)
        peak = tl.maximum(peak, by_column[k].to(tl.int32, bitcast=True))  # magnitudes order as their bits
    exponent = tl.max(peak, axis=1, keep_dims=True) >> 23
    solvable = (exponent >= _SMALLEST_EXPONENT) & (exponent < _EXPONENT_OF_INF)
    field = tl.where(solvable, 127 + 127 + _WEIGHT_BITS - 1 - exponent, 127)
    scale = (field << 23).to(tl.float32, bitcast=True)
    by_row = _quantised(by_row, scale, m)
    by_column = _quantised(by_column, scale, m)

    row_price = tl.zeros((blocks, lines), tl.int32)
    column_price = tl.zeros((blocks, lines), tl.int32)
    fair = tl.zeros((blocks, lines), tl.int32)
    proven = tl.zeros((blocks, 1), tl.int1)
    unproven = blocks
    sweep = 0
    while (sweep < sweeps) & (unproven > 0):
        fair = _fair_price(by_column, row_price, n, m, network)  # now every column has N or, where weights tie, more
        kept = tl.zeros((blocks, lines), tl.int32)
        for k in tl.static_range(m):
            kept += (by_row[k] >= row_price + _price_of(fair, k)).to(tl.int32)
        full = (kept == n) | (line >= m)
        proven = solvable & (tl.min(full.to(tl.int32), axis=1, keep_dims=True) == 1)
        unproven = tl.sum((solvable & ~proven).to(tl.int32))
        column_price = _overshot(fair, column_price, gain)
        next_price = _overshot(_fair_price(by_row, column_price, n, m, network), row_price, gain)
        row_price = tl.where(proven, row_price, next_price)  # a proven block stays: `fair` depends on nothing else
        sweep += 1

    at = mask + top * groups * m + left + line
    for k in tl.static_range(m):
        reaches = by_column[k] >= fair + _price_of(row_price, k)
        tl.store(at + k * groups.to(tl.int64) * m, reaches.to(tl.int8), mask=(line < m) & (block < groups))
    tl.store(proven_blocks + strip * groups + block, proven.to(tl.int8), mask=block < groups)


@compiled()
def _quantised(line: tl.tuple, scale: tl.tensor, m: tl.constexpr) -> tl.tuple:
    """The weights as integers."""
    result: tl.tuple = ()
    for k in tl.static_range(m):
        result += ((line[k] * scale).to(tl.int32),)
    return result


@compiled()
def _fair_price(
    line: tl.tuple, others: tl.tensor, n: tl.constexpr, m: tl.constexpr, network: tl.constexpr
) -> tl.tensor:
    """The price of every line at which N of its weights are worth keeping.

    The midpoint, rounded up, of the N-th and the (N+1)-th largest of weight minus the crossing line's price.
    """
    wires: tl.tuple = ()
    for k in tl.static_range(m):
        wires += (line[k] - _price_of(others, k),)
    for step in tl.static_range(len(network)):
        wires = _exchange(wires, network[step][0], network[step][1])
    inside = wires[n - 1]
    outside = wires[n]
    return (inside | outside) - ((inside ^ outside) >> 1)


@compiled()
def _exchange(wires: tl.tuple, high: tl.constexpr, low: tl.constexpr) -> tl.tuple:
    """Bring the larger of two wires to `high`, which comes first, and the smaller one to `low`."""
    larger = (tl.maximum(wires[high], wires[low]),)
    smaller = (tl.minimum(wires[high], wires[low]),)
    return wires[:high] + larger + wires[high + 1 : low] + smaller + wires[low + 1 :]


@compiled()
def _price_of(prices: tl.tensor, k: tl.constexpr) -> tl.tensor:
    """The price of line k of its block, for every thread."""
    return tl.gather(prices, tl.full(prices.shape, k, tl.int32), 1)


@compiled()
def _overshot(fair: tl.tensor, old: tl.tensor, gain: tl.constexpr) -> tl.tensor:
    """Go beyond the fair price by gain/8 of the way to it."""
    price = fair + ((fair - old) >> 3) * gain
    return tl.minimum(tl.maximum(price, -_HIGHEST_PRICE), _HIGHEST_PRICE)
