"""What a mask update says of itself."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.training.loops import EVERYTHING, STATIC, sgd, small_net
from tnm_pipeline.training.masks.change import count_change
from tnm_pipeline.training.sparsify import Sparsifier
from tnm_pipeline.training.telemetry import Refresh, compare


def test_a_refresh_tells_what_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    tile = torch.tensor([[2.0, 2, 1, 1], [2, 2, 1, 1], [1, 1, 2, 2], [1, 1, 2, 2]])
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(tile)
        model.get_parameter("1.weight").copy_(tile.repeat(2, 1))
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", STATIC, selection=EVERYTHING)
    with torch.no_grad():
        model.get_parameter("1.weight")[4:].copy_(tile.flip(0))  # all 16 entries of one tile of 3 change sides
    began = time.perf_counter()
    first = sparsifier.refresh()
    second = sparsifier.refresh()
    elapsed = time.perf_counter() - began
    assert sparsifier.telemetry == [first, second]
    assert [replace(refresh, seconds=0, share=0) for refresh in (first, second)] == [
        Refresh(step=0, flip_rate=16 / 48, kept_magnitude=48 / 72, density=0.5, seconds=0, share=0),
        Refresh(step=0, flip_rate=0, kept_magnitude=48 / 72, density=0.5, seconds=0, share=0),
    ]
    assert 0 < first.seconds < elapsed
    assert 0 < second.seconds < elapsed


def test_weights_that_are_all_zero_keep_all_of_their_magnitude() -> None:
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight)
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", STATIC, selection=EVERYTHING)
    assert sparsifier.refresh().kept_magnitude == 1


def test_the_share_is_of_the_time_since_the_update_before() -> None:
    model = small_net()
    latest = time.perf_counter()  # before which the time surely does not count
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", STATIC)
    for pause in (0.05, 0.02):
        time.sleep(pause)
        before = time.perf_counter()
        refresh = sparsifier.refresh()
        assert refresh.seconds / (time.perf_counter() - latest) < refresh.share < refresh.seconds / pause
        latest = before


def test_a_resumed_training_counts_from_when_it_was_loaded() -> None:
    model = small_net()
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", STATIC)
    sparsifier.refresh()
    state = sparsifier.state_dict()
    time.sleep(0.1)
    began = time.perf_counter()
    sparsifier.load_state_dict(state)
    refresh = sparsifier.refresh()
    assert refresh.share > refresh.seconds / (time.perf_counter() - began)
    assert sparsifier.telemetry[0].share == state["telemetry"][0]["share"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (12, 8, 3, 3), (1, 5), (70, 300), (0, 4)])
def test_the_sums_are_those_of_plain_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g).to(dtype)
    before, after = torch.rand(shape, generator=g) < 0.5, torch.rand(shape, generator=g) < 0.3
    if weight.dim() == 4:  # as after model.to(memory_format=torch.channels_last)
        weight, after = (part.contiguous(memory_format=torch.channels_last) for part in (weight, after))
    magnitude = weight.double().abs()
    expected = torch.tensor(
        [
            int((before != after).sum()),
            int(after.sum()),
            after.numel(),
            float(magnitude[after].sum()),
            float(magnitude.sum()),
        ],
        dtype=torch.float64,
    )
    found = compare(weight, before, after)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(found[:3], expected[:3])


def test_the_mean_of_a_large_weight_does_not_drift() -> None:
    weight, mask = torch.full((1 << 21,), 0.1), torch.ones(1 << 21, dtype=torch.bool)
    _, kept, kept_sum, whole = count_change(weight, mask, mask)
    assert kept == 1 << 21
    assert kept_sum == whole == pytest.approx(0.1 * (1 << 21), rel=1e-6)
