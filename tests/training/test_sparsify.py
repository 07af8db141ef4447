"""The Sparsifier in plain loops that know nothing of it."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.layers import SparseLinear
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern, PatternError
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sparsify import Sparsifier

EVERYTHING = Selection(keep_last=False)
STATIC = Recipe("static")


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10), nn.ReLU(), nn.Linear(10, 3)
    )


def batches(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 4, 4, 4, generator=g), torch.randint(0, 3, (6,), generator=g)) for _ in range(count)]


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for inputs, targets in batches(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def test_one_line_makes_a_plain_loop_sparse() -> None:
    model = small_net()
    names, shapes = list(model.state_dict()), [parameter.shape for parameter in model.parameters()]
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", refresh_every=5, decay=5e-3))
    train(model, optimizer, 12)
    inputs = batches(1)[0][0]
    before = model(inputs)
    rows, masks = sparsifier.finalize()
    assert torch.equal(model(inputs), before)  # writing the zeros changes nothing that the model computes
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    assert list(model.state_dict()) == names
    assert [parameter.shape for parameter in model.parameters()] == shapes
    assert [(row.name, row.pattern, row.violations, row.violations_transposed) for row in rows] == [
        ("0", "2:4-T", 0, 0),
        ("3", "2:4-T", 0, 0),
        ("5", None, None, None),
    ]
    assert rows[2].skipped == "last layer, kept dense (keep_last = true)"
    assert set(masks) == {"0", "3"}
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(f"{name}.weight") != 0, mask)
    assert [row.sparsity for row in rows[:1]] == [0.5]
    assert all(row.kept_magnitude is not None and 0.5 < row.kept_magnitude < 1 for row in rows[:2])
    json.dumps([row.to_dict() for row in rows])


def test_after_finalize_the_optimizer_is_free() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", Recipe("mine", refresh_every=1, decay=0.1))
    sparsifier.finalize()
    train(model, optimizer, 3)
    assert sparsifier.step == 0
    assert sparsifier.flip_rates == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_row_wise_reports_no_transposed_violations() -> None:
    model = small_net()
    rows, _ = Sparsifier(model, sgd(model), "2:4").finalize()
    assert [(row.violations, row.violations_transposed) for row in rows[:2]] == [(0, None), (0, None)]


def test_pruned_weights_learn_and_come_back() -> None:
    """Straight through: without decay, masks that follow the weights change."""
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", refresh_every=4))
    first = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    train(model, optimizer, 12)
    assert any(not torch.equal(mask, first[name]) for name, mask in sparsifier.masks().items())
    for name, mask in sparsifier.masks().items():
        assert torch.equal(mask, solve(model.get_parameter(f"{name}.weight"), Pattern(2, 4, transposable=True)))


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
    assert [step for step, _ in sparsifier.flip_rates] == [2, 4]


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


def test_a_frozen_layer_is_left_alone_by_decay() -> None:
    model = small_net()
    model.get_parameter("0.weight").requires_grad_(False)
    before = model.get_parameter("0.weight").clone()
    optimizer = sgd(model)
    Sparsifier(model, optimizer, "2:4-T", Recipe("mine", decay=0.1))
    train(model, optimizer, 2)
    assert torch.equal(model.get_parameter("0.weight"), before)


def test_masks_freeze() -> None:
    model = small_net()
    optimizer = sgd(model)
    recipe = Recipe("mine", refresh_every=3, freeze_at=0.5)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", recipe, total_steps=20)
    train(model, optimizer, 20)
    assert [step for step, _ in sparsifier.flip_rates] == [3, 6, 9]


def test_a_static_mask_never_changes() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", "static")
    first = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    train(model, optimizer, 12)
    assert all(torch.equal(mask, first[name]) for name, mask in sparsifier.masks().items())
    assert sparsifier.step == 12


def test_the_flip_rate_is_the_fraction_that_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    tile = torch.tensor([[2.0, 2, 1, 1], [2, 2, 1, 1], [1, 1, 2, 2], [1, 1, 2, 2]])
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(tile)
        model.get_parameter("1.weight").copy_(tile.repeat(2, 1))
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", STATIC, selection=EVERYTHING)
    with torch.no_grad():
        model.get_parameter("1.weight")[4:].copy_(tile.flip(0))  # all 16 entries of one tile of 3 change sides
    assert sparsifier.refresh() == 16 / 48
    assert sparsifier.refresh() == 0
    assert sparsifier.flip_rates == [(0, 16 / 48), (0, 0.0)]


def test_state_goes_into_a_fresh_sparsifier_and_training_goes_on_alike() -> None:
    recipe = Recipe("mine", refresh_every=3, decay=5e-3)
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", recipe)
    train(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    state = json.dumps(sparsifier.state_dict())
    train(model, optimizer, 4)

    twin = small_net(seed=9)
    twin_optimizer = sgd(twin)
    other = Sparsifier(twin, twin_optimizer, "2:4-T", recipe)
    twin.load_state_dict(saved[0])
    twin_optimizer.load_state_dict(saved[1])
    other.load_state_dict(json.loads(state))
    train(twin, twin_optimizer, 4)
    assert other.state_dict() == sparsifier.state_dict()
    assert all(torch.equal(tensor, twin.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_state_taken_does_not_change_later() -> None:
    model = small_net()
    sparsifier = Sparsifier(model, sgd(model), "2:4-T")
    state = sparsifier.state_dict()
    sparsifier.refresh()
    assert state == {"step": 0, "flip_rates": []}


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


def test_attention_and_its_fused_eval_path_use_the_masks() -> None:
    """In eval mode torch's encoder layer bypasses the forward of linear1 and linear2 when it can."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", selection=EVERYTHING)
    assert set(sparsifier.masks()) == {"linear1", "linear2"}
    assert type(model.self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    expected = model.train()(inputs)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(inputs), expected)
        sparsifier.finalize()
        torch.testing.assert_close(model(inputs), expected)


def test_a_tied_weight_stays_dense_and_computes_the_same_after_finalize() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = model[2].weight
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", selection=EVERYTHING)
    inputs = torch.ones(1, 8)
    before = model(inputs)
    rows, _ = sparsifier.finalize()
    assert torch.equal(model(inputs), before)
    assert [row.skipped for row in rows] == ["shares its weight with 2", None, "shares its weight with 0"]


def test_bad_arguments_leave_the_model_as_it_was() -> None:
    model = small_net()
    optimizer = sgd(model)
    with pytest.raises(PatternError, match="5:4"):
        Sparsifier(model, optimizer, "5:4")
    with pytest.raises(ValueError, match="unknown recipe"):
        Sparsifier(model, optimizer, "2:4", "magic")
    with pytest.raises(ValueError, match="no layer can become"):
        Sparsifier(model, optimizer, "2:4", selection=Selection(include=("nothing",)))
    with torch.no_grad():
        model.get_parameter("3.weight")[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 3: .*NaN or Inf"):
        Sparsifier(model, optimizer, "2:4")
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert list(model.state_dict()) == list(small_net().state_dict())
