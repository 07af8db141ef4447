"""The solvers against brute force, networkx and each other."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnm_pipeline.training.masks import count_violations, solve
from tnm_pipeline.training.masks.exact import solve_2_4
from tnm_pipeline.training.masks.flow import solve_flow
from tnm_pipeline.training.masks.greedy import solve_greedy
from tnm_pipeline.training.pattern import Pattern


def every_mask(kept_per_row: set[int]) -> Tensor:
    """All 4x4 masks whose rows keep a number of `kept_per_row` and whose columns keep at most two."""
    rows = [
        [float(column in chosen) for column in range(4)]
        for kept in kept_per_row
        for chosen in combinations(range(4), kept)
    ]
    masks = torch.tensor(list(product(rows, repeat=4)), dtype=torch.float64)
    return masks[(masks.sum(1) <= 2).all(1)]


NINETY = every_mask({2})
AT_MOST = every_mask({0, 1, 2})


def hard_blocks() -> Tensor:
    """1,600 blocks: random, tied, sparse, zero, fp16 values, tiny and huge."""
    g = torch.Generator().manual_seed(0)
    random = torch.randn(600, 4, 4, generator=g).abs()
    tied = torch.randint(0, 3, (500, 4, 4), generator=g).float()
    sparse = random[:200] * (torch.rand(200, 4, 4, generator=g) > 0.7)
    half = torch.randn(200, 4, 4, generator=g).abs().half().float()
    extreme = torch.cat([torch.zeros(20, 4, 4), random[:40] * 1e-30, random[:40] * 1e30])
    return torch.cat([random, tied, sparse, half, extreme])


def best_kept(blocks: Tensor, masks: Tensor) -> Tensor:
    return (blocks.double().reshape(-1, 1, 16) * masks.reshape(1, -1, 16)).sum(2).amax(1)


def kept(blocks: Tensor, mask: Tensor) -> Tensor:
    return (blocks.double() * mask).sum((1, 2))


def test_there_are_ninety_masks() -> None:
    assert len(NINETY) == 90


def test_exact_2_4_equals_brute_force_over_the_ninety() -> None:
    blocks = hard_blocks()
    mask = solve_2_4(blocks)
    assert bool((mask.sum(1) == 2).all())
    assert bool((mask.sum(2) == 2).all())
    torch.testing.assert_close(kept(blocks, mask), best_kept(blocks, NINETY), rtol=3e-7, atol=0)


def test_exact_2_4_finds_each_of_the_ninety_when_it_is_the_only_best() -> None:
    assert torch.equal(solve_2_4(NINETY.float()).double(), NINETY)


def test_exact_2_4_equals_min_cost_flow() -> None:
    blocks = hard_blocks()[::8]
    torch.testing.assert_close(kept(blocks, solve_2_4(blocks)), kept(blocks, solve_flow(blocks, 2)), rtol=3e-7, atol=0)


@pytest.mark.slow
def test_exact_2_4_equals_min_cost_flow_on_every_hard_block() -> None:
    blocks = hard_blocks()
    assert len(blocks) > 1000
    torch.testing.assert_close(kept(blocks, solve_2_4(blocks)), kept(blocks, solve_flow(blocks, 2)), rtol=3e-7, atol=0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=16, max_size=16))
def test_exact_2_4_on_adversarial_ties(values: list[int]) -> None:
    block = torch.tensor(values, dtype=torch.float32).reshape(1, 4, 4)
    assert kept(block, solve_2_4(block)) == best_kept(block, NINETY)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=16, max_size=16))
def test_greedy_keeps_at_least_half_of_the_best_with_at_most_two(values: list[float]) -> None:
    block = torch.tensor(values, dtype=torch.float32).reshape(1, 4, 4)
    mask = solve_greedy(block, 2)
    assert bool((mask.sum(1) <= 2).all())
    assert bool((mask.sum(2) <= 2).all())
    assert float(kept(block, mask)) >= 0.5 * float(best_kept(block, AT_MOST)) - 1e-12


def test_greedy_bound_is_nearly_tight() -> None:
    """Greedy takes the four slightly heavier weights that block two heavy pairs each."""
    e = 1e-3
    block = torch.tensor(
        [[1 + e, 1 + e, 1, 1], [1 + e, 1 + e, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.float64
    ).unsqueeze(0)
    ratio = float(kept(block, solve_greedy(block, 2)) / best_kept(block, AT_MOST))
    assert 0.5 <= ratio < 0.501


@pytest.mark.parametrize("text", ["1:4-T", "3:4-T", "2:8-T", "4:8-T", "2:3-T"])
def test_flow_and_greedy_hold_any_pattern(text: str) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(2 * pattern.m, 3 * pattern.m, generator=torch.Generator().manual_seed(1))
    flow, greedy = solve(weight, pattern, "flow"), solve(weight, pattern, "greedy")
    assert torch.equal(solve(weight, pattern, "exact"), flow)
    assert count_violations(flow, pattern).of(pattern) == count_violations(greedy, pattern).of(pattern) == 0
    assert int(flow.sum()) == weight.numel() * pattern.n // pattern.m
    assert float((weight.abs() * greedy).sum() / (weight.abs() * flow).sum()) > 0.5


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (1, 1), (3, 64), (64, 2), (8, 8, 3, 3), (5, 6, 1, 3), (0, 4)])
def test_the_mask_holds_the_pattern_for_any_shape(text: str, shape: tuple[int, ...]) -> None:
    pattern = Pattern.parse(text)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mask = solve(weight, pattern)
    assert mask.shape == weight.shape
    assert count_violations(mask, pattern).of(pattern) == 0


def test_groups_of_a_convolution_run_along_input_channels() -> None:
    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(3))
    mask = solve(weight, Pattern(2, 4, transposable=True))
    for y, x in product(range(3), range(3)):
        tile = mask[:, :, y, x]
        assert bool((tile.reshape(8, 2, 4).sum(2) == 2).all())
        assert bool((tile.reshape(2, 4, 8).sum(1) == 2).all())


def test_a_mask_of_sixteen_consecutive_weights_is_not_transposable() -> None:
    """Folding 16 weights of one row into a 'block' leaves W 2:4 and its transpose broken."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(4)).abs()
    folded = solve_2_4(weight.reshape(-1, 4, 4)).reshape(64, 64)
    violations = count_violations(folded, Pattern(2, 4))
    assert violations.forward == 0
    assert violations.transposed > 200


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_and_stride(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    pattern = Pattern(2, 4, transposable=True)
    assert torch.equal(solve(weight, pattern), solve(weight.float(), pattern))
    strided = weight.repeat(1, 2)[:, ::2]
    assert torch.equal(solve(strided, pattern), solve(strided.contiguous(), pattern))


def test_chunks_do_not_change_the_mask() -> None:
    """A layer of more blocks than are solved at once equals its halves solved alone."""
    weight = torch.randn(1536, 1536, generator=torch.Generator().manual_seed(6))
    pattern = Pattern(2, 4, transposable=True)
    assert weight.numel() // 16 > 1 << 17
    halves = [solve(half, pattern) for half in torch.split(weight, 768)]
    assert torch.equal(solve(weight, pattern), torch.cat(halves))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        solve(weight, Pattern(2, 4))


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="exact, greedy, flow"):
        solve(torch.ones(4, 4), Pattern(2, 4), "magic")  # type: ignore[arg-type]  # what a careless caller does
