"""Counts of masks and probabilities against enumeration."""

import math
from collections import Counter
from itertools import combinations, product

import pytest
import torch

from tnm_pipeline.training.masks.diversity import (
    CountTooLargeError,
    block_violation_probability,
    count_masks,
    estimate_log2_masks,
    paper_mask_diversity,
    violation_probability,
)
from tnm_pipeline.training.pattern import Pattern


def rows_of(m: int, kept: int) -> list[tuple[int, ...]]:
    return [tuple(int(j in chosen) for j in range(m)) for chosen in combinations(range(m), kept)]


def enumerate_transposable(n: int, m: int) -> int:
    masks = product(rows_of(m, n), repeat=m)
    return sum(all(sum(column) == n for column in zip(*mask, strict=True)) for mask in masks)


def add_rows_one_by_one(n: int, m: int) -> int:
    """Every row against every vector of column sums, columns told apart."""
    states = Counter({(0,) * m: 1})
    for _ in range(m):
        following: Counter[tuple[int, ...]] = Counter()
        for (sums, ways), row in product(states.items(), rows_of(m, n)):
            following[tuple(a + b for a, b in zip(sums, row, strict=True))] += ways
        states = following
    return states[(n,) * m]


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (1, 5)])
def test_transposable_counts_equal_enumeration(n: int, m: int) -> None:
    assert count_masks(Pattern(n, m, transposable=True)) == enumerate_transposable(n, m)


def test_known_counts() -> None:
    """N of 2N: sequence A058527 of the encyclopedia of integer sequences."""
    known = [2, 90, 297_200, 116_963_796_250, 6_736_218_287_430_460_752]
    assert [count_masks(Pattern(n, 2 * n, transposable=True)) for n in range(1, 6)] == known
    assert count_masks(Pattern(2, 4)) == 6**4


@pytest.mark.parametrize("m", [3, 8, 31, 32])
def test_one_kept_per_row_and_column_is_a_permutation(m: int) -> None:
    assert count_masks(Pattern(1, m, transposable=True)) == math.factorial(m)


@pytest.mark.parametrize("m", [5, 6, 9, 12])
def test_two_kept_follow_the_known_recurrence(m: int) -> None:
    """Anand, Dumir, Gupta 1966: b(m) = m (m-1) / 2 * (2 b(m-1) + (m-1) b(m-2)), b(0) = 1, b(1) = 0."""
    known = [1, 0]
    for size in range(2, m + 1):
        known.append(size * (size - 1) * (2 * known[-1] + (size - 1) * known[-2]) // 2)
    assert count_masks(Pattern(2, m, transposable=True)) == known[m]


@pytest.mark.parametrize(("n", "m"), [(2, 5), (3, 5), (4, 5), (3, 6), (4, 6), (2, 6)])
def test_halves_and_complements_equal_adding_all_rows(n: int, m: int) -> None:
    assert count_masks(Pattern(n, m, transposable=True)) == add_rows_one_by_one(n, m)


def test_a_count_out_of_reach_names_the_estimate() -> None:
    with pytest.raises(CountTooLargeError, match="estimate_log2_masks"):
        count_masks(Pattern(16, 32, transposable=True))
    with pytest.raises(CountTooLargeError, match="random blocks"):
        block_violation_probability(Pattern(8, 16, transposable=True), 0.5)


@pytest.mark.parametrize("text", ["2:4-T", "4:8-T", "3:8-T", "6:12-T", "3:16-T", "4:20-T"])
def test_the_estimate_is_low_by_about_one_in_two_m(text: str) -> None:
    pattern = Pattern.parse(text)
    missing = 1 - 2 ** (estimate_log2_masks(pattern) - math.log2(count_masks(pattern)))
    assert missing == pytest.approx(1 / (2 * pattern.m), rel=0.1)


def test_the_estimate_of_a_rowwise_pattern_is_exact() -> None:
    assert 2 ** estimate_log2_masks(Pattern(4, 8)) == pytest.approx(count_masks(Pattern(4, 8)), rel=1e-12)


def test_the_paper_counts_too_many_transposable_masks() -> None:
    assert paper_mask_diversity(Pattern(2, 4, transposable=True)) == 144
    assert paper_mask_diversity(Pattern(4, 8, transposable=True)) == pytest.approx(1.7557e13, rel=1e-4)
    assert paper_mask_diversity(Pattern(2, 4)) == count_masks(Pattern(2, 4))


@pytest.mark.parametrize(
    ("text", "sparsity", "expected"), [("2:4", 0.5, 5 / 16), ("4:8", 0.5, 93 / 256), ("2:4", 0.8, 0.0272)]
)
def test_violation_probability(text: str, sparsity: float, expected: float) -> None:
    assert violation_probability(Pattern.parse(text), sparsity) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("text", ["2:4", "2:4-T", "1:4-T", "3:4-T", "1:3-T"])
def test_block_violations_equal_the_sum_over_every_block(text: str, sparsity: float) -> None:
    """All 2^(M*M) blocks, weighed by how likely they are."""
    pattern = Pattern.parse(text)
    size = pattern.m**2
    bits = torch.arange(1 << size)[:, None] >> torch.arange(size) & 1
    blocks = bits.reshape(-1, pattern.m, pattern.m)
    broken = (blocks.sum(2) > pattern.n).any(1)
    if pattern.transposable:
        broken |= (blocks.sum(1) > pattern.n).any(1)
    by_nonzeros = Counter(bits.sum(1)[broken].tolist())
    expected = sum(ways * (1 - sparsity) ** k * sparsity ** (size - k) for k, ways in by_nonzeros.items())
    assert block_violation_probability(pattern, sparsity) == pytest.approx(expected, abs=1e-12)


def test_block_violations_of_a_larger_pattern_equal_random_blocks() -> None:
    draws, sparsity = 50_000, 0.7
    nonzero = torch.rand(draws, 8, 8, generator=torch.Generator().manual_seed(0)) >= sparsity
    broken = ((nonzero.sum(1) > 4) | (nonzero.sum(2) > 4)).any(1)
    share = block_violation_probability(Pattern(4, 8, transposable=True), sparsity)
    assert float(broken.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / draws))


@pytest.mark.parametrize("probability", [violation_probability, block_violation_probability])
@pytest.mark.parametrize("sparsity", [50, -0.1, float("nan")])
def test_a_percentage_is_refused(probability: object, sparsity: float) -> None:
    assert callable(probability)
    with pytest.raises(ValueError, match="fraction"):
        probability(Pattern(2, 4, transposable=True), sparsity)
