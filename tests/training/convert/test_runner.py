"""convert() on small networks."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert import METHODS, CalibrationError, Conversion, convert, layer_errors
from tnm_pipeline.training.convert.calibration import prunable_layer
from tnm_pipeline.training.masks import count_violations, solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Selection

ALL = Selection(keep_last=False)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 4),
    )


def vectors(count: int = 3, seed: int = 0, width: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, width, generator=generator) + 0.5 for _ in range(count)]


def images(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 4, 16, 16, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
@pytest.mark.parametrize("method", METHODS)
def test_every_chosen_weight_holds_the_pattern(text: str, method: str) -> None:
    model, pattern = conv_net(), Pattern.parse(text)
    modules, last = list(model.modules()), prunable_layer(model, "5").weight.clone()
    conversion = convert(model, pattern, images(), method=method)
    assert [layer.name for layer in conversion.layers] == ["0", "3"]
    for name, mask in conversion.masks.items():
        weight = prunable_layer(model, name).weight
        assert count_violations(weight.detach(), pattern).of(pattern) == 0
        assert not weight[~mask].any()
    assert list(model.modules()) == modules
    assert torch.equal(prunable_layer(model, "5").weight, last)
    assert conversion.batch_norms == 1


def test_methods_rank_as_they_should() -> None:
    error: dict[str, float] = {}
    for method in METHODS:
        conversion = convert(mlp(), Pattern(2, 4), vectors(), method=method, sequential=False)
        error[method] = conversion.mean_error
        assert all(layer.error <= layer.error_masked for layer in conversion.layers)
    assert error["least-squares"] <= error["adaprune"] * 1.001  # its damping is for data it has not seen
    assert error["adaprune"] < error["magnitude"]


def test_sequential_lowers_the_error_inside_the_converted_network() -> None:
    inside: dict[bool, float] = {}
    for sequential in (True, False):
        model = mlp()
        convert(model, Pattern(2, 4), vectors(8), selection=ALL, sequential=sequential)
        inside[sequential] = layer_errors(mlp(), model, ["4"], vectors(2, seed=9))["4"]
    assert inside[True] < inside[False]


@torch.no_grad()
def test_reported_error_is_that_of_the_stored_layer() -> None:
    model, dense = mlp(), mlp()
    conversion = convert(model, Pattern(2, 4), vectors(), selection=ALL)
    x = torch.cat(vectors())
    wanted, got = dense[:3](x), model[:3](x)
    error = float((got - wanted).norm() / (wanted - dense[2].bias).norm())
    assert conversion.layers[1].error == pytest.approx(error, rel=1e-4)
    assert layer_errors(dense, model, ["2"], vectors())["2"] == pytest.approx(error, rel=1e-4)


@torch.no_grad()
def test_bias_makes_mean_outputs_equal() -> None:
    model, dense = mlp(), mlp()
    convert(model, Pattern(2, 4), vectors(), method="magnitude", selection=ALL)
    x = torch.cat(vectors())
    torch.testing.assert_close(model(x).mean(0), dense(x).mean(0), rtol=1e-4, atol=1e-5)


def test_no_bias_is_created() -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 4))
    convert(model, Pattern(2, 4), vectors())
    assert model[0].bias is None


def test_linear_on_sequences() -> None:
    model = mlp()
    sequences = [x.reshape(8, 8, 16) for x in vectors()]
    convert(model, Pattern(2, 4), sequences)
    flat = mlp()
    convert(flat, Pattern(2, 4), vectors())
    torch.testing.assert_close(model.state_dict(), flat.state_dict(), rtol=1e-5, atol=1e-6)


def test_unstructured_checkpoint_with_dense_reference() -> None:
    dense = mlp()
    sparse = copy.deepcopy(dense)
    with torch.no_grad():
        for name in ("0", "2"):
            weight = prunable_layer(sparse, name).weight
            weight[weight.abs() < weight.abs().median()] = 0
        prunable_layer(sparse, "2").weight[:4, :4] = 0  # a block without any magnitude
    held_out = vectors(seed=5)
    errors: dict[str, float] = {}
    for name, reference in (("own", None), ("dense", dense)):
        model = copy.deepcopy(sparse)
        conversion = convert(model, Pattern(2, 4), vectors(8), reference=reference)
        assert all(layer.violations == 0 for layer in conversion.layers)
        expected = solve(prunable_layer(sparse, "0").weight, Pattern(2, 4))
        assert torch.equal(conversion.masks["0"], expected)
        errors[name] = layer_errors(dense, model, ["2"], held_out)["2"]
    assert errors["dense"] < errors["own"]


def test_same_inputs_give_the_same_bits() -> None:
    for method in METHODS:
        states, reports = [], []
        for _ in range(2):
            model = conv_net()
            conversion = convert(model, Pattern(2, 4, transposable=True), images(), method=method)
            states.append(model.state_dict())
            reports.append([(layer.error, layer.error_masked) for layer in conversion.layers])
        assert reports[0] == reports[1]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_modes_gradients_and_requires_grad_are_left_alone() -> None:
    model = conv_net().train()
    model[1].eval()
    model(images()[0]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = [None if g is None else g.clone() for g in gradients]
    modes = [module.training for module in model.modules()]
    convert(model, Pattern(2, 4), images())
    assert [module.training for module in model.modules()] == modes
    for parameter, same, value in zip(model.parameters(), gradients, before, strict=True):
        assert parameter.requires_grad
        assert parameter.grad is same
        assert same is not None
        assert value is not None
        assert torch.equal(same, value)


def test_idle_layers_are_skipped_with_a_reason() -> None:
    model = mlp()
    model.register_module("idle", nn.Identity())
    model[5].register_module("unused", nn.Linear(16, 16))
    conversion = convert(model, Pattern(2, 4), vectors(), selection=ALL)
    assert "never called" in conversion.choice.skipped["idle.unused"]
    assert conversion.choice.chosen == ("0", "2", "4")


def test_only_idle_layers_are_refused() -> None:
    model = nn.Sequential(nn.Identity())
    model[0].register_module("unused", nn.Linear(16, 16))
    with pytest.raises(ValueError, match=r"none of the chosen layers runs.*0\.unused"):
        convert(model, Pattern(2, 4), vectors(), selection=ALL)


def test_progress_counts_layers() -> None:
    seen: list[tuple[str, int, int]] = []
    convert(mlp(), Pattern(2, 4), vectors(), on_layer=lambda *event: seen.append(event))
    assert seen == [("0", 1, 2), ("2", 2, 2)]


def test_report_is_json() -> None:
    conversion = convert(mlp(), Pattern(2, 4), vectors())
    report = json.loads(json.dumps(conversion.to_dict(), allow_nan=False))
    assert report["layers"][0]["gemm_shape"] == [24, 16]
    assert report["layers"][0]["samples"] == 192
    assert report["skipped"] == {"4": "last layer, kept dense (keep_last = true)"}


def refuse(**changes: object) -> Conversion:
    arguments: dict[str, object] = {"model": mlp(), "pattern": Pattern(2, 4), "batches": vectors()} | changes
    return convert(**arguments)  # type: ignore[arg-type]  # the cases below are wrong on purpose


def test_bad_requests_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"unknown conversion method 'magic': choose one of least-squares"):
        refuse(method="magic")
    with pytest.raises(CalibrationError, match="batch 0 has 1024 NaN"):
        refuse(batches=[torch.full((64, 16), float("nan"))])
    with pytest.raises(ValueError, match=r"layer 0 has shape \(24, 16\) in the model and is absent"):
        refuse(reference=nn.Sequential(nn.ReLU()))


def test_bfloat16_weights_stay_bfloat16() -> None:
    model = mlp().bfloat16()
    conversion = convert(model, Pattern(2, 4), [x.bfloat16() for x in vectors()])
    weight = prunable_layer(model, "0").weight
    assert weight.dtype == torch.bfloat16
    assert conversion.layers[0].error < conversion.layers[0].error_masked
    assert not weight[~conversion.masks["0"]].any()
