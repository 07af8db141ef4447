"""Masks and counters in state dicts and copies of the model."""

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.loops import PRESETS, batches, sgd, small_net, train
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sparsify import Sparsifier


def without_seconds(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "telemetry": [{**refresh, "seconds": 0, "share": 0} for refresh in state["telemetry"]]}


@pytest.mark.parametrize("name", PRESETS)
def test_state_goes_into_a_fresh_sparsifier_and_training_goes_on_alike(name: str) -> None:
    recipe, pattern = PRESETS[name]
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, pattern, recipe, total_steps=9)
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    state = json.dumps(sparsifier.state_dict())
    train(model, optimizer, 6)

    twin = small_net(seed=9)
    twin_optimizer = sgd(twin)
    other = Sparsifier(twin, twin_optimizer, pattern, recipe, total_steps=9)
    twin.load_state_dict(saved[0])
    twin_optimizer.load_state_dict(saved[1])
    other.load_state_dict(json.loads(state))
    train(twin, twin_optimizer, 6)
    assert without_seconds(other.state_dict()) == without_seconds(sparsifier.state_dict())
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())
    rows, masks = sparsifier.finalize()
    assert rows == other.finalize()[0]
    assert [(row.pattern, row.violations) for row in rows[:2]] == (
        [(None, None)] * 2 if recipe.ends_dense else [(pattern, 0)] * 2
    )
    assert set(masks) == (set() if recipe.ends_dense else {"0", "3"})


@pytest.mark.parametrize("name", PRESETS)
def test_buffers_are_what_the_state_dict_has_more_than_before(name: str) -> None:
    recipe, pattern = PRESETS[name]
    models: list[Callable[[], nn.Module]] = [small_net, lambda: nn.Linear(8, 8)]
    for build in models:
        model = build()
        names = set(model.state_dict())
        selection = Selection(keep_last=isinstance(model, nn.Sequential))
        sparsifier = Sparsifier(model, sgd(model), pattern, recipe, selection=selection, total_steps=9)
        buffers = sparsifier.buffers()
        assert set(buffers) == set(model.state_dict()) - names
        assert all(model.get_buffer(key) is tensor for key, tensor in buffers.items())


def test_a_state_taken_does_not_change_later() -> None:
    model = small_net()
    sparsifier = Sparsifier(model, sgd(model), "2:4-T")
    state = sparsifier.state_dict()
    sparsifier.refresh()
    assert state == {"step": 0, "telemetry": []}
    assert sparsifier.state_dict()["telemetry"] == [asdict(sparsifier.telemetry[0])]


def test_a_deep_copy_computes_the_same_and_keeps_its_masks() -> None:
    model = small_net()
    sparsifier = Sparsifier(model, sgd(model), "2:4-T")
    twin = copy.deepcopy(model)
    inputs = batches(1)[0][0]
    before = model(inputs)
    with torch.no_grad():
        model.get_parameter("3.weight").mul_(torch.linspace(0, 1, 128))
    sparsifier.refresh()
    assert torch.equal(twin(inputs), before)
    assert not torch.equal(model(inputs), before)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_any_kind_computes_and_learns_the_same(name: str, way: str) -> None:
    recipe, pattern = PRESETS[name]
    model = small_net()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, pattern, recipe, total_steps=9)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301  # our own
    inputs, targets = batches(1)[0]
    for net in (model, twin):
        net.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
    gradients = [[parameter.grad for parameter in net.parameters()] for net in (model, twin)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))
    for net in (model, twin):
        for parameter in net.parameters():
            parameter.grad = None
    assert all(mine is not theirs for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_in_another_precision_computes_what_its_finalized_copy_does(name: str, dtype: torch.dtype) -> None:
    recipe, pattern = PRESETS[name]
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, pattern, recipe, total_steps=9)
    train(model, optimizer, 9)
    model.half() if dtype == torch.float16 else model.to(dtype)
    assert {mask.dtype for mask in sparsifier.masks().values()} == {torch.bool}
    inputs = batches(1)[0][0].to(dtype)
    outputs = model(inputs)
    assert outputs.dtype == dtype
    sparsifier.finalize()
    assert torch.equal(model(inputs), outputs)


def test_training_goes_on_in_another_precision() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", PRESETS["dynamic"][0])
    train(model, optimizer, 3)
    model.double()
    optimizer.state.clear()  # the momentum is of the other precision
    inputs, targets = batches(1)[0]
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs.double()), targets).backward()
        optimizer.step()
    assert [refresh.step for refresh in sparsifier.telemetry] == [2, 4, 6]
    sparsifier.finalize()


def test_nothing_but_a_byte_a_weight_is_kept() -> None:
    """Counted in what the Sparsifier and the model hold, apart from the parameters."""
    for name, (recipe, pattern) in PRESETS.items():
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
        sparsifier = Sparsifier(model, sgd(model), pattern, recipe, selection=Selection(keep_last=False), total_steps=9)
        sparsifier.refresh()
        held = [*model.buffers(), *(value for value in vars(sparsifier).values() if isinstance(value, torch.Tensor))]
        assert sum(tensor.nbytes for tensor in held) <= 1.01 * 4 * 64 * 64, name
