"""Which input channels should share a group, so that the best mask keeps the most.

The masks of the groups do not depend on each other. Take one channel out of every group: what each group would keep
with each of these channels is a table of independent entries, and handing all of them back in the best way is an
assignment problem. One sweep does this for each place of a group, in an order drawn at random; it never keeps less
than before.

- Row-wise patterns: M - 1 weights of a row that are given x keep their N largest, plus what x exceeds the N-th of them
  by. So the table is exact and costs two additions and a comparison per entry and row.
- Transposable patterns: that table only tells which channels a group should be tried with. These get their exact masks,
  and the assignment is made among them.

Channel permutation for N:M is due to Pool and Yu 2021, who swap pairs of channels. The assignment is that of Jonker and
Volgenant 1987: rows that bid for columns, then shortest augmenting paths for those left over.

Shape legend: R = rows (outputs, one set for each kernel position), C = channels, M = group size, G = groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tnm_pipeline.training.layout import pad_to_multiple
from tnm_pipeline.training.masks import keep, solve
from tnm_pipeline.training.masks.jit import call, compiled
from tnm_pipeline.training.pattern import Pattern

_GROUPS_AT_ONCE = 512  # the assignment takes cubic time
_CANDIDATES = 8  # per group, of a transposable pattern; 16 gain a tenth more in twice the time
_WEIGHTS_AT_ONCE = 1 << 22  # of blocks that are tried: 16 MB
_PATIENCE = 10  # sweeps without a gain before the search starts anew from a random order
_LEAST_GAIN = 1e-6  # relative; float32 sums cannot tell less
_ROUNDS = 10  # of bids; more leave fewer paths, and gain nothing

_Floats = npt.NDArray[np.float32]
_Doubles = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """The best order found.

    Attributes:
        permutation: (C,) int64; channel k is to become what channel `permutation[k]` was.
        before: share of the importance that the best masks keep in the order given, in [0, 1].
        after: the same in the order found; never less.
    """

    permutation: Tensor
    before: float
    after: float


@torch.no_grad()
def search_order(
    importances: Sequence[Tensor], channels: int, pattern: Pattern, *, sweeps: int = 5, seed: int = 0
) -> ChannelOrder:
    """Search an order of input channels in which masks keep more. The same seed gives the same order.

    A sweep takes O(C R G) additions row-wise, O(C R M) weights to find masks for if transposable, and G^2 to G^3 steps
    for the assignment, G at most 512 at a time; memory is that of the importances, twice.

    Args:
        importances: of the weights of all layers that read the channels, (O, K) each, not negative, in the layout of
            `to_gemm`: K is a multiple of C, channels fastest. For a transposable pattern the matrix of the layer that
            makes the channels can be one of them, transposed: the order decides about its blocks as well.
        channels: C, a multiple of M.
        pattern: the rule.
        sweeps: how many; fewer are made only if there is just one group.
        seed: of the channels that are taken out, and of the orders that the search starts anew from.

    Raises:
        ValueError: no importances, negative or non-finite ones, a K that is no multiple of C, or a C that is none of M.
    """
    matrix = _stacked(importances, channels, pattern)
    generator = np.random.default_rng(seed)
    start = order = np.arange(channels)
    idle = 0
    finished: list[_Integers] = []
    for _ in range(sweeps if channels > pattern.m else 0):
        order, moved = _sweep(matrix, order, pattern, generator)
        idle = 0 if moved else idle + 1
        if idle == _PATIENCE:
            finished.append(order)
            order, idle = generator.permutation(channels), 0
    kept = [_kept(matrix, candidate, pattern) for candidate in (start, *finished, order)]
    best = max(range(len(kept)), key=kept.__getitem__)
    return ChannelOrder(torch.from_numpy((start, *finished, order)[best].copy()), kept[0], kept[best])


def _stacked(importances: Sequence[Tensor], channels: int, pattern: Pattern) -> _Floats:
    """All kernel positions of all layers side by side: (C, R), M rows of one position after the other."""
    if channels % pattern.m:
        raise ValueError(f"{channels} channels are not a multiple of {pattern.m}: no group of {pattern} fits")
    parts: list[Tensor] = []
    for matrix in importances:
        rows, columns = matrix.shape
        if columns % channels:
            raise ValueError(f"an importance of shape {(rows, columns)} is not that of {channels} channels")
        if not bool(torch.isfinite(matrix).all()) or bool((matrix < 0).any()):
            raise ValueError("an importance has negative, NaN or Inf entries: give magnitudes")
        rowwise = matrix.float() if not pattern.transposable else pad_to_multiple(matrix.float(), pattern.m)
        parts.append(rowwise.reshape(len(rowwise), -1, channels).transpose(0, 1).reshape(-1, channels).T)
    if not parts:
        raise ValueError("there is no importance to search an order for: give one of at least one layer")
    stacked: _Floats = torch.cat(parts, 1).cpu().contiguous().numpy()
    return stacked


def _kept(matrix: _Floats, order: _Integers, pattern: Pattern) -> float:
    """The share that the best mask keeps."""
    ordered = torch.from_numpy(matrix[order]).T
    total = float(ordered.sum(dtype=torch.float64))
    return float(keep(ordered, solve(ordered, pattern)).sum(dtype=torch.float64)) / total if total else 1.0


def _sweep(
    matrix: _Floats, order: _Integers, pattern: Pattern, generator: np.random.Generator
) -> tuple[_Integers, bool]:
    """Take every channel out once and hand it back; the new order, and whether it keeps more."""
    count = len(order) // pattern.m
    places = generator.permuted(np.tile(np.arange(pattern.m), (count, 1)), axis=1)
    order, moved = order.copy(), False
    for place in range(pattern.m):
        shuffled = generator.permutation(count) if count > _GROUPS_AT_ONCE else np.arange(count)
        for groups in np.array_split(shuffled, -(-count // _GROUPS_AT_ONCE)):
            taken = groups * pattern.m + places[groups, place]
            table = _table(matrix, order, groups, places[groups, place], pattern)
            handed = np.empty(len(groups), np.int64)
            call(assign, "assignment", table, handed)
            now, then = np.trace(table), table[np.arange(len(groups)), handed].sum()
            if then - now > _LEAST_GAIN * abs(now):
                order[taken] = order[taken[handed]]
                moved = True
    return order, moved


def _table(matrix: _Floats, order: _Integers, groups: _Integers, places: _Integers, pattern: Pattern) -> _Doubles:
    """What each group keeps with each of the channels taken out: (G, G), at the diagonal with its own."""
    members = order.reshape(-1, pattern.m)[groups]
    taken = members[np.arange(len(groups)), places]
    offered = np.ascontiguousarray(matrix[taken].T)
    table = np.empty((len(groups), len(groups)))
    call(rowwise_table, "channel permutation", matrix, members, places, offered, pattern.n, table)
    return _tried(matrix, members, places, taken, pattern, table) if pattern.transposable else table


def _tried(
    matrix: _Floats, members: _Integers, places: _Integers, taken: _Integers, pattern: Pattern, guide: _Doubles
) -> _Doubles:
    """The table of a transposable pattern where the guide advises a try, and minus infinity elsewhere."""
    count, rows = len(members), matrix.shape[1]
    advice = guide - guide.mean(0)  # heavy channels would be everybody's first choice
    np.fill_diagonal(advice, np.inf)
    tries = min(count, _CANDIDATES + 1)
    candidates = np.argsort(-advice, axis=1, kind="stable")[:, :tries]
    table = np.full((count, count), -np.inf)
    at_once = max(1, _WEIGHTS_AT_ONCE // (rows * tries * pattern.m))
    for first in range(0, count, at_once):
        part = slice(first, first + at_once)
        groups = np.repeat(members[part][:, None], tries, axis=1)  # (groups, tries, M)
        own = np.arange(len(groups))[:, None]
        groups[own, np.arange(tries), places[part, None]] = taken[candidates[part]]
        weights = torch.from_numpy(matrix[groups.reshape(-1)])
        kept = keep(weights, solve(weights, pattern)).sum(1).view(groups.shape).sum(2, dtype=torch.float64)
        table[first + own, candidates[part]] = kept.numpy()
    return table


@compiled
def rowwise_table(
    matrix: _Floats, members: _Integers, places: _Integers, offered: _Floats, n: int, table: _Doubles
) -> None:
    """What each group keeps, row by row, with each of the channels offered in place of one of its own.

    Args:
        matrix: (C, R), not negative.
        members: (G, M), the channels of each group.
        places: (G,), which of them is replaced.
        offered: (R, J), channels of the matrix, transposed.
        n: weights kept in every row of a group.
        table: (G, J), overwritten.
    """
    rows, count = offered.shape
    largest = np.empty((n, rows), np.float32)  # of what a group has left, in descending order
    excess = np.empty(count, np.float32)
    zero = np.float32(0)
    for g in range(len(members)):
        largest[:] = 0
        for k in range(members.shape[1]):
            if k != places[g]:
                channel = members[g, k]
                for r in range(rows):
                    weight = matrix[channel, r]
                    for rank in range(n):
                        above = largest[rank, r]
                        largest[rank, r] = max(above, weight)
                        weight = min(above, weight)
        kept = 0.0
        for rank in range(n):
            for r in range(rows):
                kept += largest[rank, r]
        limit = largest[n - 1]
        excess[:] = 0
        paired = rows - rows % 2
        for r in range(0, paired, 2):  # two rows at a time: half the traffic to `excess`
            first, second = limit[r], limit[r + 1]
            for j in range(count):
                excess[j] += max(offered[r, j] - first, zero) + max(offered[r + 1, j] - second, zero)
        for r in range(paired, rows):
            for j in range(count):
                excess[j] += max(offered[r, j] - limit[r], zero)
        for j in range(count):
            table[g, j] = kept + excess[j]


@compiled
def assign(gain: _Doubles, column_of: _Integers) -> None:
    """Give each row its own column so that the sum of the gains is largest, O(n^3).

    Prices of columns, and the most that each row gains beyond a price, are the dual: it is feasible all the way, and a
    row holds only a column that it gains the most with.

    Args:
        gain: (n, n), finite on some full assignment, minus infinity for what is forbidden.
        column_of: (n,), overwritten: the column of each row.
    """
    count = len(gain)
    price, row_of = np.full(count, -np.inf), np.full(count, -1)
    column_of[:] = -1
    waiting = np.arange(count)
    for i in range(count):
        for j in range(count):
            price[j] = max(price[j], gain[i, j])
    left = count
    for _ in range(_ROUNDS):
        left = bid(gain, price, row_of, column_of, waiting, left)
    for k in range(left):
        augment(gain, price, row_of, column_of, waiting[k])


@compiled
def bid(
    gain: _Doubles, price: _Doubles, row_of: _Integers, column_of: _Integers, waiting: _Integers, count: int
) -> int:
    """Let rows without a column take their best one, at the price that makes it no better than their second.

    A row that loses its column to a higher price bids at once; if the price stayed, it waits for the next round.

    Args:
        gain: as of `assign`.
        price: (n,), of the columns; changed.
        row_of: (n,), of each column, -1 = none; changed.
        column_of: (n,), the other way round; changed.
        waiting: (n,), the rows without a column first; changed.
        count: of them.

    Returns:
        How many rows are without a column now.
    """
    left = at = 0
    most = len(gain)  # bids that follow at once: prices may rise by little, for long
    while at < count:
        row = waiting[at]
        at += 1
        first = second = -np.inf
        best = other = -1
        for j in range(len(gain)):
            value = gain[row, j] - price[j]
            if value > second:
                if value > first:
                    second, other, first, best = first, best, value, j
                else:
                    second, other = value, j
        if second == -np.inf:  # the only column that it may have: no price is too high
            waiting[left] = row
            left += 1
            continue
        raised = first > second
        if raised:
            price[best] += first - second
        elif row_of[best] >= 0:
            best = other
        pushed = row_of[best]
        column_of[row], row_of[best] = best, row
        if pushed >= 0:
            column_of[pushed] = -1
            if raised and most > 0:
                most -= 1
                at -= 1
                waiting[at] = pushed
            else:
                waiting[left] = pushed
                left += 1
    return left


@compiled
def augment(gain: _Doubles, price: _Doubles, row_of: _Integers, column_of: _Integers, start: int) -> None:
    """Give a row a column along the shortest path on which others change theirs, in the dual's slack.

    Args:
        gain: as of `assign`.
        price: (n,), of the columns; changed.
        row_of: (n,), of each column, -1 = none; changed.
        column_of: (n,), the other way round; changed.
        start: the row.
    """
    count = len(gain)
    distance = np.full(count, np.inf)
    before = np.empty(count, np.int64)
    done = np.zeros(count, np.bool_)
    passed = np.empty(count, np.int64)
    steps, length, row = 0, 0.0, start
    worth = -np.inf
    for j in range(count):
        worth = max(worth, gain[start, j] - price[j])
    while True:
        column = -1
        for j in range(count):
            if not done[j]:
                there = length + worth + price[j] - gain[row, j]
                if there < distance[j]:
                    distance[j], before[j] = there, row
                if column < 0 or distance[j] < distance[column]:
                    column = j
        length = distance[column]
        done[column] = True
        if row_of[column] < 0:
            break
        passed[steps] = column
        steps += 1
        row = row_of[column]
        worth = gain[row, column] - price[column]
    for k in range(steps):
        price[passed[k]] += length - distance[passed[k]]
    row = -1
    while row != start:
        row = before[column]
        row_of[column] = row
        left = column_of[row]
        column_of[row] = column
        column = left
