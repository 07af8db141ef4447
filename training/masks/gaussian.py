"""How much magnitude a pattern keeps of Gaussian weights: what to expect of a layer before training has shaped it.

All functions give the limit for a large weight: the mean of what is kept over the mean of what is there. The scale of
the weights does not matter.

Shape legend: B = blocks, M = group size.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from tnm_pipeline.training.layout import to_blocks
from tnm_pipeline.training.masks.solve import Solver, solve
from tnm_pipeline.training.pattern import Pattern

_FARTHEST = 9.0  # standard deviations; beyond lies 3e-18 of the magnitude
_NODES = 200  # of Gauss-Legendre quadrature; more change nothing in double precision


@dataclass(frozen=True)
class Estimate:
    """A mean from random draws and its standard error."""

    value: float
    standard_error: float


def unstructured_kept_magnitude(density: float) -> float:
    """Kept magnitude of Gaussian weights when the heaviest are kept wherever they are: exp(-t^2 / 2).

    t is the threshold, P(abs(w) > t) = density.

    Args:
        density: fraction kept, in (0, 1].

    Returns:
        .7965 at 50%.

    Raises:
        ValueError: density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is the fraction of weights kept, in (0, 1]; got {density}")
    return math.exp(-(NormalDist().inv_cdf(1 - density / 2) ** 2) / 2)


def rowwise_kept_magnitude(pattern: Pattern) -> float:
    """Kept magnitude of Gaussian weights under the best row-wise mask.

    The expectation of the N largest of M half-normals, as one integral: a weight of magnitude x is kept if fewer than N
    of the M-1 others exceed it, so the share is the integral of x exp(-x^2/2) P(Binomial(M-1, P(abs(w) > x)) < N).
    Gauss-Legendre quadrature; exact to about 14 digits.

    Args:
        pattern: row-wise.

    Returns:
        .7445 for 2:4, .7683 for 4:8; 1/sqrt(2) for 1:2.

    Raises:
        ValueError: the pattern is transposable: no integral is known, see `estimate_kept_magnitude`.
    """
    if pattern.transposable:
        raise ValueError(f"{pattern} couples rows and columns and has no such integral: use estimate_kept_magnitude")
    points, weights = np.polynomial.legendre.leggauss(_NODES)
    return sum(
        float(weight) * _FARTHEST / 2 * x * math.exp(-x * x / 2) * _is_kept(pattern, math.erfc(x / math.sqrt(2)))
        for weight, x in zip(weights, (_FARTHEST / 2 * (float(point) + 1) for point in points), strict=True)
    )


def _is_kept(pattern: Pattern, exceeds: float) -> float:
    """Probability that fewer than N of the M-1 others exceed a weight, each with probability `exceeds`."""
    others = pattern.m - 1
    return sum(
        math.comb(others, count) * exceeds**count * (1 - exceeds) ** (others - count) for count in range(pattern.n)
    )


def estimate_kept_magnitude(pattern: Pattern, *, blocks: int, seed: int = 0, solver: Solver = "exact") -> Estimate:
    """Kept magnitude of Gaussian weights by solving random blocks.

    Args:
        pattern: any.
        blocks: how many M x M blocks to draw; the standard error falls with their square root.
        seed: of the draw.
        solver: of `solve`.

    Returns:
        Kept over drawn magnitude, and the standard error of that ratio (delta method over blocks).

    Raises:
        ValueError: fewer than two blocks, which have no standard error.
    """
    if blocks < 2:
        raise ValueError(f"a standard error needs at least 2 blocks; got {blocks}")
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(blocks * pattern.m, pattern.m, generator=generator)
    magnitude = weight.abs().double()
    drawn = to_blocks(magnitude, pattern.m).sum((1, 2))  # (B,)
    kept = to_blocks(magnitude * solve(weight, pattern, solver), pattern.m).sum((1, 2))
    ratio = float(kept.sum() / drawn.sum())
    deviation = float((kept - ratio * drawn).std()) / float(drawn.mean())
    return Estimate(ratio, deviation / math.sqrt(blocks))
