"""The upper bound against brute force and min-cost flow: never below the optimum, and close to it."""

from collections.abc import Callable
from itertools import product

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnm_pipeline.training.masks import bound
from tnm_pipeline.training.masks.bound import upper_bound, upper_bound_of_blocks
from tnm_pipeline.training.pattern import Pattern

Most = Callable[[Tensor], Tensor]

ROUNDING = 1e-12  # of the float64 sums, relative


def gaussian(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).abs()


def most_by_flow(block: Tensor, n: int) -> int:
    """The most that a mask with at most N per row and column keeps of integer weights."""
    m = len(block)
    graph = nx.DiGraph()
    graph.add_node("source", demand=-n * m)
    graph.add_node("sink", demand=n * m)
    graph.add_edge("source", "sink", capacity=n * m, weight=0)  # what is not kept
    for i, row in enumerate(block.int().tolist()):
        graph.add_edge("source", ("row", i), capacity=n)
        graph.add_edge(("column", i), "sink", capacity=n)
        for j, weight in enumerate(row):
            graph.add_edge(("row", i), ("column", j), capacity=1, weight=-weight)
    return -int(nx.min_cost_flow_cost(graph))


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(st.integers(0, 4) | st.floats(0, 1e6, width=32), min_size=16, max_size=16),
    sweeps=st.sampled_from([0, 1, 2, 8]),
)
def test_never_below_the_optimum_of_two_in_four(most_of_two: Most, values: list[float], sweeps: int) -> None:
    block = torch.tensor(values, dtype=torch.float32).reshape(1, 4, 4)
    assert float(upper_bound_of_blocks(block, 2, sweeps)) >= float(most_of_two(block)) * (1 - ROUNDING)


@pytest.mark.parametrize("spread", [2, 20, 1000])
@pytest.mark.parametrize(
    ("n", "m", "count"), [(1, 4, 40), (4, 8, 40), (2, 8, 40), (5, 12, 20), (8, 16, 10), (16, 32, 2)]
)
def test_never_below_min_cost_flow(n: int, m: int, count: int, spread: int) -> None:
    blocks = torch.randint(0, spread + 1, (count, m, m), generator=torch.Generator().manual_seed(spread)).float()
    best = torch.tensor([most_by_flow(block, n) for block in blocks], dtype=torch.float64)
    for sweeps in (1, 8):
        assert bool((upper_bound_of_blocks(blocks, n, sweeps) >= best * (1 - ROUNDING)).all())


def test_close_to_the_optimum_of_gaussian_weights_at_2_4(most_of_two: Most) -> None:
    blocks = gaussian(2000, 4, 4)
    excess = upper_bound_of_blocks(blocks, 2) / most_of_two(blocks) - 1
    assert float(excess.mean()) < 1e-4
    assert float(excess.max()) < 1e-2


@pytest.mark.parametrize(
    ("n", "m", "count"), [(1, 4, 60), (3, 4, 60), (2, 3, 60), (4, 8, 40), (8, 16, 10), (16, 32, 2)]
)
def test_close_to_min_cost_flow_of_gaussian_weights(n: int, m: int, count: int) -> None:
    blocks = (gaussian(count, m, m) * 10000).round()
    best = torch.tensor([most_by_flow(block, n) for block in blocks], dtype=torch.float64)
    excess = upper_bound_of_blocks(blocks, n) / best - 1
    assert float(excess.mean()) < 1e-3
    assert float(excess.max()) < 1e-2


def test_covers_masks_with_fewer_than_n(ninety: Tensor) -> None:
    """Exactly two per row and column keep 5 of these six ones: row 3 and column 3 have to be filled."""
    block = torch.zeros(1, 4, 4)
    block[0, :3, :3] = torch.eye(3) + torch.eye(3).roll(1, 0)
    assert float((ninety * block).sum((1, 2)).max()) == 5
    assert float(upper_bound_of_blocks(block, 2)) == pytest.approx(6)


def test_more_sweeps_never_loosen_it() -> None:
    blocks = gaussian(100, 8, 8)
    bounds = torch.stack([upper_bound_of_blocks(blocks, 4, sweeps) for sweeps in range(12)])
    assert torch.equal(bounds[0], blocks.double().sum((1, 2)))
    assert bool((bounds.diff(dim=0) <= 0).all())


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**50])
def test_scales_with_the_weights(scale: float) -> None:
    blocks = gaussian(50, 8, 8)
    assert torch.equal(upper_bound_of_blocks(blocks * scale, 4), upper_bound_of_blocks(blocks, 4) * scale)


def test_zero_blocks_and_none() -> None:
    assert torch.equal(upper_bound_of_blocks(torch.zeros(3, 4, 4), 2), torch.zeros(3, dtype=torch.float64))
    assert upper_bound_of_blocks(torch.zeros(0, 4, 4), 2).shape == (0,)
    assert upper_bound(torch.zeros(8, 8), Pattern(2, 4, transposable=True)) == 0
    assert upper_bound(torch.zeros(0, 8), Pattern(2, 4, transposable=True)) == 0


def test_chunks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(36, 44)
    patterns = [Pattern(2, 4), Pattern(2, 4, transposable=True)]
    whole = [upper_bound(weight, pattern) for pattern in patterns]
    monkeypatch.setattr(bound, "_WEIGHTS_AT_ONCE", 50)
    assert [upper_bound(weight, pattern) for pattern in patterns] == pytest.approx(whole, rel=ROUNDING)


def test_row_wise_it_is_the_optimum() -> None:
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    best = sum(sum(sorted(map(abs, row[j : j + 4]))[-2:]) for row in weight.double().tolist() for j in range(0, 12, 4))
    assert upper_bound(weight, Pattern(2, 4)) == pytest.approx(best, rel=ROUNDING)


@pytest.mark.parametrize("shape", [(4, 4), (3, 2), (1, 4), (6, 7), (4, 3, 1, 2)])
def test_is_the_sum_over_the_padded_blocks_of_the_gemm_matrix(most_of_two: Most, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    matrix = weight if len(shape) == 2 else weight.permute(0, 2, 3, 1).reshape(shape[0], -1)
    best = 0.0
    for i, j in product(range(0, matrix.shape[0], 4), range(0, matrix.shape[1], 4)):
        block = torch.zeros(4, 4)
        tile = matrix[i : i + 4, j : j + 4].abs()
        block[: tile.shape[0], : tile.shape[1]] = tile
        best += float(most_of_two(block))
    assert best * (1 - ROUNDING) <= upper_bound(weight, Pattern(2, 4, transposable=True)) <= best * 1.001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_any_float_type_sign_and_stride(dtype: torch.dtype, text: str) -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    pattern = Pattern.parse(text)
    expected = upper_bound(weight.double().abs(), pattern)
    assert upper_bound(weight.repeat_interleave(2, 1)[:, ::2].requires_grad_(), pattern) == pytest.approx(
        expected, rel=ROUNDING
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        upper_bound(weight, Pattern(2, 4, transposable=True))
