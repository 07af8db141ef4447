"""Selection networks: compare-exchange steps that bring two ranks of M values to their places.

A sorting network runs the same steps whatever the values are, so it works on many blocks at once, one in each
vector lane. Only the N-th and the (N+1)-th largest are wanted; steps that reach neither are left out, and so is the
half of a step whose result nobody reads. At 4:8 that is 28 of Batcher's 38 minima and maxima, at 16:32 284 of 382.
"""

from typing import NamedTuple


class Exchange(NamedTuple):
    """One step: wire `high` becomes the larger and wire `low` the smaller of the two."""

    high: int
    low: int
    keeps_high: bool
    keeps_low: bool


def selection_network(m: int, ranks: frozenset[int]) -> list[Exchange]:
    """The steps that leave the value of each rank (0 = largest) on the wire of that number.

    Args:
        m: wires, any number from 1.
        ranks: which wires are read afterwards.

    Returns:
        Steps in order. `keeps_high` and `keeps_low` say which results are read later on.
    """
    needed = set(ranks)
    steps = []
    for high, low in reversed(_batcher(m)):
        keeps_high, keeps_low = high in needed, low in needed
        if keeps_high or keeps_low:
            steps.append(Exchange(high, low, keeps_high, keeps_low))
            needed |= {high, low}
    return steps[::-1]


def _batcher(m: int) -> list[tuple[int, int]]:
    """Batcher's odd-even merge sort for any M, largest first (Knuth, The Art of Computer Programming 3, 5.2.2 M)."""
    pairs = []
    merged = 1
    while merged < m:
        distance = merged
        while distance:
            for start in range(distance % merged, m - distance, 2 * distance):
                wires = range(start, min(start + distance, m - distance))
                same_run = [wire for wire in wires if wire // (2 * merged) == (wire + distance) // (2 * merged)]
                pairs += [(wire, wire + distance) for wire in same_run]
            distance //= 2
        merged *= 2
    return pairs
