"""What several tests of the solvers compare with."""

from collections.abc import Callable
from itertools import combinations, product

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def at_most_two() -> Tensor:
    """Every 4x4 mask with at most two kept in each row and column: (masks, 4, 4) float64."""
    rows = [[float(j in kept) for j in range(4)] for size in range(3) for kept in combinations(range(4), size)]
    masks = torch.tensor(list(product(rows, repeat=4)), dtype=torch.float64)
    return masks[(masks.sum(1) <= 2).all(1)]


@pytest.fixture(scope="session")
def ninety(at_most_two: Tensor) -> Tensor:
    """Every 4x4 mask with exactly two kept in each row and column: (90, 4, 4) float64."""
    return at_most_two[at_most_two.sum((1, 2)) == 8]


@pytest.fixture(scope="session")
def most_of_two(at_most_two: Tensor) -> Callable[[Tensor], Tensor]:
    """The most that a mask with at most two per row and column keeps: (B) float64 of (B, 4, 4)."""
    masks = at_most_two.reshape(-1, 16)
    return lambda blocks: (blocks.double().reshape(-1, 16) @ masks.T).amax(1)
