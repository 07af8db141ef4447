"""Counts of masks and probabilities against enumeration."""

from itertools import combinations, product

import pytest

from tnm_pipeline.training.masks.diversity import count_masks, paper_mask_diversity, violation_probability
from tnm_pipeline.training.pattern import Pattern


def enumerate_transposable(n: int, m: int) -> int:
    rows = [[int(j in chosen) for j in range(m)] for chosen in combinations(range(m), n)]
    return sum(all(sum(column) == n for column in zip(*mask, strict=True)) for mask in product(rows, repeat=m))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_transposable_counts_equal_enumeration(n: int, m: int) -> None:
    assert count_masks(Pattern(n, m, transposable=True)) == enumerate_transposable(n, m)


def test_known_counts() -> None:
    assert count_masks(Pattern(2, 4, transposable=True)) == 90
    assert count_masks(Pattern(4, 8, transposable=True)) == 116_963_796_250
    assert count_masks(Pattern(2, 4)) == 6**4


def test_the_paper_counts_too_many_transposable_masks() -> None:
    assert paper_mask_diversity(Pattern(2, 4, transposable=True)) == 144
    assert paper_mask_diversity(Pattern(4, 8, transposable=True)) == pytest.approx(1.7557e13, rel=1e-4)
    assert paper_mask_diversity(Pattern(2, 4)) == count_masks(Pattern(2, 4))


@pytest.mark.parametrize(
    ("text", "sparsity", "expected"), [("2:4", 0.5, 5 / 16), ("4:8", 0.5, 93 / 256), ("2:4", 0.8, 0.0272)]
)
def test_violation_probability(text: str, sparsity: float, expected: float) -> None:
    assert violation_probability(Pattern.parse(text), sparsity) == pytest.approx(expected, rel=1e-3)


def test_violation_probability_refuses_a_percentage() -> None:
    with pytest.raises(ValueError, match="fraction"):
        violation_probability(Pattern(2, 4), 50)
