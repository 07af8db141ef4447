"""Errors of converted layers against what a person would compute."""

import copy

import pytest
import torch
from torch import nn

from tests.training.convert.networks import Backwards, bias_of, conv_net, images, mlp, vectors, weight_of
from tests.training.zoo import SMALL
from tnm_pipeline.training.convert.batch import CalibrationError
from tnm_pipeline.training.convert.held_out import LayerError, layer_errors, mean_errors


def damaged(model: nn.Module, names: list[str]) -> nn.Module:
    other = copy.deepcopy(model)
    for number, name in enumerate(names):
        weight = weight_of(other, name)
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    return other


@torch.no_grad()
def test_errors_are_those_of_the_outputs() -> None:
    dense = mlp()
    model = damaged(dense, ["0", "2"])
    assert isinstance(model, nn.Sequential)
    errors = layer_errors(dense, model, ["2", "0"], vectors())
    assert list(errors) == ["0", "2"]
    x = torch.cat(vectors())
    wanted = dense[:3](x)
    scale = (wanted - bias_of(dense, "2")).norm()
    assert errors["2"].own == pytest.approx(float((model[2](dense[:2](x)) - wanted).norm() / scale), rel=1e-5)
    assert errors["2"].inside == pytest.approx(float((model[:3](x) - wanted).norm() / scale), rel=1e-5)
    assert errors["0"].own == errors["0"].inside
    mean = mean_errors(errors)
    assert mean.own == pytest.approx((errors["0"].own + errors["2"].own) / 2)
    assert mean.inside == pytest.approx((errors["0"].inside + errors["2"].inside) / 2)


@torch.no_grad()
def test_errors_of_convolutions() -> None:
    dense = conv_net().eval()
    model = damaged(dense, ["3"])
    error = layer_errors(dense, model, ["3"], images())["3"]
    before = dense[:3](torch.cat(images()))
    wanted = dense[3](before)
    plain = wanted - bias_of(dense, "3")[:, None, None]
    assert isinstance(model, nn.Sequential)
    assert error.own == pytest.approx(float((model[3](before) - wanted).norm() / plain.norm()), rel=1e-5)


@torch.no_grad()
def test_padding_does_not_count() -> None:
    build, inputs = SMALL["bert"]
    name = "encoder.layer.0.intermediate.dense"
    dense = build()
    model = damaged(dense, [name])
    batch = inputs(6, 0)
    assert isinstance(batch, dict)
    assert not bool(batch["attention_mask"].all())
    given: list[torch.Tensor] = []
    handle = dense.get_submodule(name).register_forward_pre_hook(lambda _, args: given.append(args[0]))
    dense(**batch)
    handle.remove()
    rows = given[0][batch["attention_mask"].bool()]
    layer = dense.get_submodule(name)
    wanted = layer(rows)
    error = (model.get_submodule(name)(rows) - wanted).norm() / (wanted - bias_of(dense, name)).norm()
    assert layer_errors(dense, model, [name], [batch])[name].own == pytest.approx(float(error), rel=1e-5)


def test_the_same_model_has_no_error_and_idle_layers_have_none() -> None:
    model = Backwards()
    errors = layer_errors(model, copy.deepcopy(model), ["idle", "twice", "first"], vectors(width=8))
    assert errors == {"first": LayerError(0, 0), "twice": LayerError(0, 0)}
    assert model.training


@torch.no_grad()
def test_a_silent_layer_has_error_zero_or_one() -> None:
    dense = mlp()
    weight_of(dense, "2").zero_()
    assert layer_errors(dense, copy.deepcopy(dense), ["2"], vectors())["2"] == LayerError(0, 0)
    assert layer_errors(dense, damaged(dense, ["2"]), ["2"], vectors())["2"] == LayerError(1, 1)


def test_refusals() -> None:
    with pytest.raises(CalibrationError, match="no calibration batches"):
        layer_errors(mlp(), mlp(), ["0"], [])
    broken = damaged(mlp(), ["0"])
    weight_of(broken, "0").fill_(float("inf"))
    with pytest.raises(CalibrationError, match="layer 2 meets NaN or Inf"):
        layer_errors(mlp(), broken, ["2"], vectors())
