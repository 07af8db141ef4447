"""The GEMM form of a layer reproduces the layer."""

import pytest
import torch
from torch import nn

from tnm_pipeline.training.convert.patches import gemm_rows
from tnm_pipeline.training.layout import to_gemm

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "stride, padding": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilation": nn.Conv2d(4, 6, 3, dilation=2, padding=2, bias=False),
    "uneven": nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(0, 2), dilation=(3, 1)),
    "same, even kernel": nn.Conv2d(4, 6, (4, 2), padding="same"),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"),
    "pointwise": nn.Conv2d(4, 6, 1),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch on even kernels: it pads unevenly
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("entries", [1, 1 << 22])
@torch.no_grad()
def test_convolution(name: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnm_pipeline.training.convert.patches._ENTRIES_AT_ONCE", entries)
    conv = CONVOLUTIONS[name].double()
    images = torch.randn(3, 4, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slices = list(gemm_rows(conv, images, conv(images)))
    assert len(slices) == (3 if entries == 1 else 1)
    for x, y in slices:
        product = x @ to_gemm(conv.weight).T
        torch.testing.assert_close(product if conv.bias is None else product + conv.bias, y)


@torch.no_grad()
def test_convolution_of_one_image_without_a_batch_axis() -> None:
    conv = nn.Conv2d(4, 6, 3).double()
    image = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    [(x, y)] = gemm_rows(conv, image, conv(image))
    assert conv.bias is not None
    torch.testing.assert_close(x @ to_gemm(conv.weight).T + conv.bias, y)


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,), (2, 1, 3, 8)])
@torch.no_grad()
def test_linear_on_any_number_of_axes(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(8, 6, bias=False).double()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    [(x, y)] = gemm_rows(linear, inputs, linear(inputs))
    assert x.shape == (inputs.numel() // 8, 8)
    torch.testing.assert_close(x @ linear.weight.T, y)
