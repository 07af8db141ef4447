"""How many masks a pattern allows, and how likely a random sparse weight already holds it.

Sources: Hubara et al. 2021, section 3 (mask diversity) and section 5 (violation probability).
"""

from collections import Counter
from collections.abc import Mapping
from functools import cache
from math import comb, factorial, prod

from tnm_pipeline.training.pattern import Pattern


@cache
def count_masks(pattern: Pattern) -> int:
    """Exact number of masks with N kept in every group of one M x M block.

    Row-wise, rows are independent: C(M, N)^M. Transposable, columns couple them: rows are added one at
    a time and only the multiset of the columns' remaining room is remembered, which keeps 4:8 to a few
    hundred states.

    Args:
        pattern: 90 for 2:4-T, 116,963,796,250 for 4:8-T.
    """
    if not pattern.transposable:
        return int(comb(pattern.m, pattern.n) ** pattern.m)
    states: Mapping[tuple[int, ...], int] = {(pattern.n,) * pattern.m: 1}
    for _ in range(pattern.m):
        following: Counter[tuple[int, ...]] = Counter()
        for room, ways in states.items():
            for left, choices in _place_row(room, pattern.n):
                following[left] += ways * choices
        states = following
    return states[(0,) * pattern.m]


@cache
def _place_row(room: tuple[int, ...], n: int) -> list[tuple[tuple[int, ...], int]]:
    """Every way to keep `n` weights in a row, grouped by the sorted room that columns are left with."""
    levels = sorted(Counter(room).items())
    results: Counter[tuple[int, ...]] = Counter()

    def descend(level: int, missing: int, left: tuple[int, ...], ways: int) -> None:
        if level == len(levels):
            if missing == 0:
                results[tuple(sorted(left))] += ways
            return
        value, columns = levels[level]
        most = min(columns, missing) if value else 0
        for taken in range(most + 1):
            rest = (value - 1,) * taken + (value,) * (columns - taken)
            descend(level + 1, missing - taken, left + rest, ways * comb(columns, taken))

    descend(0, n, (), 1)
    return list(results.items())


def paper_mask_diversity(pattern: Pattern) -> int:
    """The paper's formula for the masks of one M x M block, kept for comparison.

    Row-wise it is exact, C(M, N)^M. Transposable, it is M! (M-1)! ... (M-Z+1)! with Z = M - N zeros per
    row (the paper's N). That counts too many: 144 for 2:4-T where 90 exist, 1.76e13 for 4:8-T where
    1.17e11 do.
    """
    if not pattern.transposable:
        return count_masks(pattern)
    zeros = pattern.m - pattern.n
    return prod(factorial(pattern.m - i) for i in range(zeros))


def violation_probability(pattern: Pattern, sparsity: float) -> float:
    """Probability that a group of a randomly pruned weight has more than N non-zeros.

    Args:
        pattern: N:M; one direction.
        sparsity: fraction of zeros, independent and uniform, in [0, 1].

    Returns:
        P(fewer than M-N zeros among M). At 50%: .3125 for 2:4 and .3633 for 4:8.

    Raises:
        ValueError: sparsity outside [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the fraction of zeros, in [0, 1]; got {sparsity}")
    needed = pattern.m - pattern.n
    return sum(comb(pattern.m, k) * sparsity**k * (1 - sparsity) ** (pattern.m - k) for k in range(needed))
