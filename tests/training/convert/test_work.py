"""Multiply-adds, the order of execution, and layers that are not what their class says."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.convert.work import measure_work


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_work_of_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(32, 5)
    )
    assert measure_work(model, drawn(7, 3, 8, 8)).products == {"0": 16 * 8 * 27, "1": 4 * 8 * 18, "3": 160}


class Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.idle, self.last, self.first = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.last(self.first(input=x)))  # type: ignore[no-any-return]


def test_layers_stand_in_the_order_of_their_last_calls() -> None:
    assert list(measure_work(Reordered(), drawn(2, 5, 4)).products.items()) == [("last", 80), ("first", 2 * 80)]


class Padding(nn.Conv2d):
    """Pads by itself; with a kernel of 1 there is nothing to pad."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as in the class it derives from
        side = self.kernel_size[0] // 2
        return super().forward(F.pad(input, (side, side, side, side)))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as in the class it derives from
        return super().forward(input) * 1.1


def test_derived_classes_are_compared_with_plain_ones() -> None:
    model = nn.Sequential(Padding(8, 8, 1), Padding(8, 8, 3), Scaled(5, 8), nn.Linear(8, 8))
    assert measure_work(model, drawn(1, 8, 5, 5)).unlike == {"1", "2"}


def test_the_model_comes_back_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).train()
    before = copy.deepcopy(model.state_dict())
    measure_work(model, drawn(2, 8, 3, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
