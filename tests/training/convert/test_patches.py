"""The GEMM form of a layer reproduces the layer."""

from math import ceil

import pytest
import torch
from torch import nn

from tnm_pipeline.training.convert.patches import count_rows, gemm_rows, output_size
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
    "pointwise, stride": nn.Conv2d(4, 6, 1, stride=(2, 3), padding=1),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch on even kernels: it pads unevenly
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("entries", [1, 1 << 22])
@pytest.mark.parametrize("every", [1, 3, 7])
@torch.no_grad()
def test_convolution(name: str, entries: int, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnm_pipeline.training.convert.patches.ENTRIES_AT_ONCE", entries)
    conv = CONVOLUTIONS[name].double()
    images = torch.randn(3, 4, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = conv(images)
    slices = list(gemm_rows(conv, images, outputs, every=every))
    assert len(slices) == (3 if entries == 1 else 1)
    rows = []
    for x, y in slices:
        product = x @ to_gemm(conv.weight).T
        torch.testing.assert_close(product if conv.bias is None else product + conv.bias, y)
        assert y is not None
        rows += list(y)
    assert output_size(conv, images) == tuple(outputs.shape[2:])
    positions = range(0, outputs.shape[2] * outputs.shape[3], every)
    expected = [
        outputs[image, :, place // outputs.shape[3], place % outputs.shape[3]]
        for image in range(3)
        for place in positions
    ]
    assert torch.equal(torch.stack(rows), torch.stack(expected))
    assert count_rows(conv, images, every=every) == len(rows) == 3 * ceil(outputs[0, 0].numel() / every)


@torch.no_grad()
def test_convolution_of_one_image_without_a_batch_axis() -> None:
    conv = nn.Conv2d(4, 6, 3).double()
    image = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    [(x, y)] = gemm_rows(conv, image, conv(image))
    assert conv.bias is not None
    torch.testing.assert_close(x @ to_gemm(conv.weight).T + conv.bias, y)
    assert count_rows(conv, image) == 9


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,), (2, 1, 3, 8)])
@torch.no_grad()
def test_linear_on_any_number_of_axes(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(8, 6, bias=False).double()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    [(x, y)] = gemm_rows(linear, inputs, linear(inputs))
    assert x.shape == (inputs.numel() // 8, 8)
    assert count_rows(linear, inputs) == len(x)
    torch.testing.assert_close(x @ linear.weight.T, y)


@torch.no_grad()
def test_padding_is_left_out_where_the_input_has_the_positions() -> None:
    linear = nn.Linear(8, 6)
    inputs = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[True, False, True], [False, True, True]])
    [(x, y)] = gemm_rows(linear, inputs, linear(inputs), real)
    kept = [(0, 0), (0, 2), (1, 1), (1, 2)]
    assert torch.equal(x, torch.stack([inputs[place] for place in kept]))
    assert y is not None
    torch.testing.assert_close(y, linear(x))
    assert count_rows(linear, inputs, real) == 4
    pooled = inputs[:, 0]  # a layer after pooling has no positions any more
    [(x, _)] = gemm_rows(linear, pooled, None, real)
    assert torch.equal(x, pooled)
    assert count_rows(linear, pooled, real) == 2


def test_half_precision_becomes_single_and_double_stays() -> None:
    linear = nn.Linear(8, 6)
    for given, taken in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        [(x, _)] = gemm_rows(linear, torch.ones(3, 8, dtype=given))
        assert x.dtype == taken


def test_many_rows_come_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnm_pipeline.training.convert.patches.ENTRIES_AT_ONCE", 30)
    inputs = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    slices = [x for x, _ in gemm_rows(nn.Linear(8, 6), inputs)]
    assert [len(x) for x in slices] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(slices), inputs)
