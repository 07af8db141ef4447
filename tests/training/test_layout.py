"""The GEMM form of weights against the product that it stands for."""

import pytest
import torch
from torch.nn import functional as F

from tnm_pipeline.training.layout import from_blocks, from_gemm, pad_to_multiple, to_blocks, to_gemm


@pytest.mark.parametrize("shape", [(6, 10), (1, 1), (4, 8, 3, 3), (5, 3, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_gemm_form_round_trips(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = from_gemm(to_gemm(weight), weight.shape)
    assert torch.equal(back, weight)
    assert back.dtype == dtype
    assert back.is_contiguous()


def test_from_gemm_is_contiguous_for_a_cropped_matrix() -> None:
    assert from_gemm(torch.ones(8, 12)[:7, :9], torch.Size((7, 9))).is_contiguous()


def test_input_channels_run_fastest() -> None:
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    expected = [[int(weight[o, i, y, x]) for y in range(2) for x in range(2) for i in range(3)] for o in range(2)]
    assert to_gemm(weight).tolist() == expected


def test_the_product_with_the_gemm_form_is_the_convolution() -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 8, 3, 3, generator=g, dtype=torch.float64)
    images = torch.randn(2, 8, 7, 5, generator=g, dtype=torch.float64)
    patches = F.unfold(images, 3, padding=1).reshape(2, 8, 9, -1)  # (B, I, kernel positions, output positions)
    columns = patches.permute(0, 2, 1, 3).reshape(2, 72, -1)  # input channels fastest, as in the matrix
    product = (to_gemm(weight) @ columns).reshape(2, 6, 7, 5)
    torch.testing.assert_close(product, F.conv2d(images, weight, padding=1))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (1, 2, 3, 4, 5)])
def test_other_weights_have_no_gemm_form(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="no GEMM form"):
        to_gemm(torch.ones(shape))


@pytest.mark.parametrize(("shape", "padded"), [((7, 9), (8, 12)), ((8, 9), (8, 12)), ((1, 4), (4, 4))])
def test_padding_appends_zeros_only(shape: tuple[int, int], padded: tuple[int, int]) -> None:
    matrix = torch.ones(shape)
    result = pad_to_multiple(matrix, 4)
    assert result.shape == padded
    assert torch.equal(result[: shape[0], : shape[1]], matrix)
    assert int(result.sum()) == matrix.numel()


def test_nothing_to_pad_copies_nothing() -> None:
    matrix = torch.ones(8, 12)
    assert pad_to_multiple(matrix, 4) is matrix


def test_blocks_are_tiles_in_row_major_order() -> None:
    matrix = torch.arange(8 * 12).reshape(8, 12)
    blocks = to_blocks(matrix, 4)
    tiles = [matrix[y : y + 4, x : x + 4] for y in range(0, 8, 4) for x in range(0, 12, 4)]
    assert torch.equal(blocks, torch.stack(tiles))
    assert torch.equal(from_blocks(blocks, 8, 12), matrix)
