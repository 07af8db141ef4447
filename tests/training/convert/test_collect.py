"""A layer's sums against their definition, in float64 and sample by sample."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.convert.batch import CalibrationError
from tnm_pipeline.training.convert.collect import Collector, Seen
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.patches import stride
from tnm_pipeline.training.layout import to_gemm

LAYERS: dict[str, tuple[Callable[[], nn.Linear | nn.Conv2d], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (20, 8)),
    "linear on sequences, no bias": (lambda: nn.Linear(8, 6, bias=False), (4, 5, 8)),
    "linear, more outputs": (lambda: nn.Linear(8, 10), (20, 8)),
    "pointwise, more outputs": (lambda: nn.Conv2d(4, 6, 1, stride=2), (3, 4, 5, 6)),
    "pointwise": (lambda: nn.Conv2d(8, 6, 1), (3, 8, 5, 6)),
    "stride, padding": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 7, 8)),
    "dilation": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(2, 1), padding=(2, 0)), (3, 4, 7, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 7, 8)),
}


def rows_of(layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """What each output multiplies with, found from outputs alone: those of one-hot weights."""
    width = to_gemm(layer.weight).shape[1]
    probe = copy.deepcopy(layer).double()
    columns = []
    for column in range(width):
        probe.weight.zero_()
        if isinstance(probe, nn.Linear):
            probe.weight[0, column] = 1
        else:
            side = probe.in_channels
            height, across = divmod(column // side, probe.kernel_size[1])
            probe.weight[0, column % side, height, across] = 1
        output = probe(inputs.double())
        bias = 0 if probe.bias is None else probe.bias[0]
        columns.append((output[:, 0] if isinstance(probe, nn.Conv2d) else output[..., 0]).flatten() - bias)
    return torch.stack(columns, 1)


def inputs_of(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_sums_equal_their_definition(name: str, corrected: bool, workers: int) -> None:
    build, shape = LAYERS[name]
    layer = build()
    size = len(layer.weight)
    seen, wanted, given, corrections = [], [], [], []
    for seed in range(3):
        x, sparse_x = inputs_of(shape, seed), inputs_of(shape, seed + 10)
        correction = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(seed))
        correction *= corrected
        seen.append(Seen([x], [sparse_x], correction.clone if corrected else None))
        wanted.append(rows_of(layer, x))
        given.append(rows_of(layer, sparse_x))
        outputs = correction.movedim(1, -1) if isinstance(layer, nn.Conv2d) else correction
        corrections.append(outputs.reshape(-1, size).double())
    own, sequential = Collector(Group(workers=workers), sequential=True).collect("layer", layer, seen)
    base = to_gemm(layer.weight).double()
    x, sparse_x = torch.cat(wanted), torch.cat(given)
    compare(own, Objective.of(x, x @ base.T, base))
    target = x @ base.T + torch.cat(corrections)
    expected = Objective.of(sparse_x, target, base)
    # relative errors are relative to the dense layer's output, corrected or not
    expected = Objective(**{**vars(expected), "target_squares": (x @ base.T).square().sum(0)})
    compare(sequential, expected)
    weight = torch.randn(base.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    error = float((sparse_x @ weight.T + 0.1 - target).norm() / (x @ base.T).norm())
    assert sequential.relative_error(weight, torch.full((size,), 0.1)) == pytest.approx(error, rel=1e-5)


def compare(found: Objective, expected: Objective) -> None:
    assert found.samples == expected.samples
    for name in ("gram", "base", "residual_cross", "input_sum", "residual_sum", "residual_squares", "target_squares"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-4, msg=name)


@torch.no_grad()
def test_padding_does_not_count() -> None:
    layer = nn.Linear(8, 6)
    x, sparse_x = inputs_of((3, 5, 8), 0), inputs_of((3, 5, 8), 1)
    real = torch.arange(5) < torch.tensor([[2], [5], [1]])
    dropped = ~real[..., None]
    own, sequential = Collector(Group(), sequential=True).collect(
        "layer",
        layer,
        [Seen([x.masked_fill(dropped, 1e3)], [sparse_x.masked_fill(dropped, -1e3)], real=real)],
    )
    kept = [Seen([x[real]], [sparse_x[real]])]
    expected = Collector(Group(), sequential=True).collect("layer", layer, kept)
    assert own.samples == sequential.samples == 8
    compare(own, expected[0])
    compare(sequential, expected[1])


@torch.no_grad()
def test_every_call_counts() -> None:
    layer = nn.Linear(8, 6)
    calls = [inputs_of((5, 8), seed) for seed in range(2)]
    own, sequential = Collector(Group(), sequential=False).collect("layer", layer, [Seen(calls, calls)])
    assert own is sequential
    compare(own, Objective.of(torch.cat(calls), torch.cat(calls) @ layer.weight.T, layer.weight))


@torch.no_grad()
def test_layers_that_read_the_same_share_the_gram_matrix_and_others_do_not() -> None:
    collector = Collector(Group(), sequential=True)
    first, second = nn.Linear(8, 6), nn.Linear(8, 10)
    x, other = inputs_of((20, 8), 0), inputs_of((20, 8), 1)
    own, _ = collector.collect("first", first, [Seen([x], [x])])
    shared, _ = collector.collect("second", second, [Seen([x], [x])])
    assert shared.gram is own.gram
    squares = (x @ second.weight.T).square().sum(0).double()
    torch.testing.assert_close(shared.target_squares, squares, rtol=1e-5, atol=1e-5)
    for layer in (second, nn.Linear(8, 12)):
        _, sequential = collector.collect("layer", layer, [Seen([x], [other])])
        compare(sequential, Objective.of(other, x @ layer.weight.T, layer.weight))
    del x, other
    fresh = inputs_of((20, 8), 2)  # may take the place of a tensor that is gone
    own, _ = collector.collect("first", first, [Seen([fresh], [fresh])])
    torch.testing.assert_close(own.gram, (fresh.T @ fresh).double(), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_tensor_that_was_written_since_is_another_input() -> None:
    collector, layer = Collector(Group(), sequential=False), nn.Linear(8, 6)
    x = inputs_of((20, 8), 0)
    collector.collect("before", layer, [Seen([x], [x])])
    x[:, :4] = 0
    own, _ = collector.collect("after", layer, [Seen([x], [x])])
    compare(own, Objective.of(x, x @ layer.weight.T, layer.weight))


@torch.no_grad()
def test_a_linear_layer_does_not_share_what_a_convolution_cut() -> None:
    collector, layer = Collector(Group(), sequential=False), nn.Linear(8, 6)
    x = inputs_of((5, 8, 3, 8), 0)  # channels first for one, last for the other
    collector.collect("convolution", nn.Conv2d(8, 6, 1), [Seen([x], [x])])
    own, _ = collector.collect("linear", layer, [Seen([x], [x])])
    rows = x.flatten(0, 2)
    compare(own, Objective.of(rows, rows @ layer.weight.T, layer.weight))


@torch.no_grad()
def test_halves_are_the_own_objective_of_either_half() -> None:
    layer = nn.Linear(8, 6)
    parts = [inputs_of((20, 8), seed) for seed in range(4)]
    collector = Collector(Group(), sequential=True)
    collector.collect("layer", layer, [Seen([x], [x + 1], half=index % 2) for index, x in enumerate(parts)])
    halves = collector.halves(4)
    assert halves is not None
    for found, x in zip(halves, (torch.cat(parts[::2]), torch.cat(parts[1::2])), strict=True):
        compare(found, Objective.of(x, x @ layer.weight[:4].T, layer.weight[:4]))


@pytest.mark.parametrize("half", [0, 1])
@torch.no_grad()
def test_one_batch_has_no_halves(half: int) -> None:
    collector = Collector(Group(), sequential=False)
    x = inputs_of((20, 8), 0)
    collector.collect("layer", nn.Linear(8, 6), [Seen([x], [x], half=half)])
    assert collector.halves(4) is None


@pytest.mark.parametrize("workers", [2, 4])
@torch.no_grad()
def test_workers_change_no_bit(workers: int) -> None:
    layer = nn.Conv2d(4, 6, 3)
    seen = [Seen([inputs_of((3, 4, 7, 8), seed)], [inputs_of((3, 4, 7, 8), seed + 10)]) for seed in range(6)]
    first = Collector(Group(), sequential=True).collect("layer", layer, seen)
    second = Collector(Group(workers=workers), sequential=True).collect("layer", layer, seen)
    for one, other in zip(first, second, strict=True):
        for name, value in vars(one).items():
            assert value == getattr(other, name) if name == "samples" else torch.equal(value, getattr(other, name))


@pytest.mark.parametrize("rows", [1, 10, 1 << 17, (1 << 17) * 2, (1 << 17) * 3 + 5, 10**7])
def test_stride_is_odd_and_leaves_enough_rows(rows: int) -> None:
    every = stride(rows)
    assert every % 2 == 1
    assert rows // every >= min(rows, (1 << 17) * 2 // 3)
    assert rows / every <= (1 << 17) * 3


@torch.no_grad()
def test_some_positions_stand_for_all_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnm_pipeline.training.convert.patches._ENOUGH_ROWS", 3000)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    maps = F.interpolate(inputs_of((40, 4, 4, 4), 0), size=16, mode="bilinear")
    seen = [Seen([maps], [maps])]
    few, _ = Collector(Group(), sequential=False).collect("layer", layer, seen)
    assert few.samples == 40 * 86  # each third of 256
    by_hand = rows_of(layer, maps).view(40, 256, 36)[:, ::3].reshape(-1, 36)
    compare(few, Objective.of(by_hand, by_hand @ to_gemm(layer.weight).double().T, to_gemm(layer.weight)))
    places = {(place // 16, place % 16) for place in range(0, 256, 3)}
    assert {row for row, _ in places} == {column for _, column in places} == set(range(16))


@torch.no_grad()
def test_an_input_without_any_row_adds_nothing() -> None:
    layer, x = nn.Linear(8, 6), inputs_of((20, 8), 0)
    own, _ = Collector(Group(), sequential=True).collect("layer", layer, [Seen([x[:0]], [x[:0]]), Seen([x], [x])])
    compare(own, Objective.of(x, x @ layer.weight.T, layer.weight))


@pytest.mark.parametrize("side", ["dense", "sparse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_overflow_inside_the_model_names_the_layer(side: str, value: float) -> None:
    x, bad = torch.ones(4, 8), torch.full((4, 8), value)
    seen = [Seen([x], [x]), Seen([bad if side == "dense" else x], [bad if side == "sparse" else x])]
    with pytest.raises(CalibrationError, match="layer some meets NaN or Inf on the calibration data"):
        Collector(Group(), sequential=True).collect("some", nn.Linear(8, 6), seen)


@torch.no_grad()
def test_other_refusals() -> None:
    collector, layer, x = Collector(Group(), sequential=True), nn.Linear(8, 6), torch.ones(4, 8)
    with pytest.raises(CalibrationError, match="layer idle does not run on the calibration data"):
        collector.collect("idle", layer, [Seen([], [])])
    with pytest.raises(CalibrationError, match="layer odd runs 1 times in the dense model and 2 times in the convert"):
        collector.collect("odd", layer, [Seen([x], [x, x])])
    with pytest.raises(CalibrationError, match=r"layer odd .*or on other shapes"):
        collector.collect("odd", layer, [Seen([x], [x[:2]])])
