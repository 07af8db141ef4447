"""A model comes back from fit() plain, however the training ended, and the same call goes on with it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tnm_pipeline.training.loop import (
    FitConfig,
    SparseTraining,
    TrainingDivergedError,
    TrainingStoppedError,
    fit,
)
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.selection import Selection, SelectionError
from tnm_pipeline.training.sources import Splits, digits

# 2 epochs of 4 steps; in bfloat16, which Accelerate keeps in a `forward` of the model's own
CONFIG = FitConfig(epochs=2, batch_size=32, precision="bf16", warmup=0.0)
FADING = SparseTraining(
    Pattern(2, 4, transposable=True), Recipe("mine", 3, decay=2e-3, ramp=(0.1, 0.6), sampled_gradient=True)
)
SOFT = SparseTraining(Pattern(2, 4), Recipe("mine", 3, soft_threshold=True))


def few() -> Splits:
    data = digits()
    return Splits(TensorDataset(*data.train[:128]), TensorDataset(*data.test[:50]))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Dropout(0.2), nn.Linear(12, 8), nn.Linear(8, 10))
    model[1].bias.requires_grad_(False)  # of the user's own will
    return model


def stop(model: nn.Module, sparsity: SparseTraining, state: Path) -> None:
    steps = [0]

    def on_step(done: int, _: int) -> None:
        steps[0] = done

    with pytest.raises(TrainingStoppedError):
        fit(
            model, few(), CONFIG, sparsity=sparsity, state_path=state, on_step=on_step, should_stop=lambda: steps[0] > 2
        )


def diverge(model: nn.Module, sparsity: SparseTraining, _: Path) -> None:
    data = few()
    data.train.tensors[0][:] = 3e38
    with pytest.raises(TrainingDivergedError):
        fit(model, data, CONFIG, sparsity=sparsity)


def raise_in_a_step(model: nn.Module, sparsity: SparseTraining, _: Path) -> None:
    def on_step(*_: int) -> None:
        raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        fit(model, few(), CONFIG, sparsity=sparsity, on_step=on_step)


def choose_no_layer(model: nn.Module, sparsity: SparseTraining, _: Path) -> None:
    """After Accelerate has prepared the model."""
    with pytest.raises(SelectionError):
        fit(model, few(), CONFIG, sparsity=replace(sparsity, selection=Selection(exclude=("*",))))


def finish(model: nn.Module, sparsity: SparseTraining, _: Path) -> None:
    fit(model, few(), CONFIG, sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [FADING, SOFT], ids=["fading", "soft"])
@pytest.mark.parametrize("end", [stop, diverge, raise_in_a_step, choose_no_layer, finish])
def test_the_model_comes_back_plain(
    tmp_path: Path, end: Callable[[nn.Module, SparseTraining, Path], None], sparsity: SparseTraining
) -> None:
    model, before = net(), net()
    end(model, sparsity, tmp_path / "state")
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in before.modules()]
    assert [type(module) for module in model.modules()] == [type(module) for module in before.modules()]
    assert list(model.state_dict()) == list(before.state_dict())
    learning = [parameter.requires_grad for parameter in model.parameters()]
    assert learning == [parameter.requires_grad for parameter in before.parameters()]
    assert not any(module._forward_pre_hooks for module in model.modules())
    inputs = few().test.tensors[0]
    twin = copy.deepcopy(model.eval())  # with a `forward` of its own it would compute with the first one's weights
    nn.init.zeros_(twin.get_parameter("4.weight"))
    assert not torch.equal(twin(inputs), model(inputs))


def test_the_same_call_with_the_same_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, model = net(), net()
    expected = fit(straight, few(), CONFIG, sparsity=FADING)
    stop(model, FADING, tmp_path / "state")
    found = fit(model, few(), CONFIG, sparsity=FADING, state_path=tmp_path / "state")
    assert found.history == expected.history
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
