"""convert() on small networks: what it stores, reports, refuses and leaves alone."""

import copy
import json
import threading

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import (
    ALL,
    Backwards,
    bias_of,
    conv_net,
    images,
    mlp,
    same_bits,
    vectors,
    violations,
    weight_of,
)
from tnm_pipeline.training.convert import (
    METHODS,
    CalibrationError,
    Conversion,
    MethodError,
    convert,
    layer_errors,
    plan_for,
    planning,
    walk,
)
from tnm_pipeline.training.convert.choosing import Scene, plan_by_preference
from tnm_pipeline.training.convert.methods import supports
from tnm_pipeline.training.convert.plan import PlanError
from tnm_pipeline.training.convert.work import measure_work
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Selection, select

QUICK = [name for name in METHODS if name != "adaprune"]  # whose thousand steps are tested once


def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the calibration passes see what the test computes, to more digits than bfloat16 has."""
    monkeypatch.setattr(walk, "prefers_bfloat16", lambda *_: False)


CASES = [(method, text) for method in QUICK for text in ("2:4", "2:4-T", "1:4", "4:8-T")]
CASES = [case for case in CASES if supports(case[0], Pattern.parse(case[1]))] + [("adaprune", "2:4-T")]


@pytest.mark.parametrize(("method", "text"), CASES)
def test_every_chosen_weight_holds_the_pattern(method: str, text: str) -> None:
    pattern = Pattern.parse(text)
    model = conv_net()
    modules, last = list(model.modules()), weight_of(model, "5").clone()
    conversion = convert(model, pattern, images(), method=method, selection=Selection())
    if pattern.m == 8:
        assert [layer.name for layer in conversion.layers] == ["3"]  # the first one has 4 inputs
    else:
        assert [layer.name for layer in conversion.layers] == ["0", "3"]
    for name, mask in conversion.masks.items():
        weight = weight_of(model, name)
        assert violations(weight, pattern) == 0
        assert not weight[~mask].any()
    assert list(model.modules()) == modules
    assert torch.equal(weight_of(model, "5"), last)
    assert conversion.batch_norms == 1


def test_methods_rank_as_they_should() -> None:
    error: dict[str, float] = {}
    for method in METHODS:
        conversion = convert(mlp(), Pattern(2, 4), vectors(), method=method, selection=ALL)
        error[method] = conversion.mean_error
        assert all(layer.error <= layer.error_masked * 1.001 for layer in conversion.layers)
    assert error["admm"] < error["least-squares"]
    assert error["least-squares"] <= error["adaprune"] * 1.05  # its damping is for data it has not seen
    assert error["adaprune"] < error["magnitude"]


def test_sequential_lowers_the_error_inside_the_converted_network() -> None:
    inside: dict[bool, float] = {}
    for sequential in (True, False):
        model = mlp()
        convert(model, Pattern(2, 4), vectors(8), selection=ALL, sequential=sequential)
        inside[sequential] = layer_errors(mlp(), model, ["4"], vectors(2, seed=9))["4"].inside
    assert inside[True] < inside[False]


@pytest.mark.parametrize("sequential", [True, False])
@torch.no_grad()
def test_reported_error_is_that_of_the_stored_layer(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_float32(monkeypatch)
    model, dense = mlp(), mlp()
    conversion = convert(model, Pattern(2, 4), vectors(), selection=ALL, sequential=sequential, reorder_channels=False)
    x = torch.cat(vectors())
    wanted = dense[:3](x)
    scale = float((wanted - bias_of(dense, "2")).norm())
    inside = float((model[:3](x) - wanted).norm()) / scale
    own = float((model[2](dense[:2](x)) - wanted).norm()) / scale
    assert conversion.layers[1].error_own == pytest.approx(own, rel=1e-4)
    assert conversion.layers[1].error == pytest.approx(inside if sequential else own, rel=1e-4)
    assert layer_errors(dense, model, ["2"], vectors())["2"].inside == pytest.approx(inside, rel=1e-4)
    assert conversion.mean_error == pytest.approx(sum(layer.error for layer in conversion.layers) / 3)


@torch.no_grad()
def test_bias_makes_mean_outputs_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    in_float32(monkeypatch)
    model, dense = mlp(), mlp()
    convert(model, Pattern(2, 4), vectors(), method="magnitude", selection=ALL)
    x = torch.cat(vectors())
    torch.testing.assert_close(model(x).mean(0), dense(x).mean(0), rtol=1e-4, atol=1e-5)


def test_no_bias_is_created() -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 4))
    convert(model, Pattern(2, 4), vectors(), selection=Selection())
    assert model[0].bias is None


def test_linear_on_sequences() -> None:
    model, flat = mlp(), mlp()
    convert(model, Pattern(2, 4), [x.reshape(8, 8, 16) for x in vectors()])
    convert(flat, Pattern(2, 4), vectors())
    torch.testing.assert_close(model.state_dict(), flat.state_dict(), rtol=1e-5, atol=1e-6)


class Residual(nn.Module):
    """Adds a scaled branch to what its first layer gives."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        result: Tensor = y + self.scale * self.last(self.middle(y).relu())
        return result


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])  # of the positions: as many as channels along one axis
def test_linear_on_images_with_channels_last_converts_as_on_rows(shape: tuple[int, int]) -> None:
    batches = [batch.view(-1, *shape, 16) for batch in vectors(examples=1024)]
    grid, rows = Residual(), Residual()
    convert(grid, Pattern(2, 4), batches, selection=ALL)
    convert(rows, Pattern(2, 4), [batch.flatten(0, 2) for batch in batches], selection=ALL)
    for layer in ("first", "middle", "last"):
        torch.testing.assert_close(weight_of(grid, layer), weight_of(rows, layer))
        torch.testing.assert_close(bias_of(grid, layer), bias_of(rows, layer))


@torch.no_grad()
def test_unstructured_checkpoint_with_dense_reference() -> None:
    dense = mlp()
    sparse = copy.deepcopy(dense)
    for name in ("0", "2"):
        weight = weight_of(sparse, name)
        weight[weight.abs() < weight.abs().median()] = 0
    weight_of(sparse, "2")[:4, :4] = 0  # a block without any magnitude
    before = copy.deepcopy(dense)
    errors: dict[str, float] = {}
    for name, reference in (("own", None), ("dense", dense)):
        model = copy.deepcopy(sparse)
        conversion = convert(
            model, Pattern(2, 4), vectors(8), reference=reference, selection=Selection(), method="least-squares",
            reorder_channels=False,
        )  # fmt: skip
        assert torch.equal(conversion.masks["0"], solve(weight_of(sparse, "0"), Pattern(2, 4)))
        errors[name] = layer_errors(dense, model, ["2"], vectors(seed=5))["2"].inside
    assert errors["dense"] < errors["own"]
    assert same_bits(dense, before)


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.a, self.b, self.last = (nn.Linear(16, 16) for _ in range(4))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.b(self.a(self.first(x).relu()).relu()).relu())
        return result


def test_a_weight_that_layers_share_is_converted_once_and_still_shared() -> None:
    model = Tied()
    conversion = convert(model, Pattern(2, 4), vectors())
    assert [(layer.name, layer.tied) for layer in conversion.layers] == [("a", ("b",))]
    assert model.a.weight is model.b.weight
    assert torch.equal(conversion.masks["a"], conversion.masks["b"])
    assert conversion.layers[0].samples == 2 * 3 * 64
    assert violations(weight_of(model, "b"), Pattern(2, 4)) == 0


class Doubling(nn.Linear):
    """Does something else than a Linear with its weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name in the base class
        return 2 * super().forward(input)


def test_what_cannot_be_converted_is_skipped_with_a_reason() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1),
        nn.Conv2d(6, 8, 1),
        nn.Flatten(),
        Doubling(8 * 12 * 12, 8),
        nn.Linear(8, 8),
        nn.Linear(8, 8),
    )
    model[5].register_module("unused", nn.Linear(16, 16))
    dense = copy.deepcopy(model)
    conversion = convert(model, Pattern(2, 4), images(), reorder_channels=False)
    assert [layer.name for layer in conversion.layers] == ["3", "7"]
    reasons = {layer.name: layer.reason for layer in conversion.plan.skipped}
    expected = {
        "0": "registered first, kept dense",
        "1": "grouped convolution (2 groups)",
        "2": "grouped convolution (8 groups)",
        "4": "6 inputs are not a multiple of 4",
        "5.unused": "does not run",
        "6": "Doubling",
        "8": "registered last, kept dense",
    }
    assert reasons.keys() == expected.keys()
    for name, words in expected.items():
        assert words in reasons[name]
        assert torch.equal(weight_of(model, name), weight_of(dense, name))


def test_a_plan_gives_each_layer_its_own_pattern() -> None:
    model = conv_net()
    patterns = [Pattern(4, 8, transposable=True), Pattern(2, 4)]
    choice = select(model, patterns, Selection(keep_last=False))
    plan = plan_by_preference(Scene(model, choice, measure_work(model, images()[0]), patterns))
    assert {name: str(pattern) for name, pattern in plan.patterns.items()} == {"0": "2:4", "3": "4:8-T", "5": "4:8-T"}
    conversion = convert(model, plan, images())
    assert conversion.plan is plan
    for layer in conversion.layers:
        assert layer.pattern == str(plan.patterns[layer.name])
        assert violations(weight_of(model, layer.name), plan.patterns[layer.name]) == 0


def test_modes_gradients_requires_grad_hooks_and_threads_are_left_alone() -> None:
    model = conv_net().train()
    model[1].eval()
    model(images()[0]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = [None if g is None else g.clone() for g in gradients]
    modes = [module.training for module in model.modules()]
    threads, torch_threads = set(threading.enumerate()), torch.get_num_threads()
    convert(model, Pattern(2, 4), images(), workers=2, reorder_channels=False)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert set(threading.enumerate()) <= threads
    assert torch.get_num_threads() == torch_threads
    for parameter, same, value in zip(model.parameters(), gradients, before, strict=True):
        assert parameter.requires_grad
        assert parameter.grad is same
        assert same is not None
        assert value is not None
        assert torch.equal(same, value)


def test_progress_counts_layers() -> None:
    seen: list[tuple[str, int, int]] = []
    convert(mlp(), Pattern(2, 4), vectors(), selection=ALL, on_layer=lambda *event: seen.append(event))
    assert seen == [("0", 1, 3), ("2", 2, 3), ("4", 3, 3)]


def test_report_is_json() -> None:
    conversion = convert(mlp(), Pattern(2, 4), vectors(), selection=Selection())
    report = json.loads(json.dumps(conversion.to_dict(), allow_nan=False))
    assert report["layers"][0]["gemm_shape"] == [24, 16]
    assert report["layers"][0]["samples"] == 192
    assert report["skipped"] == {"4": "registered last, kept dense (keep_last = true)"}


def test_bfloat16_weights_stay_bfloat16() -> None:
    model = mlp().bfloat16()
    conversion = convert(model, Pattern(2, 4), [x.bfloat16() for x in vectors()], selection=ALL)
    weight = weight_of(model, "0")
    assert weight.dtype == torch.bfloat16
    assert conversion.layers[0].error < conversion.layers[0].error_masked
    assert not weight[~conversion.masks["0"]].any()


def refuse(**changes: object) -> Conversion:
    arguments: dict[str, object] = {"model": mlp(), "pattern": Pattern(2, 4), "batches": vectors()} | changes
    return convert(**arguments)  # type: ignore[arg-type]  # the cases below are wrong on purpose


def test_bad_requests_are_refused_before_any_work() -> None:
    with pytest.raises(MethodError, match=r"unknown conversion method 'magic': choose one of admm"):
        refuse(method="magic")
    with pytest.raises(MethodError, match="sparsegpt cannot follow 2:4-T"):
        refuse(method="sparsegpt", pattern=Pattern(2, 4, transposable=True))
    dense = planning.plan(mlp(), vectors(), [Pattern(2, 4)], selection=ALL, choose="zeros")
    with pytest.raises(PlanError, match=r"leaves all 3 layers dense \(zeros .*: plan with a less sparse pattern"):
        refuse(pattern=dense)
    with pytest.raises(CalibrationError, match="no calibration batches"):
        refuse(batches=[])
    with pytest.raises(CalibrationError, match="batch 1 is empty"):
        refuse(batches=[*vectors(1), torch.ones(0, 16)])
    with pytest.raises(CalibrationError, match="batch 0 has 1024 NaN"):
        refuse(batches=[torch.full((64, 16), float("nan"))])
    with pytest.raises(ValueError, match=r"layer 2 has shape \(24, 24\) in the model and is absent in the reference"):
        refuse(reference=nn.Sequential(nn.ReLU()))
    with pytest.raises(
        ValueError, match=r"has shape \(24, 16\) in the model and has shape \(16, 16\) in the reference"
    ):
        refuse(reference=nn.Sequential(nn.Linear(16, 16)), selection=ALL)


def test_one_pattern_for_all_that_it_fits_is_planned_in_the_order_of_execution() -> None:
    plan = plan_for(Backwards(), Pattern(2, 4), vectors(width=8)[0], ALL)
    assert list(plan.patterns) == ["first", "twice", "last"]
    assert [(layer.name, layer.reason) for layer in plan.skipped] == [
        ("idle", "does not run on the first calibration batch")
    ]
