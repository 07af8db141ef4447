"""The state of a training: everything comes back, bit for bit."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sparsify import Sparsifier
from tnm_pipeline.training.state import load_state, save_state

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda model: AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95)),
}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 6), nn.Linear(6, 8))
    model[4].weight = model[0].weight  # tied
    return model


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    """Draws from all three global generators."""
    for _ in range(steps):
        inputs = torch.randn(4, 6) + random.random() + np.random.rand()  # noqa: NPY002, S311  # the global ones
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    path = tmp_path / "state.safetensors"
    model = net(0)
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    save_state(path, model, optimizer, {"step": 3, "curve": [[1, 0.1]]})
    train(model, optimizer, 3)
    twin = net(1)
    twin_optimizer = OPTIMIZERS[name](twin)
    twin_optimizer.param_groups[0]["lr"] = 123.0
    train(twin, twin_optimizer, 1)
    assert load_state(path, twin, twin_optimizer) == {"step": 3, "curve": [[1, 0.1]]}
    train(twin, twin_optimizer, 3)
    mine, other = everything(model), everything(twin)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert twin[4].weight is twin[0].weight


def test_saving_disturbs_nothing_and_leaves_one_file(tmp_path: Path) -> None:
    results = []
    for save in (False, True):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  # the global one
        model = net(0)
        optimizer = OPTIMIZERS["momentum"](model)
        train(model, optimizer, 2)
        if save:
            save_state(tmp_path / "state.safetensors", model, optimizer, {})
        train(model, optimizer, 2)
        results.append(everything(model))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_file_that_is_no_state_is_refused_before_anything_changes(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    model = net(0)
    optimizer = OPTIMIZERS["momentum"](model)
    save_state(path, model, optimizer, {})
    whole = path.read_bytes()
    before = everything(model)
    for content in (b"", whole[:50], whole[:-1], b"<html>"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a training state"):
            load_state(path, model, optimizer)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a training state"):
        load_state(path, model, optimizer)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def sparse(recipe: Recipe, pattern: str = "2:4") -> tuple[nn.Module, Optimizer, Sparsifier]:
    model = net(0)
    optimizer = OPTIMIZERS["momentum"](model)
    return model, optimizer, Sparsifier(model, optimizer, pattern, recipe)


def refusal(path: Path, model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier | None = None) -> str:
    """The message, after a look at the weights, which must be the ones before."""
    before = everything(model)
    with pytest.raises(CheckpointError) as caught:
        load_state(path, model, optimizer, sparsifier)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    message = str(caught.value)
    assert str(path) in message
    assert "delete it to start over" in message
    return message


def test_the_state_of_another_sparsity_is_refused(tmp_path: Path) -> None:
    path, recipe = tmp_path / "state.safetensors", Recipe("mine", decay=1e-3)
    model, optimizer, sparsifier = sparse(recipe, "1:2")
    save_state(path, model, optimizer, {"step": 1}, sparsifier)
    assert load_state(path, *sparse(recipe, "1:2")) == {"step": 1}
    assert load_state(path, *sparse(replace(recipe, summary="reworded"), "1:2")) == {"step": 1}
    pattern, decay = refusal(path, *sparse(recipe)), refusal(path, *sparse(replace(recipe, decay=0.5), "1:2"))
    assert "was saved while training with pattern 1:2, this training was made for pattern 2:4:" in pattern
    assert "was saved while training with decay 0.001, this training was made for decay 0.5:" in decay
    dense = net(0)
    dense_optimizer = OPTIMIZERS["momentum"](dense)
    assert "with pattern 1:2, this training was made for pattern dense:" in refusal(path, dense, dense_optimizer)
    save_state(path, dense, dense_optimizer, {})
    assert "with pattern dense, this training was made for pattern 2:4:" in refusal(path, *sparse(recipe))


def test_the_state_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "state.safetensors", net(0)
    save_state(path, model, OPTIMIZERS["momentum"](model), {})
    assert "with SGD, this training is with AdamW: go on" in refusal(path, model, OPTIMIZERS["adamw"](model))
    wider = nn.Sequential(*[*model][:3], nn.Linear(8, 7), model[4])
    message = refusal(path, wider, OPTIMIZERS["momentum"](wider))
    assert "the state of another model: 3.weight has shape (6, 8), the model wants (7, 8); 3.bias has" in message
