"""A matrix under its mask."""

import pytest
import torch
from torch import Tensor

from tnm_pipeline.training.masks import keep


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (7, 9), (2, 3, 4)])
def test_what_a_mask_leaves_out_is_zero(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.5
    kept = keep(matrix, mask)
    assert kept.dtype == dtype
    assert torch.equal(kept, torch.where(mask, matrix, 0.0))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def test_any_order_of_axes() -> None:
    matrix, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.5
    for one, other in ((transposed(matrix), mask), (matrix, transposed(mask)), (transposed(matrix), transposed(mask))):
        assert torch.equal(keep(one, other), torch.where(mask, matrix, 0.0))
