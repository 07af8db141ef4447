"""The Sparsifier in plain loops that know nothing of it."""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.kernels.soft_threshold import matching_scale, soft_threshold
from tnm_pipeline.training.layers import SparseLinear
from tnm_pipeline.training.masks import kept_magnitude, solve
from tnm_pipeline.training.pattern import Pattern, PatternError
from tnm_pipeline.training.recipes import RECIPES, Recipe, RecipeError
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sparsify import OptimizerMismatchError, Sparsifier
from tnm_pipeline.training.telemetry import Refresh

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
    assert sparsifier.telemetry == []
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


def test_a_frozen_layer_has_a_mask_that_stays() -> None:
    model = small_net()
    model.get_parameter("0.weight").requires_grad_(False)
    before = model.get_parameter("0.weight").clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)  # as people do
    sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", refresh_every=1, decay=0.1))
    mask = sparsifier.masks()["0"].clone()
    train(model, optimizer, 4)
    assert sparsifier.telemetry[-1].flip_rate > 0  # of the other layer
    assert torch.equal(model.get_parameter("0.weight"), before)
    assert torch.equal(sparsifier.masks()["0"], mask)
    inputs = batches(1)[0][0]
    expected = model(inputs)
    rows, _ = sparsifier.finalize()
    assert rows[0].pattern == "2:4-T"
    assert torch.equal(model.get_parameter("0.weight"), before * mask)
    assert torch.equal(model(inputs), expected)


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


def test_masks_freeze() -> None:
    model = small_net()
    optimizer = sgd(model)
    recipe = Recipe("mine", refresh_every=3, freeze_at=0.5)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", recipe, total_steps=20)
    train(model, optimizer, 20)
    assert [refresh.step for refresh in sparsifier.telemetry] == [3, 6, 9]


def test_a_static_mask_never_changes() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", "static")
    first = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    train(model, optimizer, 12)
    assert all(torch.equal(mask, first[name]) for name, mask in sparsifier.masks().items())
    assert sparsifier.step == 12


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
    assert [replace(refresh, seconds=0) for refresh in (first, second)] == [
        Refresh(step=0, flip_rate=16 / 48, kept_magnitude=48 / 72, density=0.5, seconds=0),
        Refresh(step=0, flip_rate=0, kept_magnitude=48 / 72, density=0.5, seconds=0),
    ]
    assert 0 < first.seconds < elapsed
    assert 0 < second.seconds < elapsed


def test_weights_that_are_all_zero_keep_all_of_their_magnitude() -> None:
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight)
    sparsifier = Sparsifier(model, sgd(model), "2:4-T", STATIC, selection=EVERYTHING)
    assert sparsifier.refresh().kept_magnitude == 1


# Scaled down to 8 steps: everything happens on the way.
PRESETS: dict[str, tuple[Recipe, str]] = {
    name: (replace(recipe, refresh_every=recipe.refresh_every and 2), "2:4" if recipe.soft_threshold else "2:4-T")
    for name, recipe in RECIPES.items()
}


def without_seconds(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "telemetry": [{**refresh, "seconds": 0} for refresh in state["telemetry"]]}


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


def leaks(recipe: Recipe, total: int, steps: int) -> tuple[list[float], list[float]]:
    """What pruned weights count in each forward pass: as the Sparsifier says, and as the output shows."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", recipe, selection=EVERYTHING, total_steps=total)
    said, seen = [], []
    for _ in range(steps):
        said.append(sparsifier.leak)
        model.zero_grad()
        used = model(torch.eye(4)).T
        used.sum().backward()
        mask = sparsifier.masks()[""]
        assert torch.equal(used[mask], model.weight[mask])
        shares = (used / model.weight).detach()[~mask]
        torch.testing.assert_close(shares, shares[:1].expand_as(shares))
        seen.append(float(shares[0]))
        optimizer.step()
    return said, seen


def test_gradual_fades_pruned_weights_out_and_ends_exactly_masked() -> None:
    said, seen = leaks(RECIPES["gradual"], total=10, steps=11)
    assert said == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0, 0, 0, 0, 0, 0])
    assert seen == pytest.approx(said)
    assert seen[5:] == [0] * 6


def test_a_dense_tail_is_exactly_dense() -> None:
    said, seen = leaks(RECIPES["dense-tail"], total=12, steps=13)
    assert said == seen == [0] * 10 + [1] * 3


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


def test_finalize_before_the_end_of_a_ramp_warns_and_holds_the_pattern() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", "gradual", total_steps=10)
    train(model, optimizer, 3)
    with pytest.warns(UserWarning, match=r"after step 3 of 10, while pruned weights still count 50%: .*train on, or"):
        rows, masks = sparsifier.finalize()
    assert [(row.violations, row.violations_transposed) for row in rows[:2]] == [(0, 0), (0, 0)]
    assert all(torch.equal(model.get_parameter(f"{name}.weight") != 0, mask) for name, mask in masks.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("name", ["dynamic", "gradual", "s-ste"])
def test_a_compiled_model_is_compiled_once_and_learns_the_same(name: str) -> None:
    recipe, pattern = PRESETS[name]
    weights = []
    torch.compiler.reset()
    for compiled in (False, True):
        model = small_net()
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, pattern, recipe, total_steps=9)
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for step, (inputs, targets) in enumerate(batches(9)):
            with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
                optimizer.zero_grad()
                nn.functional.cross_entropy(forward(inputs), targets).backward()
            optimizer.step()
        assert len(sparsifier.telemetry) >= 2
        weights.append(model.get_parameter("3.weight").detach())
    torch.testing.assert_close(*weights)


def test_a_dense_tail_claims_nothing() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", "dense-tail", total_steps=12)
    train(model, optimizer, 12)
    inputs = batches(1)[0][0]
    expected = model(inputs)
    rows, masks = sparsifier.finalize()
    assert masks == {}
    assert [(row.pattern, row.skipped, row.kept_magnitude, row.violations) for row in rows[:2]] == [
        (None, "recipe dense-tail ends dense", None, None)
    ] * 2
    assert rows[2].skipped == "last layer, kept dense (keep_last = true)"
    assert all(row.sparsity == 0 for row in rows)
    assert torch.equal(model(inputs), expected)
    assert list(model.state_dict()) == list(small_net().state_dict())


def test_soft_thresholds_end_as_they_were_trained_with_the_scale_of_the_start() -> None:
    model = small_net()
    optimizer = sgd(model)
    scales = {name: float(matching_scale(model.get_parameter(f"{name}.weight"), Pattern(2, 4))) for name in ("0", "3")}
    sparsifier = Sparsifier(model, optimizer, "2:4", replace(RECIPES["s-ste"], refresh_every=2))
    train(model, optimizer, 5)
    assert [refresh.step for refresh in sparsifier.telemetry] == [2, 4]
    assert any(refresh.flip_rate > 0 for refresh in sparsifier.telemetry)
    dense = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in scales}
    inputs = batches(1)[0][0]
    expected = model(inputs)
    rows, masks = sparsifier.finalize()
    assert torch.equal(model(inputs), expected)
    for row in rows[:2]:
        weight = model.get_parameter(f"{row.name}.weight").detach()
        torch.testing.assert_close(weight, scales[row.name] * soft_threshold(dense[row.name], Pattern(2, 4)))
        assert torch.equal(masks[row.name], weight != 0)
        assert (row.pattern, row.violations, row.violations_transposed) == ("2:4", 0, None)
        assert row.kept_magnitude == kept_magnitude(dense[row.name], weight != 0)
        # the mask that plain magnitudes give: a soft threshold prunes the same weights
        assert torch.equal(weight != 0, solve(dense[row.name], Pattern(2, 4)))


def test_the_solver_is_the_one_that_the_recipe_names() -> None:
    """On this weight the greedy approximation keeps another set."""
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.copy_(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)))
    pattern = Pattern(2, 4, transposable=True)
    masks = {solver: solve(model.weight, pattern, solver) for solver in ("exact", "greedy")}
    assert not torch.equal(masks["exact"], masks["greedy"])
    for recipe, solver in (("static", "exact"), ("paper", "greedy")):
        twin = copy.deepcopy(model)
        sparsifier = Sparsifier(twin, sgd(twin), pattern, recipe, selection=EVERYTHING)
        assert torch.equal(sparsifier.masks()[""], masks[solver])
        sparsifier.refresh()
        assert torch.equal(sparsifier.masks()[""], masks[solver])


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
    with pytest.raises(RecipeError, match="unknown recipe"):
        Sparsifier(model, optimizer, "2:4", "magic")
    with pytest.raises(RecipeError, match="s-ste is forward only"):
        Sparsifier(model, optimizer, "2:4-T", "s-ste")
    for recipe in ("gradual", "dense-tail"):
        with pytest.raises(RecipeError, match=f"{recipe} .*: pass total_steps"):
            Sparsifier(model, optimizer, "2:4-T", recipe)
    with pytest.raises(RecipeError, match="total_steps is 0"):
        Sparsifier(model, optimizer, "2:4-T", total_steps=0)
    with pytest.raises(ValueError, match="no layer can become"):
        Sparsifier(model, optimizer, "2:4", selection=Selection(include=("nothing",)))
    with torch.no_grad():
        model.get_parameter("3.weight")[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 3: .*NaN or Inf"):
        Sparsifier(model, optimizer, "2:4")
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert list(model.state_dict()) == list(small_net().state_dict())


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


def test_what_the_weights_hold_decides_whether_a_training_ended_dense() -> None:
    """As when the best weights of a training are loaded before its end, which came before the dense tail."""
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", "dense-tail", total_steps=12)
    train(model, optimizer, 3)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, 9)
    model.load_state_dict(best)
    with pytest.warns(UserWarning, match="before the dense tail"):
        rows, masks = sparsifier.finalize()
    assert [row.pattern for row in rows] == ["2:4", "2:4", None]
    assert all(
        torch.equal(model.get_submodule(name).get_parameter("weight") != 0, mask) for name, mask in masks.items()
    )
