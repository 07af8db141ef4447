"""What the layers are fitted to."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.calibration import (
    CalibrationError,
    check_batches,
    collect,
    evaluating,
    execution_order,
)
from tnm_pipeline.training.convert.objective import Objective


class Backwards(nn.Module):
    """Registers its layers in the reverse of the order in which it runs them; one never runs, one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 8)
        self.twice = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        h = self.relu(self.twice(h))
        h = self.relu(self.twice(input=h))
        result: Tensor = self.last(h)
        return result


def model() -> Backwards:
    torch.manual_seed(0)
    return Backwards().eval()


def batch(seed: int = 0) -> Tensor:
    return torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))


def test_order_is_that_of_execution() -> None:
    order = execution_order(model(), ["idle", "last", "twice", "first"], batch())
    assert list(order.items()) == [("first", 1), ("twice", 2), ("last", 1)]


@torch.no_grad()
def test_sums_are_those_of_every_call_before_in_place_activations() -> None:
    network = model()
    objective = collect(network, network, "twice", [batch(0), batch(1)], calls=2)
    inputs, targets = [], []
    for x in (batch(0), batch(1)):
        h = network.first(x).relu()
        for _ in range(2):
            inputs.append(h)
            targets.append(h @ network.twice.weight.T)
            h = network.twice(h).relu()
    expected = Objective.of(torch.cat(inputs), torch.cat(targets))
    assert objective.samples == 80
    torch.testing.assert_close(objective.gram, expected.gram, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(objective.cross, expected.cross, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(objective.target_sum, expected.target_sum, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_sequential_takes_inputs_of_the_changed_model_and_targets_of_the_dense_one() -> None:
    dense = model()
    changed = copy.deepcopy(dense)
    changed.first.weight.mul_(0.5)
    x = batch()
    real, ideal = changed.first(x).relu(), dense.first(x).relu()
    target = ideal @ dense.twice.weight.T
    for sequential, inputs in ((True, real), (False, ideal)):
        objective = collect(dense, changed, "twice", [x], sequential=sequential)
        torch.testing.assert_close(objective.cross, (target.T @ inputs).double(), rtol=1e-4, atol=1e-4)


def test_no_hook_stays_behind() -> None:
    network = model()
    execution_order(network, ["first", "twice"], batch())
    collect(network, network, "twice", [batch()])
    assert not any(module._forward_hooks for module in network.modules())


def test_evaluation_mode_ends_with_every_module_as_it_was() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)).train()
    network[2].eval()
    before = [module.training for module in network.modules()]
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == before


def test_layer_that_never_runs_is_refused() -> None:
    with pytest.raises(CalibrationError, match="idle does not run"):
        collect(model(), model(), "idle", [batch()])


def test_overflow_inside_the_model_names_the_layer() -> None:
    network = model()
    with torch.no_grad():
        network.first.weight.mul_(float("inf"))
    with pytest.raises(CalibrationError, match="layer twice meets NaN or Inf"):
        collect(network, network, "twice", [batch()])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration batches"),
        ([torch.ones(2, 8), torch.ones(0, 8)], "batch 1 is empty"),
        ([torch.ones(2, 8), torch.tensor([[1.0, float("nan"), float("inf")]])], "batch 1 has 2 NaN or Inf of 3"),
    ],
)
def test_useless_data_is_refused(batches: list[Tensor], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        check_batches(batches)


def test_token_ids_pass() -> None:
    check_batches([torch.arange(6).reshape(2, 3)])
