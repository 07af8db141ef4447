"""The ten candidates against all ninety masks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tnm_pipeline.training.layout import from_blocks, to_blocks
from tnm_pipeline.training.masks.exact.cpu import solve_on_cpu
from tnm_pipeline.training.pattern import Pattern


def solve_blocks(blocks: Tensor) -> Tensor:
    """(B, 4, 4) masks, solved side by side."""
    matrix = from_blocks(blocks, 4, 4 * len(blocks))
    return to_blocks(solve_on_cpu(matrix, Pattern(2, 4, transposable=True))[0], 4)


def kept(blocks: Tensor, mask: Tensor) -> Tensor:
    return (blocks.double() * mask).sum((1, 2))


def best_kept(blocks: Tensor, ninety: Tensor) -> Tensor:
    return (blocks.double().reshape(-1, 1, 16) * ninety.reshape(1, -1, 16)).sum(2).amax(1)


def hard_blocks() -> Tensor:
    """1,620 blocks: random, tied, sparse, zero, fp16 values, tiny and huge."""
    g = torch.Generator().manual_seed(0)
    random = torch.randn(600, 4, 4, generator=g).abs()
    tied = torch.randint(0, 3, (500, 4, 4), generator=g).float()
    sparse = random[:200] * (torch.rand(200, 4, 4, generator=g) > 0.7)
    half = torch.randn(200, 4, 4, generator=g).abs().half().float()
    extreme = torch.cat([torch.zeros(20, 4, 4), random[:50] * 1e-30, random[:50] * 1e30])
    return torch.cat([random, tied, sparse, half, extreme])


def test_there_are_ninety_masks(ninety: Tensor) -> None:
    assert len(ninety) == 90


def test_equal_to_brute_force_over_the_ninety(ninety: Tensor) -> None:
    blocks = hard_blocks()
    mask = solve_blocks(blocks)
    assert bool((mask.sum(1) == 2).all())
    assert bool((mask.sum(2) == 2).all())
    torch.testing.assert_close(kept(blocks, mask), best_kept(blocks, ninety), rtol=2**-22, atol=0)


def test_each_of_the_ninety_is_found_when_it_is_the_only_best(ninety: Tensor) -> None:
    assert torch.equal(solve_blocks(ninety.float()).double(), ninety)


@settings(max_examples=200, deadline=None)
@given(values=st.lists(st.integers(0, 6), min_size=16, max_size=16))
def test_adversarial_ties(ninety: Tensor, values: list[int]) -> None:
    block = torch.tensor(values, dtype=torch.float32).reshape(1, 4, 4)
    assert kept(block, solve_blocks(block)) == best_kept(block, ninety)
