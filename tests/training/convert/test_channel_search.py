"""The search for an order of channels, against definitions in loops and against every grouping there is."""

from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # ships without types
from torch import Tensor

from tnm_pipeline.training.convert.channel_search import assign, rowwise_table, search_order
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.masks import kept_magnitude, solve
from tnm_pipeline.training.pattern import Pattern


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).abs()


def kept(matrix: Tensor, pattern: Pattern) -> float:
    return kept_magnitude(matrix, solve(matrix, pattern))


def groupings(channels: tuple[int, ...], m: int) -> Iterator[list[int]]:
    """Every way to share channels out to groups, as an order; the order of groups and inside groups does not matter."""
    if not channels:
        yield []
        return
    first, *rest = channels
    for others in combinations(rest, m - 1):
        left = tuple(channel for channel in rest if channel not in others)
        for tail in groupings(left, m):
            yield [first, *others, *tail]


@pytest.mark.parametrize(
    ("text", "channels"), [("2:4", 8), ("1:4", 8), ("2:4-T", 8), ("1:2", 8), ("2:3-T", 9), ("2:4", 12)]
)
def test_small_matrices_get_the_best_of_all_groupings(text: str, channels: int) -> None:
    pattern = Pattern.parse(text)
    for seed in range(4):
        matrix = weights(6, channels, seed=seed)
        best = max(kept(matrix[:, order], pattern) for order in groupings(tuple(range(channels)), pattern.m))
        found = search_order([matrix], channels, pattern, sweeps=200)
        assert found.after == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "2:4-T", "4:8-T", "3:8-T"])
def test_what_is_reported_is_what_masks_keep(text: str) -> None:
    pattern, matrix = Pattern.parse(text), weights(20, 48)
    found = search_order([matrix], 48, pattern)
    assert found.permutation.sort().values.tolist() == list(range(48))
    assert found.before == pytest.approx(kept(matrix, pattern), abs=1e-6)
    assert found.after == pytest.approx(kept(matrix[:, found.permutation], pattern), abs=1e-6)
    assert found.after > found.before + 0.005


def test_more_sweeps_keep_more_and_the_same_seed_keeps_the_same() -> None:
    matrix, pattern = weights(64, 128), Pattern(2, 4)
    orders = [search_order([matrix], 128, pattern, sweeps=sweeps) for sweeps in (0, 1, 5, 100)]
    assert [order.after for order in orders] == sorted(order.after for order in orders)
    assert orders[0].permutation.tolist() == list(range(128))
    assert orders[0].after == orders[0].before
    again = search_order([matrix], 128, pattern, sweeps=5)
    assert torch.equal(again.permutation, orders[2].permutation)
    other = search_order([matrix], 128, pattern, sweeps=5, seed=1)
    assert not torch.equal(other.permutation, orders[2].permutation)


def test_hidden_groups_are_found() -> None:
    """Each row of a group has two large weights; shuffled, some groups have more and others fewer."""
    matrix = torch.full((32, 32), 0.01)
    generator = torch.Generator().manual_seed(0)
    for row in range(32):
        for group in range(8):
            matrix[row, 4 * group + torch.randperm(4, generator=generator)[:2]] = 1.0
    shuffled = matrix[:, torch.randperm(32, generator=generator)]
    found = search_order([shuffled], 32, Pattern(2, 4), sweeps=200)
    assert found.before < 0.9
    assert found.after == pytest.approx(kept(matrix, Pattern(2, 4)))


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_the_kernel_positions_of_a_convolution_move_together(text: str) -> None:
    pattern, weight = Pattern.parse(text), weights(6, 16, 3, 3)
    found = search_order([to_gemm(weight)], 16, pattern)
    assert found.before == pytest.approx(kept(weight, pattern), abs=1e-6)
    assert found.after == pytest.approx(kept(weight[:, found.permutation], pattern), abs=1e-6)
    assert found.after > found.before


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_several_layers_count_by_their_sums(text: str) -> None:
    pattern, first, second = Pattern.parse(text), weights(8, 16), weights(5, 32, seed=1)  # the second at two positions
    found = search_order([first, second], 16, pattern)
    wide = torch.cat([found.permutation, found.permutation + 16])
    totals = [
        sum(float((matrix * solve(matrix, pattern)).sum()) for matrix in pair)
        for pair in ((first, second), (first[:, found.permutation], second[:, wide]))
    ]
    everything = float(first.sum() + second.sum())
    assert found.before == pytest.approx(totals[0] / everything, abs=1e-6)
    assert found.after == pytest.approx(totals[1] / everything, abs=1e-6)


def test_the_blocks_of_the_producer_count_if_it_is_given_transposed() -> None:
    pattern, producer, consumer = Pattern(2, 4, transposable=True), weights(32, 12), weights(8, 32, seed=1)
    found = search_order([consumer, producer.T], 32, pattern)
    order = found.permutation
    before, after = (
        float((a * solve(a, pattern)).sum() + (b * solve(b, pattern)).sum())
        for a, b in ((consumer, producer), (consumer[:, order], producer[order]))
    )
    assert found.after / found.before == pytest.approx(after / before, abs=1e-5)
    assert after > before


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_orders_that_change_nothing_are_left_as_they_are(text: str) -> None:
    pattern = Pattern.parse(text)
    for matrix in (torch.zeros(4, 16), torch.ones(4, 16)):
        found = search_order([matrix], 16, pattern)
        assert found.permutation.tolist() == list(range(16))
        assert found.before == found.after == pytest.approx(1.0 if not matrix.any() else 0.5)
    assert search_order([weights(4, 4)], 4, pattern).permutation.tolist() == [0, 1, 2, 3]


def test_more_groups_than_one_assignment_takes() -> None:
    matrix = weights(4, 4 * 700)
    found = search_order([matrix], 4 * 700, Pattern(2, 4), sweeps=1)
    assert found.permutation.sort().values.tolist() == list(range(4 * 700))
    assert found.after > found.before + 0.03


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="6 channels are not a multiple of 4: no group of 2:4 fits"):
        search_order([weights(4, 6)], 6, Pattern(2, 4))
    with pytest.raises(ValueError, match=r"shape \(4, 12\) is not that of 8 channels"):
        search_order([weights(4, 12)], 8, Pattern(2, 4))
    with pytest.raises(ValueError, match="give one of at least one layer"):
        search_order([], 8, Pattern(2, 4))
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="negative, NaN or Inf entries"):
            search_order([torch.full((4, 8), wrong)], 8, Pattern(2, 4))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 5), st.data())
def test_the_table_is_what_rows_keep(rows: int, count: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    matrix = generator.integers(0, 9, (rows, count * m)).astype(np.float32)
    members = generator.permutation(count * m).reshape(count, m)
    places = generator.integers(0, m, count)
    offered = generator.integers(0, 9, (rows, 3)).astype(np.float32)
    table = np.empty((count, 3))
    rowwise_table(np.ascontiguousarray(matrix.T), members, places, offered, n, table)
    for g in range(count):
        for j in range(3):
            group = matrix[:, members[g]].copy()
            group[:, places[g]] = offered[:, j]
            assert table[g, j] == sum(sum(sorted(row, reverse=True)[:n]) for row in group.tolist())


@given(st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_assignments_are_the_best_of_all(count: int, seed: int, forbid: bool) -> None:
    generator = np.random.default_rng(seed)
    gain = generator.integers(-5, 5, (count, count)).astype(np.float64)
    if forbid:
        gain[(generator.random((count, count)) < 0.5) & ~np.eye(count, dtype=np.bool_)] = -np.inf
    column_of = np.empty(count, np.int64)
    assign(gain, column_of)
    best = max(sum(gain[i, j] for i, j in enumerate(columns)) for columns in permutations(range(count)))
    assert sorted(column_of.tolist()) == list(range(count))
    assert gain[np.arange(count), column_of].sum() == best


@pytest.mark.parametrize("kind", ["gaussian", "ties", "forbidden", "one for all", "sorted"])
@pytest.mark.parametrize("count", [2, 7, 64, 200])
def test_assignments_are_those_of_scipy(count: int, kind: str) -> None:
    generator = np.random.default_rng(count)
    gain = generator.standard_normal((count, count))
    if kind == "ties":
        gain = generator.integers(0, 3, (count, count)).astype(np.float64)
    elif kind == "forbidden":
        gain[(generator.random((count, count)) < 0.9) & ~np.eye(count, dtype=np.bool_)] = -np.inf
    elif kind == "one for all":
        gain[:, count // 2] += 100  # everybody's first choice
    elif kind == "sorted":
        gain = np.outer(np.arange(count), np.arange(count)).astype(np.float64)
    column_of = np.empty(count, np.int64)
    assign(gain.copy(), column_of)
    best = gain[linear_sum_assignment(gain, maximize=True)].sum()
    assert sorted(column_of.tolist()) == list(range(count))
    assert gain[np.arange(count), column_of].sum() == pytest.approx(best, rel=1e-12)
