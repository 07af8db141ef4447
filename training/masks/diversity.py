"""How many masks a pattern allows, and how likely a random sparse weight already holds it.

Transposable masks are counted row by row. What the rows above leave to those below is only how many columns still have
room for how many weights, so a state is the tuple of those numbers: at place r, the columns with room for r more.

Sources: Hubara et al. 2021, section 3 (mask diversity) and section 5 (violation probability); Canfield and McKay 2005,
"Asymptotic enumeration of dense 0-1 matrices with equal row sums and equal column sums", for the estimate.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from math import comb, factorial, prod

from tnm_pipeline.training.pattern import Pattern, PatternError

# Seconds on one core. Counting at most N has no halves to join and keeps more states alive.
_MAX_STATES = 1_000_000
_MAX_STATES_AT_MOST = 20_000

_State = tuple[int, ...]


class CountTooLargeError(PatternError):
    """A pattern whose masks cannot be counted in reasonable time."""


@cache
def count_masks(pattern: Pattern) -> int:
    """Exact number of masks with N kept in every group of one M x M block.

    Row-wise, rows are independent: C(M, N)^M. Transposable, columns couple them: the lower half of the block must fill
    exactly the room that the upper half left, so half of the rows are placed and the two halves joined. N and M-N have
    equally many masks (swap kept and dropped), and the smaller of them has fewer states. Work grows with the
    C(M + n, n) states, n = min(N, M-N): milliseconds for 4:8-T, seconds for 8:16-T.

    Args:
        pattern: any row-wise one; a transposable one with at most a million states.

    Returns:
        90 for 2:4-T, 116,963,796,250 for 4:8-T.

    Raises:
        CountTooLargeError: a transposable pattern with more states, such as 16:32-T.
    """
    m = pattern.m
    if not pattern.transposable:
        return int(comb(m, pattern.n) ** m)
    n = min(pattern.n, m - pattern.n)
    _refuse_many_states(pattern, n, _MAX_STATES, "use estimate_log2_masks, which is about 1/(2M) low")
    lower = _empty(n, m)
    for _ in range(m // 2):
        lower = _add_row(lower, n, full=True)
    upper = _add_row(lower, n, full=True) if m % 2 else lower
    # Both halves count a state with its columns in any order: divide one of them by the number of orders.
    return sum(
        ways * lower.get(state[::-1], 0) * prod(map(factorial, state)) // factorial(m) for state, ways in upper.items()
    )


def estimate_log2_masks(pattern: Pattern) -> float:
    """Logarithm, base 2, of the number of masks of one M x M block, for any pattern.

    Row-wise it is exact. Transposable, it is the asymptotic formula of Canfield and McKay,
    C(M, N)^(2M) / C(M^2, M*N) * exp(-1/2). It is low by about 1/(2M) of the number of masks (12% for 2:4-T, 6% for
    4:8-T, 3% for 8:16-T), a small part of a bit.
    """
    n, m = pattern.n, pattern.m
    if not pattern.transposable:
        return m * math.log2(comb(m, n))
    return 2 * m * math.log2(comb(m, n)) - math.log2(comb(m * m, m * n)) - 0.5 / math.log(2)


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
    _check_fraction(sparsity)
    needed = pattern.m - pattern.n
    return sum(comb(pattern.m, k) * sparsity**k * (1 - sparsity) ** (pattern.m - k) for k in range(needed))


def block_violation_probability(pattern: Pattern, sparsity: float) -> float:
    """Probability that an M x M block of a randomly pruned weight breaks the pattern anywhere.

    Rows and columns share weights, so their violations are not independent: the blocks that hold N:M both ways are
    counted by their number of non-zeros, and each weighs sparsity^zeros * (1 - sparsity)^nonzeros.

    Args:
        pattern: N:M: some row breaks it. N:M-T: some row or some column does.
        sparsity: fraction of zeros, independent and uniform, in [0, 1].

    Raises:
        ValueError: sparsity outside [0, 1].
        CountTooLargeError: a transposable pattern with more than 20,000 states, C(M + N, N).
    """
    _check_fraction(sparsity)
    size = pattern.m**2
    if not pattern.transposable:
        return 1 - (1 - violation_probability(pattern, sparsity)) ** pattern.m
    holding = _count_at_most(pattern)
    return 1 - sum(ways * sparsity ** (size - k) * (1 - sparsity) ** k for k, ways in holding.items())


@cache
def _count_at_most(pattern: Pattern) -> Mapping[int, int]:
    """Non-zeros -> number of M x M blocks with so many, and at most N in each row and each column."""
    n, m = pattern.n, pattern.m
    _refuse_many_states(pattern, n, _MAX_STATES_AT_MOST, "draw random blocks and count their violations instead")
    states = _empty(n, m)
    for _ in range(m):
        states = _add_row(states, n, full=False)
    counts: dict[int, int] = defaultdict(int)
    for state, ways in states.items():
        counts[sum((n - room) * columns for room, columns in enumerate(state))] += ways
    return counts


def _empty(n: int, m: int) -> Mapping[_State, int]:
    """The state of a block without rows: every column has room for N."""
    return {(*[0] * n, m): 1}


def _add_row(states: Mapping[_State, int], n: int, *, full: bool) -> Mapping[_State, int]:
    """Place one more row below.

    Args:
        states: state -> number of ways to reach it, over all orders of its columns.
        n: weights kept per row.
        full: keep exactly N in the row; otherwise at most N.

    Returns:
        The same for the block with that row.
    """
    partial = {(state, n): ways for state, ways in states.items()}  # the row is still to keep so many
    for room in range(1, n + 1):
        following: dict[tuple[_State, int], int] = defaultdict(int)
        for (state, missing), ways in partial.items():
            columns = state[room]
            least = max(0, missing - sum(state[room + 1 :])) if full else 0
            for kept in range(least, min(columns, missing) + 1):
                left = (*state[: room - 1], state[room - 1] + kept, columns - kept, *state[room + 1 :])
                following[left, missing - kept] += ways * comb(columns, kept)
        partial = following
    reached: dict[_State, int] = defaultdict(int)
    for (state, _), ways in partial.items():
        reached[state] += ways
    return reached


def _refuse_many_states(pattern: Pattern, n: int, limit: int, instead: str) -> None:
    states = comb(pattern.m + n, n)
    if states > limit:
        raise CountTooLargeError(
            f"counting the masks of {pattern} could reach {states:.1e} states, and {limit:,} is the limit: {instead}"
        )


def _check_fraction(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is the fraction of zeros, in [0, 1]; got {sparsity}")
