"""The pull of pruned weights, compiled, against its definition in plain torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tnm_pipeline.training.kernels.pull import pull

SHAPES = [(8, 12), (7, 5), (3, 4, 3, 3), (1,), (0, 4), (3, 70_001)]


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, a weight and a mask."""
    g = torch.Generator().manual_seed(0)
    gradient, weight = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    return gradient, weight, torch.rand(shape, generator=g) < 0.5


def defined(gradient: Tensor, weight: Tensor, mask: Tensor, strength: float) -> Tensor:
    return torch.where(mask, gradient, (gradient.double() + strength * weight.double()).to(gradient.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_its_definition_in_every_format(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gradient, weight, mask = case(shape, dtype)
    expected = defined(gradient, weight, mask, 5e-3)
    before = weight.clone()
    pull(gradient, weight, mask, 5e-3)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_strides_need_not_agree(changed: int) -> None:
    parts = case((8, 4, 3, 3))
    expected = defined(*parts, strength=0.25)
    turned = [part.contiguous(memory_format=torch.channels_last) for part in parts]
    gradient, weight, mask = (turned[k] if k == changed else part for k, part in enumerate(parts))
    pull(gradient, weight, mask, 0.25)
    torch.testing.assert_close(gradient, expected)


def test_a_weight_of_another_format_is_pulled_as_well() -> None:
    gradient, weight, mask = case((8, 12))
    expected = defined(gradient, weight, mask, 0.25)
    pull(gradient, weight.double(), mask, 0.25)
    torch.testing.assert_close(gradient, expected)


@given(st.integers(0, 3000), st.floats(1e-6, 10.0), st.integers(0, 3000))
def test_only_the_part_that_is_given_changes_by_the_bits_of_plain_torch(size: int, strength: float, first: int) -> None:
    gradient, weight, mask = case((3000,))
    expected = gradient.clone()
    part = slice(first, first + size)
    expected[part].addcmul_(weight[part], (~mask[part]).view(torch.uint8), value=strength)
    pull(gradient[part], weight[part], mask[part], strength)
    assert torch.equal(gradient, expected)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            gradient, weight, mask = case((600, 700))
            pull(gradient, weight, mask, 5e-3)
            results.append(gradient)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
