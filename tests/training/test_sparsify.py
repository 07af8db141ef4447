"""The Sparsifier in plain loops that know nothing of it."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.training.loops import EVERYTHING, batches, sgd, small_net, train
from tnm_pipeline.training.kernels.soft_threshold import matching_scale, soft_threshold
from tnm_pipeline.training.masks import kept_magnitude, solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES, Recipe
from tnm_pipeline.training.sparsify import Sparsifier


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
    assert rows[2].skipped == "registered last, kept dense (keep_last = true)"
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
