"""When calibration passes multiply in bfloat16, and how little of it is left in a conversion."""

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import ALL, conv_net, mlp, same_bits, vectors
from tnm_pipeline.training.convert import convert, layer_errors, mean_errors, precision, walk
from tnm_pipeline.training.convert.batch import Batch
from tnm_pipeline.training.convert.passes import Passes
from tnm_pipeline.training.convert.precision import prefers_bfloat16
from tnm_pipeline.training.convert.schedule import schedule
from tnm_pipeline.training.layout import PRUNABLE
from tnm_pipeline.training.pattern import Pattern


def capable(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.bfloat16) -> None:
    """Have a processor with these products."""
    monkeypatch.setattr(precision, "step_dtype", lambda _: dtype)


@torch.no_grad()
def prefers(model: nn.Module, batch: Batch) -> bool:
    stops = {name: (name,) for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    return prefers_bfloat16(model.eval(), stops, schedule(model, stops, batch), batch)


class Scattering(nn.Module):
    """Adds what a layer gives to a tensor that it has made itself: both must have one type."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.zeros_like(x).index_add_(0, torch.arange(len(x)), self.layer(x)))
        return result


class Cancelling(nn.Module):
    """Gives a layer the small difference of two large outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.layer(x + 100) - self.layer(x.flip(0) + 100))
        return result


def test_layers_on_floats_run_in_bfloat16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(1)[0]
    capable(monkeypatch)
    assert prefers(mlp(), x)
    capable(monkeypatch, torch.float32)
    assert not prefers(mlp(), x)


def test_where_it_could_do_harm_float32_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    capable(monkeypatch)
    x = vectors(1)[0]
    images = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not prefers(mlp().double(), x.double())
    assert not prefers(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)), x)
    assert not prefers(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(8 * 256, 4)), images)
    assert not prefers(conv_net(), images)
    assert not prefers(Scattering(), x)
    assert not prefers(Cancelling(), x)


@torch.no_grad()
def test_passes_use_the_weights_as_they_are_by_then() -> None:
    model, x = mlp(), vectors(1)[0]
    stops = {name: (name,) for name in ("0", "2")}
    with Passes(model, {0: x}, stops, {"0": 1, "2": 1}, {}, bfloat16=True) as passes:
        model.get_submodule("0").get_parameter("weight").mul_(-3)
        passes.leave("0")
        expected = model[:2](x)
        [given] = passes.passes[0].inputs_of("2")
    assert given.dtype == torch.bfloat16
    assert torch.linalg.vector_norm(given - expected) < 0.01 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("sequential", [True, False])
def test_errors_are_those_of_a_conversion_in_float32(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, found, models = vectors(8), {}, {}
    for rounded in (False, True):
        monkeypatch.setattr(walk, "prefers_bfloat16", lambda *_, rounded=rounded: rounded)
        models[rounded] = mlp()
        convert(models[rounded], Pattern(2, 4), batches, selection=ALL, sequential=sequential, reorder_channels=False)
        found[rounded] = mean_errors(layer_errors(mlp(), models[rounded], ["0", "2", "4"], vectors(4, seed=1)))
    assert not same_bits(models[False], models[True])
    assert found[True].own == pytest.approx(found[False].own, rel=0.02)
    assert found[True].inside == pytest.approx(found[False].inside, rel=0.02)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_no_bit(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capable(monkeypatch)
    one, many = mlp(), mlp()
    for model, count in ((one, 1), (many, workers)):
        convert(model, Pattern(2, 4), vectors(5), selection=ALL, workers=count)
    assert same_bits(one, many)
