"""Residual partners of layers: where they are, against what the models' sources say, and what is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.zoo import SMALL, efficientnet_lite0, efficientnet_lite0_inputs, minilm, minilm_inputs
from tnm_pipeline.training.convert.batch import Batch, forward
from tnm_pipeline.training.convert.dataflow import Dataflow
from tnm_pipeline.training.convert.residual import Endpoint, Residual, find_residual
from tnm_pipeline.training.convert.tracing import trace
from tnm_pipeline.training.layout import PRUNABLE


def residuals(flow: Dataflow, model: nn.Module) -> dict[str, Residual]:
    names = [name for name, module in model.named_modules() if isinstance(module, PRUNABLE)]
    found = {name: find_residual(flow, name) for name in names}
    return {name: residual for name, residual in found.items() if residual is not None}


@torch.no_grad()
def seen(model: nn.Module, batch: Batch, endpoints: dict[str, Endpoint]) -> dict[str, Tensor]:
    """The tensors at endpoints, found by nothing but hooks."""
    tensors: dict[str, Tensor] = {}
    calls: dict[int, int] = {}

    def hook(key: str, endpoint: Endpoint, side: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, result: Any = None) -> None:
            number = calls[id(note)] = calls.get(id(note), -1) + 1
            if number == endpoint.call:
                tensors[key] = endpoint.pick(args, kwargs, result).clone()

        assert side == endpoint.side
        return note

    handles = []
    for key, endpoint in endpoints.items():
        module = model.get_submodule(endpoint.module)
        if endpoint.side == "input":
            handles.append(module.register_forward_pre_hook(hook(key, endpoint, "input"), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(hook(key, endpoint, "output"), with_kwargs=True))
    forward(model, batch)
    for handle in handles:
        handle.remove()
    return tensors


def check_sums(model: nn.Module, traced: Batch, other: Batch, sums: dict[str, tuple[Endpoint, bool]]) -> None:
    """Layer -> where its source has the sum, and whether it went through a ReLU. No other layer has a partner."""
    found = residuals(trace(model, traced), model)
    assert found.keys() == sums.keys()
    for name, residual in found.items():
        total, rectified = sums[name]
        own = Endpoint(name, 0, "output", 0)
        tensors = seen(model, other, {"own": own, "partner": residual.partner, "sum": total})
        scale, shift = residual.affine(model)
        shape = (-1, 1, 1) if tensors["own"].dim() == 4 else (-1,)
        expected = tensors["own"].double() * scale.view(shape) + shift.view(shape) + tensors["partner"]
        expected = expected.relu() if rectified else expected
        torch.testing.assert_close(tensors["sum"].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", ["small", "real"])
def test_bert_adds_the_input_of_its_blocks(size: str) -> None:
    if size == "real":
        model, inputs = minilm()[0], minilm_inputs
    else:
        model, inputs = SMALL["bert"][0](), SMALL["bert"][1]  # type: ignore[assignment]  # both take a count and a seed
    sums: dict[str, tuple[Endpoint, bool]] = {}
    for name, _ in model.named_modules():
        if name.endswith("output.LayerNorm"):
            sums[name.replace("LayerNorm", "dense")] = Endpoint(name, 0, "input", 0), False
    check_sums(model, inputs(2, 0), inputs(5, 1), sums)
    flow = trace(model, inputs(2, 0))
    partner = residuals(flow, model)["encoder.layer.1.attention.output.dense"]
    assert (partner.partner, partner.before) == (Endpoint("encoder.layer.1.attention.output", 0, "input", 1), True)


def test_a_vision_transformer_adds_the_stream() -> None:
    build, inputs = SMALL["vit"]
    sums = {
        "layers.0.attention.projection": (Endpoint("layers.0.norm2", 0, "input", 0), False),
        "layers.0.mlp.2": (Endpoint("layers.1.norm1", 0, "input", 0), False),
        "layers.1.attention.projection": (Endpoint("layers.1.norm2", 0, "input", 0), False),
        "layers.1.mlp.2": (Endpoint("norm", 0, "input", 0), False),
    }
    check_sums(build(), inputs(2, 0), inputs(5, 1), sums)


def test_a_resnet_adds_its_shortcuts() -> None:
    build, inputs = SMALL["resnet"]
    last = {"4": "body.3", "5": "body.3", "6": "body.6", "7": "body.6"}
    sums = {f"{block}.{layer}": (Endpoint(block, 0, "output", 0), True) for block, layer in last.items()}
    sums |= {f"{block}.downsample.0": (Endpoint(block, 0, "output", 0), True) for block in "567"}
    check_sums(build(), inputs(2, 0), inputs(5, 1), sums)
    found = residuals(trace(build(), inputs(2, 0)), build())
    assert {name: residual.through for name, residual in found.items()} == {
        **{f"{block}.{layer}": (f"{block}.{layer[:-1]}{int(layer[-1]) + 1}",) for block, layer in last.items()},
        **{f"{block}.downsample.0": (f"{block}.downsample.1",) for block in "567"},
    }
    assert {name for name, residual in found.items() if not residual.before} == {"5.body.3", "6.body.6", "7.body.6"}


def test_efficientnet_adds_the_input_of_blocks_that_skip() -> None:
    model = efficientnet_lite0()
    skipping = [2, 4, 6, 7, 9, 10, 12, 13, 14]
    sums = {f"_blocks.{i}._project_conv": (Endpoint(f"_blocks.{i}", 0, "output", 0), False) for i in skipping}
    check_sums(model, efficientnet_lite0_inputs(1, 0), efficientnet_lite0_inputs(1, 1), sums)
    found = residuals(trace(model, efficientnet_lite0_inputs(1, 0)), model)
    assert all(residual.before for residual in found.values())
    assert found["_blocks.2._project_conv"].through == ("_blocks.2._bn2",)


class Block(nn.Module):
    """Some sum of a layer's output and something else."""

    def __init__(self, total: Callable[["Block", Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.gate = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.total = total

    def forward(self, x: Tensor) -> object:
        return self.total(self, x)


def residual_of(total: Callable[[Block, Tensor], object]) -> Residual | None:
    return find_residual(trace(Block(total), torch.ones(2, 4)), "layer")


def in_place(block: Block, x: Tensor) -> Tensor:
    y: Tensor = block.layer(x)
    y += x
    return y


def into_the_stream(block: Block, x: Tensor) -> Tensor:
    stream: Tensor = x + 1
    stream += block.layer(stream)
    return stream


@pytest.mark.parametrize(
    ("total", "partner", "before"),
    [
        (lambda block, x: x + block.layer(x), Endpoint("layer", 0, "input", 0), True),
        (lambda block, x: torch.add(block.layer(x), x), Endpoint("layer", 0, "input", 0), True),
        (in_place, Endpoint("layer", 0, "input", 0), True),
        (into_the_stream, Endpoint("layer", 0, "input", 0), True),
        (lambda block, x: block.layer(x * 2) + x, Endpoint("", 0, "input", 0), True),
        (lambda block, x: block.layer(x) + block.gate(x), Endpoint("gate", 0, "output", 0), False),
        (lambda block, x: block.gate(x) + block.layer(x), Endpoint("gate", 0, "output", 0), True),
        (lambda block, x: block.layer(x * 2).view(2, 4).clone() + x, Endpoint("", 0, "input", 0), True),
        (
            lambda block, x: [block.gate(x + 1) + block.gate(x), block.layer(x) + x],
            Endpoint("layer", 0, "input", 0),
            True,
        ),
        (lambda block, x: [block.gate(x), block.layer(x + 1) + block.gate(x)], Endpoint("gate", 1, "output", 0), False),
    ],
)
def test_forms_of_a_residual_sum(total: Callable[[Block, Tensor], object], partner: Endpoint, before: bool) -> None:
    assert residual_of(total) == Residual("layer", partner, before)


def test_scales_on_the_way_are_told() -> None:
    block = Block(lambda block, x: x + block.scale * block.norm(block.layer(x)))
    for tensor in (block.norm.weight, block.norm.bias, block.norm.running_mean, block.norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    residual = find_residual(trace(block, torch.ones(2, 4)), "layer")
    assert residual is not None
    assert residual.through == ("norm", "")
    scale, shift = residual.affine(block)
    x = torch.rand(3, 4)
    with torch.no_grad():
        sums, outputs = block.eval()(x), block.layer(x)
    torch.testing.assert_close(sums.double(), scale * outputs + shift + x)


@pytest.mark.parametrize(
    "total",
    [
        lambda block, x: block.layer(x),
        lambda block, x: F.relu(block.layer(x)) + x,
        lambda block, x: x - block.layer(x),
        lambda block, x: torch.add(x, block.layer(x), alpha=2),
        lambda block, x: block.layer(x) + block.layer(x),
        lambda block, x: block.layer(x) + 1.0,
        lambda block, x: block.layer(x) + x[:1],  # another shape
        lambda block, x: block.layer(x[:1]) + x,
        lambda block, x: torch.cat([block.layer(x), x]),
        lambda block, x: block.layer(x).view(4, 2) + x.view(4, 2),
        lambda block, x: block.layer(x) * torch.sigmoid(block.gate(x)) + x,  # a scale that depends on the data
        lambda block, x: F.batch_norm(block.layer(x), None, None, training=True) + x,
        lambda block, x: (y := block.layer(x)) + x + y.mean(),  # read elsewhere
        lambda block, x: ((y := block.layer(x)), y + x),  # returned
        lambda block, x: block.layer(x) + torch.relu(x * 2),  # no module is given it, none returns it
        lambda block, x: F.linear(x, block.layer.weight, block.layer.bias) + x,  # does not run as a module
        lambda block, x: (x + block.layer(x), block.gate(x) @ block.layer.weight),
        lambda block, x: block.layer(block.layer(x)) + x,
    ],
)
def test_other_forms_are_none(total: Callable[[Block, Tensor], object]) -> None:
    assert residual_of(total) is None


def test_a_partner_that_changes_before_it_is_added_is_not_what_the_module_gave() -> None:
    def total(block: Block, x: Tensor) -> Tensor:
        kept: Tensor = block.gate(x)
        y: Tensor = block.layer(kept)
        kept.relu_()
        return y + kept

    assert residual_of(total) is None
