"""Shortest augmenting paths: finish a block exactly, from whatever prices and mask the sweeps reached.

See the mask as a flow. Every row keeps N weights: its best ones after the columns' prices, so that no exchange within
a row gains. While a column is kept too often, the cheapest chain of such exchanges leads from it to a column that is
kept too rarely (Dijkstra over the M columns, on reduced costs); flipping the chain and moving the prices of the
columns it passed leaves every row best again. A chain takes away one surplus, so their number is bounded by what the
start was off, and the end is optimal whatever the prices were (Ahuja, Magnanti, Orlin, Network Flows, 9.7).

Weights can tie, and zeros often do. Ties are settled in favour of the columns that need it, where rows choose and
where chains end: a block of pruned weights would otherwise take many chains.

Costs are int64, floor(abs(w) * 2^k) with the block's largest in [2^48, 2^49): float32 weights down to 2^-25 of the
largest are exact, smaller ones are off by less than 2^-48 of it, and sums never round.
"""

from typing import Any

import numpy as np

from tnm_pipeline.training.masks.jit import inlined

_NEVER = np.int64(1 << 62)  # no key is as large
_INDEX_BITS = 5  # column numbers, at most 31
_INDEX = np.int64((1 << _INDEX_BITS) - 1)
_ONE = np.int64(1)


@inlined
def finish_block(weights: Any, prices: Any, kept: Any, held: Any, keys: Any, via: Any, n: int, m: int) -> None:
    """Make the mask of one block optimal, in place.

    Args:
        weights: (M*M) int64, row-major, in [0, 2^49).
        prices: (M) int64 of the columns, any start within +-2^49.
        kept: (M) int64, column j of a row as bit j; any number in each row, but none worth less, weight minus price,
            than one left out.
        held: (M) int64 scratch: how often each column is kept.
        keys: (M) int64 scratch: the distance of each column, above a bit that is clear if the column is kept too
            rarely, above the column's number.
        via: (M) int64 scratch: the weight (row*M + column) through which a column is reached.
        n: weights kept per row and column.
        m: group size.
    """
    held[:] = 0
    for row in range(m):
        for column in range(m):
            held[column] += (kept[row] >> column) & 1
    for row in range(m):
        _fill_row(weights, prices, kept, held, row, n, m)
    while True:
        surplus = False
        for column in range(m):
            surplus |= held[column] > n
            keys[column] = column if held[column] > n else _NEVER
        if not surplus:
            return
        settled = np.int64(0)
        while True:
            nearest = _NEVER
            for column in range(m):
                nearest = min(nearest, _NEVER if (settled >> column) & 1 else keys[column])
            here, distance = nearest & _INDEX, nearest >> (_INDEX_BITS + 1)
            if held[here] < n:
                break
            settled |= _ONE << here
            for row in range(m):
                if (kept[row] >> here) & 1:
                    _reach_from(weights, prices, held, keys, via, row, here, distance, kept[row] | settled, n, m)
        for column in range(m):
            if (settled >> column) & 1:
                prices[column] += distance - (keys[column] >> (_INDEX_BITS + 1))
        held[here] += 1
        while True:
            row, before = via[here] // m, via[here] % m
            kept[row] ^= (_ONE << here) | (_ONE << before)
            here = before
            if held[here] > n:
                break
        held[here] -= 1


@inlined
def _fill_row(weights: Any, prices: Any, kept: Any, held: Any, row: Any, n: int, m: int) -> None:
    """Add the best or drop the worst after prices until the row keeps N; of equals, the column kept least or most."""
    bits = kept[row]
    size = np.int64(0)
    for column in range(m):
        size += (bits >> column) & 1
    while size != n:
        adds = size < n
        best = -_NEVER
        for column in range(m):
            value = weights[row * m + column] - prices[column]
            key = ((((value if adds else -value) << 6) + (m - held[column] if adds else held[column])) << 5) | column
            best = max(best, key if ((bits >> column) & 1 == 0) == adds else -_NEVER)
        change = 1 if adds else -1
        bits ^= _ONE << (best & _INDEX)
        held[best & _INDEX] += change
        size += change
    kept[row] = bits


@inlined
def _reach_from(
    weights: Any,
    prices: Any,
    held: Any,
    keys: Any,
    via: Any,
    row: Any,
    here: Any,
    distance: Any,
    closed: Any,
    n: int,
    m: int,
) -> None:
    """Shorten the distances of the columns that a row could keep instead of `here`."""
    weight = row * m + here
    base = distance + weights[weight] - prices[here]
    for column in range(m):
        longer = (base - weights[row * m + column] + prices[column]) << 1 | (held[column] >= n)
        key = longer << _INDEX_BITS | column
        shorter = (key < keys[column]) & (((closed >> column) & 1) == 0)
        keys[column] = key if shorter else keys[column]
        via[column] = weight if shorter else via[column]
