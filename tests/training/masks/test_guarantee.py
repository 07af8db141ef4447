"""What greedy is sure to keep: never less, and no more on the block that the theory names."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnm_pipeline.training.masks.flow import solve_flow
from tnm_pipeline.training.masks.greedy import solve_greedy
from tnm_pipeline.training.masks.guarantee import greedy_guarantee, greedy_worst_block
from tnm_pipeline.training.pattern import Pattern

PATTERNS = [Pattern.parse(text) for text in ("1:2-T", "1:3-T", "2:3-T", "1:4-T", "2:4-T", "3:4-T")]
LARGER = [Pattern.parse(text) for text in ("4:8-T", "2:8-T", "3:8-T", "5:8-T", "7:8-T", "3:5-T")]


def at_most(n: int, m: int) -> Tensor:
    """All masks with at most N in each row and column, (masks, M*M)."""
    rows = [[float(j in kept) for j in range(m)] for size in range(n + 1) for kept in combinations(range(m), size)]
    masks = torch.tensor(list(product(rows, repeat=m)), dtype=torch.float64)
    return masks[(masks.sum(1) <= n).all(1)].reshape(-1, m * m)


ALL_MASKS = {pattern: at_most(pattern.n, pattern.m) for pattern in PATTERNS}


def kept(block: Tensor, mask: Tensor) -> float:
    return float((block * mask).sum())


def greedy(block: Tensor, pattern: Pattern) -> float:
    return kept(block, solve_greedy(block[None], pattern.n)[0])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATTERNS), st.lists(st.integers(0, 9), min_size=16, max_size=16))
def test_greedy_never_keeps_less_than_the_guarantee(pattern: Pattern, values: list[int]) -> None:
    block = torch.tensor(values[: pattern.m**2], dtype=torch.float64).reshape(pattern.m, pattern.m)
    best = float((ALL_MASKS[pattern] @ block.flatten()).max())
    assert greedy(block, pattern) >= greedy_guarantee(pattern) * best - 1e-9


@pytest.mark.parametrize("epsilon", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_worst_block_against_every_mask(pattern: Pattern, epsilon: float) -> None:
    block = greedy_worst_block(pattern, epsilon)
    best = float((ALL_MASKS[pattern] @ block.flatten()).max())
    ratio = greedy(block, pattern) / best
    assert greedy_guarantee(pattern) <= ratio <= greedy_guarantee(pattern) * (1 + epsilon)


@pytest.mark.parametrize("pattern", [*PATTERNS, *LARGER], ids=str)
def test_the_worst_block_against_flow_and_its_certificate(pattern: Pattern) -> None:
    """Flow keeps exactly N. Prices on rows and columns prove that no mask with at most N keeps more."""
    epsilon = 1e-3
    n, m = pattern.n, pattern.m
    block = greedy_worst_block(pattern, epsilon)
    best = kept(block, solve_flow(block[None], n)[0])
    k = min(m - n, n)
    assert best == pytest.approx(n * (n - k) * (1 + epsilon) + 2 * n * k, rel=1e-9)
    price = torch.zeros(m, dtype=torch.float64)
    price[:n] = 1 if m >= 2 * n else (1 + epsilon) / 2
    rest = (block - price[:, None] - price[None, :]).clamp(min=0)
    assert 2 * n * float(price.sum()) + float(rest.sum()) == pytest.approx(best, rel=1e-9)
    assert greedy(block, pattern) == pytest.approx(n * n * (1 + epsilon))


@pytest.mark.parametrize("pattern", LARGER, ids=str)
def test_random_blocks_stay_above_the_guarantee(pattern: Pattern) -> None:
    """Heavy tails, against flow: too large for every mask."""
    g = torch.Generator().manual_seed(0)
    blocks = torch.randn(20, pattern.m, pattern.m, generator=g, dtype=torch.float64).abs() ** 4
    ratio = (blocks * solve_greedy(blocks, pattern.n)).sum((1, 2)) / (blocks * solve_flow(blocks, pattern.n)).sum(
        (1, 2)
    )
    assert float(ratio.min()) >= greedy_guarantee(pattern)


def test_the_guarantee_at_half_density_is_the_papers() -> None:
    assert greedy_guarantee(Pattern(2, 4, transposable=True)) == 0.5
    assert greedy_guarantee(Pattern(1, 4, transposable=True)) == 0.5
    assert greedy_guarantee(Pattern(3, 4, transposable=True)) == 0.75


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 1.5])
def test_a_lure_that_is_none_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        greedy_worst_block(Pattern(2, 4), epsilon)
