"""The 2-approximation against its definition in loops and brute force; its completion to exactly N."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnm_pipeline.training.masks.greedy import complete_blocks, keep_batched, keep_compiled, solve_greedy

Most = Callable[[Tensor], Tensor]

SHAPES = [(1, 2), (1, 4), (2, 4), (3, 4), (2, 3), (4, 8), (5, 12), (8, 16), (16, 32)]
small_shapes = st.sampled_from([(1, 4), (2, 4), (3, 4), (2, 3), (3, 5), (4, 8)])


def kept(blocks: Tensor, mask: Tensor) -> Tensor:
    return (blocks.double() * mask).sum((1, 2))


def walk(block: Tensor, n: int) -> Tensor:
    """Algorithm 1 as one would say it: heaviest to lightest, keep while row and column have room."""
    m = len(block)
    values = block.tolist()
    cells = sorted(product(range(m), repeat=2), key=lambda cell: -values[cell[0]][cell[1]])  # stable: first of ties
    mask = torch.zeros(m, m, dtype=torch.bool)
    for row, column in cells:
        if mask[row].sum() < n and mask[:, column].sum() < n:
            mask[row, column] = True
    return mask


def hard_blocks(m: int, count: int = 37) -> Tensor:
    """Random, tied, sparse, zero, half-precision, denormal and huge blocks; batches that lanes do not divide."""
    g = torch.Generator().manual_seed(m)
    random = torch.randn(count, m, m, generator=g).abs()
    tied = torch.randint(0, 3, (count, m, m), generator=g).float()
    sparse = random * (torch.rand(count, m, m, generator=g) > 0.7)
    denormal = torch.randint(0, 50, (count, m, m), generator=g).float() * 2.0**-149
    huge = random.clamp(max=3) * 1e38
    return torch.cat([random, tied, sparse, torch.zeros(3, m, m), random.half().float(), denormal, huge])


@st.composite
def blocks_and_n(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A block of few distinct values, so that ties and stuck rows are common, or of any values."""
    n, m = draw(small_shapes)
    values = draw(st.sampled_from([st.integers(0, 3), st.floats(0, 1, width=32)]))
    weights = draw(st.lists(values, min_size=m * m, max_size=m * m))
    return torch.tensor(weights, dtype=torch.float32).reshape(1, m, m), n


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_greedy_is_the_walk_from_heavy_to_light(n: int, m: int) -> None:
    blocks = hard_blocks(m, count=37 if m < 16 else 5)
    expected = torch.stack([walk(block, n) for block in blocks])
    assert torch.equal(keep_compiled(blocks, n), expected)
    assert torch.equal(keep_batched(blocks, n), expected)


@settings(max_examples=200, deadline=None)
@given(blocks_and_n())
def test_greedy_is_the_walk_on_any_block(case: tuple[Tensor, int]) -> None:
    block, n = case
    assert torch.equal(solve_greedy(block, n)[0], walk(block[0], n))


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_compiled_loops_and_tensor_ops_keep_the_same(n: int, m: int) -> None:
    blocks = torch.randn(1000, m, m, generator=torch.Generator().manual_seed(0)).abs()
    mask = keep_compiled(blocks, n)
    assert torch.equal(mask, keep_batched(blocks, n))
    assert int(mask.sum(1).max()) <= n
    assert int(mask.sum(2).max()) <= n


@pytest.mark.gpu
@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_masks_of_a_gpu_are_those_of_the_cpu(n: int, m: int, complete: bool) -> None:
    blocks = hard_blocks(m)
    assert torch.equal(solve_greedy(blocks.cuda(), n, complete).cpu(), solve_greedy(blocks, n, complete))


def test_the_first_of_tied_weights_wins() -> None:
    equal = torch.ones(1, 4, 4)
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    assert torch.equal(solve_greedy(equal, 2)[0], expected)
    assert torch.equal(solve_greedy(equal * -0.0, 2)[0], expected)


def test_a_block_does_not_depend_on_its_neighbours() -> None:
    blocks = hard_blocks(8)
    together = solve_greedy(blocks, 4, complete=True)
    assert torch.equal(together, torch.cat([solve_greedy(block[None], 4, complete=True) for block in blocks]))


def test_no_blocks_give_no_masks() -> None:
    assert solve_greedy(torch.zeros(0, 4, 4), 2, complete=True).shape == (0, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_and_stride(dtype: torch.dtype) -> None:
    blocks = torch.rand(20, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(solve_greedy(blocks, 2), solve_greedy(blocks.float(), 2))
    assert torch.equal(solve_greedy(blocks.mT, 2), solve_greedy(blocks.mT.contiguous(), 2))


def test_the_weights_are_left_alone() -> None:
    blocks = torch.rand(4, 4, 4, requires_grad=True)
    before = blocks.detach().clone()
    solve_greedy(blocks, 2, complete=True)
    assert torch.equal(blocks, before)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.floats(0, 1, width=32), min_size=16, max_size=16))
def test_greedy_keeps_at_least_half_of_the_best_with_at_most_two(most_of_two: Most, values: list[float]) -> None:
    block = torch.tensor(values, dtype=torch.float32).reshape(1, 4, 4)
    assert float(kept(block, solve_greedy(block, 2))) >= 0.5 * float(most_of_two(block)) - 1e-12


def test_the_bound_of_one_half_is_nearly_tight(most_of_two: Most) -> None:
    """Greedy takes the four slightly heavier weights that block two heavy pairs each."""
    e = 1e-3
    block = torch.tensor([[[1 + e, 1 + e, 1, 1], [1 + e, 1 + e, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]])
    assert 0.5 <= float(kept(block, solve_greedy(block, 2))) / float(most_of_two(block)) < 0.501


def is_full(mask: Tensor, n: int) -> bool:
    return bool((mask.sum(1) == n).all() and (mask.sum(2) == n).all())


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_completion_fills_every_row_and_column(n: int, m: int) -> None:
    blocks = torch.cat([hard_blocks(m), torch.randn(300, m, m, generator=torch.Generator().manual_seed(2)).abs()])
    greedy, completed = solve_greedy(blocks, n), solve_greedy(blocks, n, complete=True)
    assert is_full(completed, n)
    full = (greedy.sum(2) == n).all(1)
    assert torch.equal(completed[full], greedy[full])
    assert bool(full.all()) == (n == 1)  # with one to keep, a kept weight fills its row: nothing gets stuck


@settings(max_examples=300, deadline=None)
@given(blocks_and_n())
def test_completion_fills_any_block(case: tuple[Tensor, int]) -> None:
    block, n = case
    assert is_full(solve_greedy(block, n, complete=True), n)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_completion_fills_any_maximal_mask(data: st.DataObject) -> None:
    """Its guarantee rests on maximality alone: masks walked in one order, filled by the weights of another."""
    n, m = data.draw(small_shapes)
    order = torch.tensor(data.draw(st.permutations(range(m * m))), dtype=torch.float32).reshape(1, m, m)
    mask = solve_greedy(order, n)
    complete_blocks(np.zeros((1, m, m), np.float32), n, mask.numpy())
    assert is_full(mask, n)


def test_completion_fills_blocks_too_large_for_float32() -> None:
    blocks = torch.rand(50, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 1e300
    assert is_full(solve_greedy(blocks, 2, complete=True), 2)


def test_completion_takes_the_exchange_that_gains_most() -> None:
    """Row 3 and column 3 are one short, and (3, 3) is kept: try every exchange by hand."""
    g = torch.Generator().manual_seed(4)
    stuck = 0
    for block in torch.randn(300, 4, 4, generator=g).abs():
        greedy = solve_greedy(block[None], 2)[0]
        short_rows, short_columns = (greedy.sum(1) < 2).nonzero()[:, 0], (greedy.sum(0) < 2).nonzero()[:, 0]
        if len(short_rows) != 1:
            continue
        stuck += 1
        r, c = int(short_rows[0]), int(short_columns[0])
        exchanges = []
        for row, column in product(range(4), repeat=2):
            if greedy[row, column] and not greedy[r, column] and not greedy[row, c]:
                after = greedy.clone()
                after[row, column] = False
                after[r, column] = after[row, c] = True
                exchanges.append(float(kept(block[None], after[None])))
        completed = solve_greedy(block[None], 2, complete=True)
        assert float(kept(block[None], completed)) == pytest.approx(max(exchanges), rel=1e-12)
    assert stuck > 20


def test_completion_can_cost_magnitude(most_of_two: Most) -> None:
    """Row 3 and column 3 weigh nothing, and the rest is full without them: to fill them, a weight has to go."""
    block = torch.zeros(1, 4, 4)
    block[0, :3, :3] = torch.eye(3) + torch.eye(3).roll(1, 0)
    greedy, completed = solve_greedy(block, 2), solve_greedy(block, 2, complete=True)
    assert float(kept(block, greedy)) == float(most_of_two(block)) == 6
    assert float(kept(block, completed)) == 5
