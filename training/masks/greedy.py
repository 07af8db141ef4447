"""The paper's 2-approximation for transposable masks of any N:M (Hubara et al. 2021, Algorithm 1).

Walk through the block from the heaviest weight to the lightest; keep a weight while its row **and** its
column have room. (The algorithm as printed prunes while the row **or** the column has room, and over-prunes.)

On the CPU, compiled loops take a batch of blocks at a time: a sorting network compares the same two ranks of
every block of the batch, so it runs in vector registers; then each block walks through its own order.
Elsewhere, tensor ops do the same and return the same masks.

Shape legend: B = blocks, M = group size.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tnm_pipeline.training.masks.jit import call, compiled

_LANES = 32  # blocks sorted side by side: fills vector registers, and 32x32 blocks still sort within an L2 cache


def solve_greedy(blocks: Tensor, n: int, complete: bool = False) -> Tensor:
    """A mask with at most N kept per row and column that keeps at least half of the optimum, for each block.

    Without completion the mask is maximal, but rows and columns can end with fewer than N: in 16% of Gaussian
    blocks at 2:4, 56% at 4:8, 87% at 8:16. `complete` fills these to exactly N (see `complete_blocks`, also for
    what it can cost).

    Weights are compared as float32, so float64 ones that round to the same value tie. Ties keep the first
    weight in row-major order; the mask depends on nothing else.

    Args:
        blocks: (B, M, M), non-negative floats without NaN, any strides and device.
        n: weights kept per row and column: at most, or exactly with `complete`.
        complete: exchange weights until every row and column holds N. Runs on the CPU for any device.

    Returns:
        (B, M, M) bool, on the device of `blocks`. Computed on the calling thread for CPU tensors.
    """
    weights = blocks.detach().float().contiguous()
    mask = keep_compiled(weights, n) if weights.device.type == "cpu" else keep_batched(weights, n)
    if not complete:
        return mask
    filled = mask.cpu()
    call(complete_blocks, "completion", weights.cpu().numpy(), n, filled.numpy())
    return filled.to(mask.device)


def keep_compiled(weights: Tensor, n: int) -> Tensor:
    """Greedy masks by compiled loops: O(M^2 log^2 M) comparisons per block, in M^2 x 256 bytes of scratch memory.

    Args:
        weights: (B, M, M), contiguous non-negative float32 on the CPU.
        n: weights kept per row and column, at most.

    Returns:
        (B, M, M) bool.
    """
    mask = torch.empty(weights.shape, dtype=torch.bool)
    call(_keep_blocks, "greedy", weights.view(torch.int32).numpy(), n, mask.numpy())
    return mask


def keep_batched(weights: Tensor, n: int) -> Tensor:
    """Greedy masks by tensor ops: one sort, then one step per rank over all blocks at once.

    Args:
        weights: (B, M, M), non-negative floats on any device.
        n: weights kept per row and column, at most.

    Returns:
        (B, M, M) bool.
    """
    count, m, _ = weights.shape
    # (rank, B): what one step touches lies side by side, which is up to twice as fast as (B, rank).
    order = weights.reshape(count, m * m).argsort(dim=1, descending=True, stable=True).t().contiguous()
    rows, columns = order // m, order % m
    row_room = torch.full((m, count), n, dtype=torch.int8, device=weights.device)
    column_room = row_room.clone()
    kept = torch.empty(order.shape, dtype=torch.bool, device=weights.device)
    for rank in range(m * m):
        row, column = rows[rank : rank + 1], columns[rank : rank + 1]
        row_left, column_left = row_room.gather(0, row), column_room.gather(0, column)
        keep = torch.minimum(row_left, column_left) > 0
        kept[rank] = keep[0]
        row_room.scatter_(0, row, row_left - keep.to(torch.int8))
        column_room.scatter_(0, column, column_left - keep.to(torch.int8))
    mask = torch.empty(count, m * m, dtype=torch.bool, device=weights.device)
    return mask.scatter_(1, order.t(), kept.t()).reshape(count, m, m)


@compiled
def _keep_blocks(bits: npt.NDArray[np.int32], n: int, mask: npt.NDArray[np.bool_]) -> None:
    """Write the greedy mask of every block.

    Args:
        bits: (B, M, M), the bits of float32 weights; the sign bit is ignored.
        n: weights kept per row and column, at most.
        mask: (B, M, M), overwritten.
    """
    count, m, _ = bits.shape
    keys = np.empty(m * m * _LANES, np.int64)  # (rank, lane)
    row_room = np.empty(m, np.int8)
    column_room = np.empty(m, np.int8)
    for first in range(0, count, _LANES):
        lanes = min(_LANES, count - first)  # the last batch leaves stale keys in its other lanes: never read
        _write_keys(bits[first : first + lanes], keys)
        _sort_lanes(keys, m * m)
        for lane in range(lanes):
            kept = mask[first + lane]
            row_room[:] = n
            column_room[:] = n
            for rank in range(m * m):
                key = keys[rank * _LANES + lane]
                row, column = (key >> 16) & 0xFFFF, key & 0xFFFF
                keep = (row_room[row] > 0) & (column_room[column] > 0)  # no branch: half of them would mispredict
                row_room[row] -= keep
                column_room[column] -= keep
                kept[row, column] = keep


@compiled
def _write_keys(bits: npt.NDArray[np.int32], keys: npt.NDArray[np.int64]) -> None:
    """Pack each weight and its place into one integer whose ascending order is the order of the walk.

    The bits of non-negative floats order as the floats do, so their complement comes first for the heaviest;
    the row and the column below it make keys distinct and let the first of tied weights win.

    Args:
        bits: (lanes, M, M), at most `_LANES` blocks.
        keys: (M * M * _LANES,) as (place, lane), overwritten for these lanes.
    """
    lanes, m, _ = bits.shape
    for lane in range(lanes):
        for row in range(m):
            for column in range(m):
                lightness = np.int64(~bits[lane, row, column] & 0x7FFFFFFF)
                keys[(row * m + column) * _LANES + lane] = lightness << 32 | row << 16 | column


@compiled
def _sort_lanes(keys: npt.NDArray[np.int64], count: int) -> None:
    """Sort every lane by Batcher's merge exchange (Knuth, TAOCP volume 3, Algorithm 5.2.2M), for any count.

    Which places are compared never depends on the keys, and p places in a row share one distance d >= p, so
    p * _LANES neighbouring keys meet as many others without overlap: loops that compile to vector minima and maxima.

    Args:
        keys: (count * _LANES,) as (place, lane), sorted in place, ascending.
        count: keys per lane.
    """
    top = 1
    while 2 * top < count:
        top *= 2
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while d > 0:
            for start in range(r, count - d, 2 * p):
                stop = min(start + p, count - d)
                low = keys[start * _LANES : stop * _LANES]
                high = keys[(start + d) * _LANES : (stop + d) * _LANES]
                for k in range(low.size):
                    low[k], high[k] = min(low[k], high[k]), max(low[k], high[k])
            d, r = q - p, p
            q //= 2
        p //= 2


@compiled
def complete_blocks(weights: npt.NDArray[np.float32], n: int, mask: npt.NDArray[np.bool_]) -> None:
    """Fill maximal masks, such as greedy ones, to exactly N per row and column.

    Each step takes the first row r and the first column c that are short, and of all exchanges *insert (r, c')
    and (r', c), drop (r', c')* the one with the largest gain, the first of ties. That adds one to r and to c and
    leaves every other row and column as full as it was.

    An exchange always exists. In a maximal mask every cell where a short row meets a short column is kept. So
    (r, c) is kept, and each c' that r lacks (there are some: r is short) is a full column. If c' had no row r' to
    exchange, all of its N kept rows would be kept in column c too; but c, being short, has fewer than N. The
    exchange keeps the mask maximal: r lacks c' and c lacks r', so both are full, and they stay full.

    What it can cost: the weight dropped from a greedy mask is at least as heavy as either inserted one (greedy passed
    these over because their column or row was full of heavier ones), so a block can end lighter. Of the Gaussian
    blocks that are short, 22% do at 2:4, 10% at 4:8 and 1% at 8:16; the average one gains 2.6%, 0.8% and 0.4%. The
    largest loss that hill climbing found is a quarter at 2:3 and 3:4 and a sixth at 2:4. Half of the optimum is not
    proven for completed masks; the same search found none below it.

    At most N * M exchanges per block, each O(M^2).

    Args:
        weights: (B, M, M), non-negative.
        n: weights to keep per row and column.
        mask: (B, M, M), at most N per row and column and maximal; changed in place.
    """
    count, m, _ = weights.shape
    row_room = np.empty(m, np.int64)
    column_room = np.empty(m, np.int64)
    for b in range(count):
        block, kept = weights[b], mask[b]
        row_room[:] = n
        column_room[:] = n
        for row in range(m):
            for column in range(m):
                row_room[row] -= kept[row, column]
                column_room[column] -= kept[row, column]
        for short_row in range(m):
            for _ in range(row_room[short_row]):
                short_column = 0
                while column_room[short_column] == 0:
                    short_column += 1
                row, column = _best_exchange(block, kept, short_row, short_column)
                kept[row, column] = False
                kept[short_row, column] = True
                kept[row, short_column] = True
                column_room[short_column] -= 1


@compiled
def _best_exchange(
    block: npt.NDArray[np.float32], kept: npt.NDArray[np.bool_], short_row: int, short_column: int
) -> tuple[int, int]:
    """Row r' and column c' of the exchange that gains most, the first of ties."""
    best_row, best_column, best_gain = -1, -1, 0.0
    for row in range(block.shape[0]):
        if kept[row, short_column]:
            continue
        for column in range(block.shape[1]):
            if kept[row, column] and not kept[short_row, column]:
                gain = (
                    np.float64(block[short_row, column])
                    + np.float64(block[row, short_column])
                    - np.float64(block[row, column])
                )
                if best_row < 0 or gain > best_gain:  # the first one also when it is not comparable: inf - inf
                    best_row, best_column, best_gain = row, column, gain
    return best_row, best_column
