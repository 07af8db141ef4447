"""The end of a training: what is refused, what is written, and copies of the model."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.training.loops import PRESETS, batches, sgd, small_net, train
from tnm_pipeline.training.finalize import MaskError, UnfinishedTrainingError
from tnm_pipeline.training.layers import SparseConv2d, SparseLinear
from tnm_pipeline.training.masks import count_violations
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sparsify import Sparsifier

PATTERN = Pattern(2, 4, transposable=True)
Bits = dict[str, Tensor]


def bits(model: nn.Module) -> Bits:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: Bits, other: Bits) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_holds(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Plain layers whose zeros are those of the masks, which are 2:4 both ways."""
    assert not any(isinstance(module, SparseLinear | SparseConv2d) for module in model.modules())
    assert set(masks) == {"0", "3"}
    for name, mask in masks.items():
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal(weight != 0, mask)
        assert count_violations(weight, PATTERN).of(PATTERN) == 0


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("gradual", r"after step 3 of 10 pruned weights still count 0.5 of their value: .*; train on, or give"),
        (
            "dense-tail",
            "after step 3 of 10 the weights are not those of the dense tail of recipe dense-tail: .*train on",
        ),
    ],
)
def test_too_early_is_refused_and_training_goes_on_as_if_nothing_had_been(recipe: str, said: str) -> None:
    found = []
    for impatient in (False, True):
        model = small_net()
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, "2:4-T", recipe, total_steps=10)
        train(model, optimizer, 3)
        if impatient:
            before = bits(model)
            with pytest.raises(UnfinishedTrainingError, match=said + r".*; finalize\(strict=False\) writes"):
                sparsifier.finalize()
            assert same(bits(model), before)
        train(model, optimizer, 7)
        sparsifier.finalize()
        found.append(bits(model))
    assert same(*found)


@pytest.mark.parametrize("recipe", ["gradual", "dense-tail"])
def test_too_early_is_a_warning_where_that_is_wanted(recipe: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", recipe, total_steps=10)
    train(model, optimizer, 3)
    with pytest.warns(UserWarning, match="after step 3 of 10"):
        rows, masks = sparsifier.finalize(strict=False)
    assert [(row.violations, row.violations_transposed) for row in rows[:2]] == [(0, 0), (0, 0)]
    assert_holds(model, masks)


def test_the_end_of_a_training_is_no_exception() -> None:
    for name, (recipe, pattern) in PRESETS.items():
        model = small_net()
        optimizer = sgd(model)
        sparsifier = Sparsifier(model, optimizer, pattern, recipe, total_steps=8)
        train(model, optimizer, 8)
        rows, _ = sparsifier.finalize()
        assert [row.pattern for row in rows] == [*[None if name == "dense-tail" else pattern] * 2, None]


def test_a_second_time_is_refused() -> None:
    model = small_net()
    sparsifier = Sparsifier(model, sgd(model), "2:4-T")
    sparsifier.finalize()
    with pytest.raises(RuntimeError, match="called before"):
        sparsifier.finalize()


def test_weights_of_a_diverged_training_are_refused_by_name() -> None:
    model = small_net()
    sparsifier = Sparsifier(model, sgd(model), "2:4-T")
    name = sparsifier.choice.chosen[0]
    weight = model.get_submodule(name).get_parameter("weight")
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=f"layer {name} has NaN or Inf"):
        sparsifier.finalize()
    with torch.no_grad():
        weight.copy_(before)
    sparsifier.finalize()


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
    assert rows[2].skipped == "registered last, kept dense (keep_last = true)"
    assert all(row.sparsity == 0 for row in rows)
    assert torch.equal(model(inputs), expected)
    assert list(model.state_dict()) == list(small_net().state_dict())


def test_what_the_weights_hold_decides_whether_a_training_ended_dense() -> None:
    """As when the best weights of a training are loaded before its end, which came before the dense tail."""
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4", "dense-tail", total_steps=12)
    train(model, optimizer, 3)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, 9)
    model.load_state_dict(best)
    with pytest.warns(UserWarning, match="not those of the dense tail"):
        rows, masks = sparsifier.finalize(strict=False)
    assert [row.pattern for row in rows] == ["2:4", "2:4", None]
    assert all(
        torch.equal(model.get_submodule(name).get_parameter("weight") != 0, mask) for name, mask in masks.items()
    )


def averaging(use_buffers: bool = False) -> tuple[Sparsifier, AveragedModel, list[Bits]]:
    """A training with masks that change, its running average, and the weights after every step."""
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", refresh_every=2))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=use_buffers)
    seen = []
    for inputs, targets in batches(9):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        averaged.update_parameters(model)
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    assert any(refresh.flip_rate > 0 for refresh in sparsifier.telemetry)
    return sparsifier, averaged, seen


def test_averaged_weights_are_multiplied_with_the_masks_of_the_model() -> None:
    sparsifier, averaged, seen = averaging()
    expected = seen[0]
    for weights in seen[1:]:
        expected = {name: 0.75 * value + 0.25 * weights[name] for name, value in expected.items()}
    plain = small_net()
    plain.load_state_dict(expected)
    with torch.no_grad():
        for name, mask in sparsifier.masks().items():
            assert torch.equal(averaged.module.get_buffer(f"{name}.mask"), mask)
            plain.get_parameter(f"{name}.weight").mul_(mask)
    inputs = batches(1)[0][0]
    torch.testing.assert_close(averaged(inputs), plain(inputs))
    before = averaged(inputs)
    rows, masks = sparsifier.finalize(averaged.module)
    assert_holds(averaged.module, masks)
    assert [row.pattern for row in rows] == ["2:4-T", "2:4-T", None]
    assert torch.equal(averaged(inputs), before)
    assert list(averaged.module.state_dict()) == list(small_net().state_dict())


@pytest.mark.parametrize("first", ["copy", "model"])
def test_a_copy_is_finalized_before_or_after_the_model(first: str) -> None:
    sparsifier, averaged, _ = averaging()
    model, current = sparsifier.model, {name: mask.clone() for name, mask in sparsifier.masks().items()}
    for which in (first, "model" if first == "copy" else "copy"):
        _, masks = sparsifier.finalize(averaged.module if which == "copy" else None)
        assert same(masks, current)
    for ended in (model, averaged.module):
        assert_holds(ended, current)
        assert not any(module._forward_pre_hooks for module in ended.modules())


def test_a_copy_keeps_the_masks_that_it_had() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", refresh_every=2))
    train(model, optimizer, 3)
    best, then = copy.deepcopy(model), {name: mask.clone() for name, mask in sparsifier.masks().items()}
    train(model, optimizer, 6)
    assert not same(then, sparsifier.masks())
    inputs = batches(1)[0][0]
    expected = best(inputs)
    _, masks = sparsifier.finalize(best)
    assert_holds(best, masks)
    assert same(masks, then)
    assert torch.equal(best(inputs), expected)
    train(model, optimizer, 1)
    assert sparsifier.step == 10


def test_averaged_masks_are_refused_until_they_are_restored() -> None:
    """With `use_buffers=True` a mask becomes whatever was kept at any time."""
    sparsifier, averaged, _ = averaging(use_buffers=True)
    with pytest.raises(MaskError, match=r"the mask of 0 breaks 2:4-T in \d+ groups.*use_buffers=False.*: for name"):
        sparsifier.finalize(averaged.module)
    for name, tensor in sparsifier.buffers().items():
        averaged.module.get_buffer(name).copy_(tensor)
    _, masks = sparsifier.finalize(averaged.module)
    assert_holds(averaged.module, masks)


def test_a_copy_of_the_middle_of_a_ramp_is_refused() -> None:
    model = small_net()
    optimizer = sgd(model)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", "gradual", total_steps=9)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    train(model, optimizer, 3)
    averaged.update_parameters(model)
    train(model, optimizer, 6)
    with pytest.raises(UnfinishedTrainingError, match="after step 9 of 9 pruned weights still count"):
        sparsifier.finalize(averaged.module)
    averaged.update_parameters(model)
    sparsifier.finalize(averaged.module)


def test_what_is_no_copy_is_refused() -> None:
    sparsifier, averaged, _ = averaging()
    for other, kind in ((averaged, "AveragedModel"), (small_net(), "Sequential"), (nn.Linear(4, 4), "Linear")):
        with pytest.raises(MaskError, match=rf"'0' in the {kind} .*\(2 of 2 are missing\): .* its .module"):
            sparsifier.finalize(other)
