"""What counts as a step, which gradients are pulled, and which optimizers will do."""

import pytest
import torch
from torch import Tensor, nn

from tests.training.loops import EVERYTHING, batches, sgd, small_net
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sparsify import OptimizerMismatchError, Sparsifier


def test_steps_of_the_optimizer_count_and_forwards_do_not() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", refresh_every=2))
    for index, (inputs, targets) in enumerate(batches(12), start=1):  # accumulates 3 micro-batches in a step
        (nn.functional.cross_entropy(model(inputs), targets) / 3).backward()
        if index % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        model(batches(1)[0][0])
    assert sparsifier.step == 4
    assert [refresh.step for refresh in sparsifier.telemetry] == [2, 4]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_loss_scaler_skips_does_not_count(fused: bool) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    sparsifier = Sparsifier(model, optimizer, "2:4-T")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for index, (inputs, targets) in enumerate(batches(3)):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(inputs), targets)).backward()
        if index == 1:
            gradient = model.get_parameter("0.weight").grad
            assert gradient is not None
            gradient[0, 0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.step == 2


@pytest.mark.parametrize("fused", [False, True])
def test_decay_is_the_same_under_a_loss_scaler(fused: bool) -> None:
    recipe = Recipe("mine", decay=0.25)
    weights = []
    for scaled in (False, True):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
        Sparsifier(model, optimizer, "2:4-T", recipe)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        inputs, targets = batches(1)[0]
        scaler.scale(nn.functional.cross_entropy(model(inputs), targets)).backward()
        scaler.step(optimizer)
        weights.append(model.get_parameter("0.weight").detach().clone())
    torch.testing.assert_close(*weights)


def test_decay_joins_the_gradient_of_pruned_weights_after_clipping() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", decay=0.25), selection=EVERYTHING)
    before = model.weight.detach().clone()
    mask = sparsifier.masks()[""].clone()
    (1e3 * model(torch.ones(2, 8))).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    assert model.weight.grad is not None
    clipped = model.weight.grad.clone()
    optimizer.step()
    expected = torch.where(mask, before - clipped, before - clipped - 0.25 * before)
    torch.testing.assert_close(model.weight.detach(), expected)
    assert not torch.equal(model.weight.detach()[~mask], before[~mask])


@pytest.mark.parametrize(("done", "strength"), [(0, 0.0), (2, 0.125), (4, 0.25)])
def test_decay_pulls_weights_as_far_as_they_are_pruned(done: int, strength: float) -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recipe = Recipe("mine", decay=0.25, ramp=(0.0, 0.5))
    sparsifier = Sparsifier(model, optimizer, "2:4-T", recipe, selection=EVERYTHING, total_steps=8)
    sparsifier.load_state_dict({"step": done, "telemetry": []})
    assert float(sparsifier.buffers()["leak"]) == sparsifier.leak == 1 - strength / 0.25
    before = model.weight.detach().clone()
    (0.0 * model(torch.ones(1, 8))).sum().backward()
    optimizer.step()
    mask = sparsifier.masks()[""]
    torch.testing.assert_close(model.weight.detach(), torch.where(mask, before, (1 - strength) * before))


def test_a_gradient_that_a_closure_computes_is_pulled_too() -> None:
    """As in Lightning, which runs the forward and the backward pass inside the step."""
    found = []
    for inside in (False, True):
        model = small_net()
        optimizer = sgd(model)
        Sparsifier(model, optimizer, "2:4", Recipe("mine", decay=0.1))
        for inputs, targets in batches(3):

            def closure(
                model: nn.Module = model,
                optimizer: torch.optim.Optimizer = optimizer,
                inputs: Tensor = inputs,
                targets: Tensor = targets,
            ) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(inputs), targets)
                loss.backward()
                return loss

            if inside:
                loss = optimizer.step(closure)
                assert loss is not None
            else:
                closure()
                optimizer.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_optimizer_without_a_chosen_weight_is_refused() -> None:
    model = small_net()
    for optimizer in (sgd(small_net()), torch.optim.SGD(model[5].parameters(), lr=0.1)):
        with pytest.raises(
            OptimizerMismatchError, match=r"does not hold the weights of 0, 3 \(2 of 2 chosen layers\): .*Make it from"
        ):
            Sparsifier(model, optimizer, "2:4-T")
    model.get_parameter("0.weight").requires_grad_(False)
    with pytest.raises(OptimizerMismatchError, match=r"weights of 3 \(1 of 2"):
        Sparsifier(model, sgd(small_net()), "2:4-T")
    assert type(model[0]) is nn.Conv2d
    Sparsifier(model, torch.optim.SGD(model[3].parameters(), lr=0.1), "2:4-T")  # last layer and biases may be elsewhere
