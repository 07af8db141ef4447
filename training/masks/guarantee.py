"""How much of the optimum the greedy solver is sure to keep, and the block on which it keeps no more.

Sources: Hubara et al. 2021, the 2-approximation (at least one half); docs/theory.md has the proof for any N:M.
"""

import torch
from torch import Tensor

from tnm_pipeline.training.pattern import Pattern


def greedy_guarantee(pattern: Pattern) -> float:
    """Fraction of the best transposable mask's sum that `solve_greedy` keeps at least, in every block.

    max(1/2, N/M), against the best mask with at most N per row and column; the best one with exactly N keeps no more.
    No larger fraction is true: `greedy_worst_block` comes as near as wanted.

    Args:
        pattern: only N and M count.
    """
    return max(0.5, pattern.n / pattern.m)


def greedy_worst_block(pattern: Pattern, epsilon: float) -> Tensor:
    """A block on which greedy keeps at most the guaranteed fraction times 1 + epsilon.

    N x N weights of 1 + epsilon in the corner lure greedy: they fill the first N rows and columns, and all weights of 1
    lie in one of those. What is outside of both is zero.

    Args:
        pattern: only N and M count.
        epsilon: how much heavier the lure is, in (0, 1]. Greedy compares in float32: below 1e-7 it sees a tie, which
            the corner wins too, because ties keep the first weight.

    Returns:
        (M, M) float64. With k = min(M-N, N) greedy keeps N^2 (1 + epsilon) of N (N-k) (1 + epsilon) + 2 N k.

    Raises:
        ValueError: epsilon outside (0, 1].
    """
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon is how much heavier than 1 the lure is, in (0, 1]; got {epsilon}")
    heavy = torch.arange(pattern.m) < pattern.n
    corner = heavy[:, None] & heavy[None, :]
    return (heavy[:, None] | heavy[None, :]).double() + epsilon * corner.double()
