"""Which channels may be renumbered, and that the network stays the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.zoo import SMALL, efficientnet_lite0, efficientnet_lite0_inputs, minilm, minilm_inputs
from tnm_pipeline.training.convert.batch import Batch, forward
from tnm_pipeline.training.convert.permutation import Chain, importances, permutable, permute
from tnm_pipeline.training.convert.tracing import trace
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.pattern import Pattern


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    result = forward(model.eval(), batch)
    result = result[0] if isinstance(result, tuple) else getattr(result, "last_hidden_state", result)
    assert isinstance(result, Tensor)
    return result


def check_renumbering(model: nn.Module, traced: Batch, other: Batch) -> dict[str, tuple[str, ...]]:
    """Renumber the channels of all chains at random and back again; returns producer -> consumers."""
    chains = permutable(trace(model, traced), model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = outputs(model, other)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(chain.channels, generator=generator) for chain in chains]
    for chain, order in zip(chains, orders, strict=True):
        permute(model, chain, order)
        weight = f"{chain.consumers[0]}.weight"
        assert not torch.equal(model.state_dict()[weight], before[weight])
    torch.testing.assert_close(outputs(model, other), expected, atol=1e-5, rtol=1e-5)
    for chain, order in zip(chains, orders, strict=True):
        permute(model, chain, order.argsort())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return {chain.producer: chain.consumers for chain in chains}


def test_bert_has_its_mlp_pairs() -> None:
    build, inputs = SMALL["bert"]
    pairs = {f"encoder.layer.{i}.intermediate.dense": (f"encoder.layer.{i}.output.dense",) for i in range(2)}
    assert check_renumbering(build(), inputs(2, 0), inputs(5, 1)) == pairs


def test_minilm_has_its_mlp_pairs() -> None:
    pairs = {f"encoder.layer.{i}.intermediate.dense": (f"encoder.layer.{i}.output.dense",) for i in range(6)}
    assert check_renumbering(minilm()[0], minilm_inputs(1, 0), minilm_inputs(4, 1)) == pairs


def test_a_vision_transformer_has_its_mlp_pairs() -> None:
    build, inputs = SMALL["vit"]
    pairs = {f"layers.{i}.mlp.0": (f"layers.{i}.mlp.2",) for i in range(2)}
    assert check_renumbering(build(), inputs(2, 0), inputs(5, 1)) == pairs


def test_a_resnet_has_the_convolutions_inside_its_blocks() -> None:
    build, inputs = SMALL["resnet"]
    basic = {f"{block}.body.0": (f"{block}.body.3",) for block in "45"}
    bottleneck = {f"{block}.body.{i}": (f"{block}.body.{i + 3}",) for block in "67" for i in (0, 3)}
    assert check_renumbering(build(), inputs(2, 0), inputs(5, 1)) == basic | bottleneck


def test_efficientnet_has_its_expansions_and_what_no_skip_reads() -> None:
    model = efficientnet_lite0()
    pairs = {f"_blocks.{i}._expand_conv": (f"_blocks.{i}._project_conv",) for i in range(1, 16)}
    pairs["_conv_stem"] = ("_blocks.0._project_conv",)
    pairs["_blocks.0._project_conv"] = ("_blocks.1._expand_conv",)
    pairs["_blocks.15._project_conv"] = ("_conv_head",)
    pairs["_conv_head"] = ("_fc",)
    found = check_renumbering(model, efficientnet_lite0_inputs(1, 0), efficientnet_lite0_inputs(1, 1))
    assert found == pairs


def test_a_chain_names_all_that_moves_along() -> None:
    model = efficientnet_lite0()
    chains = permutable(trace(model, efficientnet_lite0_inputs(1, 0)), model)
    (chain,) = [chain for chain in chains if chain.producer == "_blocks.1._expand_conv"]
    block = "_blocks.1."
    assert chain.members == (f"{block}_bn0", f"{block}_depthwise_conv", f"{block}_bn1")
    assert chain.channels == 96
    norm = ("running_mean", "running_var", "weight", "bias")
    assert chain.axes == (
        (f"{block}_expand_conv.weight", 0),
        *((f"{block}_bn0.{name}", 0) for name in norm),
        (f"{block}_depthwise_conv.weight", 0),
        *((f"{block}_bn1.{name}", 0) for name in norm),
        (f"{block}_project_conv.weight", 1),
    )


class Between(nn.Module):
    """Something between two layers of 6 channels."""

    def __init__(self, between: Callable[["Between", Tensor], object], convolutions: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first: nn.Module = nn.Conv2d(4, 6, 3, padding=1) if convolutions else nn.Linear(4, 6)
        self.second: nn.Module = nn.Conv2d(6, 4, 3, padding=1) if convolutions else nn.Linear(6, 4)
        self.other: nn.Module = nn.Conv2d(6, 2, 1) if convolutions else nn.Linear(6, 2)
        self.gate: nn.Module = nn.Conv2d(4, 6, 1) if convolutions else nn.Linear(4, 6)
        self.norm: nn.Module = nn.BatchNorm2d(6) if convolutions else nn.BatchNorm1d(6)
        self.layer_norm = nn.LayerNorm(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.grouped = nn.Conv2d(6, 6, 1, groups=3)
        self.prelu = nn.PReLU(6)
        self.scale = nn.Parameter(torch.rand((6, 1, 1) if convolutions else 6))
        self.register_buffer("mask", torch.rand(4, 4))
        self.between = between
        nn.init.uniform_(self.norm.running_mean, -1, 1)  # type: ignore[arg-type]  # a buffer
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]  # a buffer

    def forward(self, x: Tensor) -> object:
        y = self.between(self, self.first(x))
        return self.second(y) if isinstance(y, Tensor) else y


def chains_of(between: Callable[[Between, Tensor], object], convolutions: bool) -> list[Chain]:
    """The chains of the first layer, checked to keep the outputs the same."""
    model = Between(between, convolutions)
    batches = [torch.randn((2, 4, 4, 4) if convolutions else (2, 4)) for _ in range(2)]
    chains = [chain for chain in permutable(trace(model, batches[0]), model) if chain.producer == "first"]
    expected = outputs(model, batches[1]) if chains else None
    for chain in chains:
        permute(model, chain, torch.tensor([3, 0, 5, 1, 2, 4]))
        torch.testing.assert_close(outputs(model, batches[1]), expected)
    return chains


def changed_in_place(model: Between, y: Tensor) -> Tensor:
    y += 1
    y.mul_(model.scale)
    return F.relu(y, inplace=True)


@pytest.mark.parametrize(
    ("between", "members"),
    [
        (lambda m, y: y, ()),
        (lambda m, y: F.dropout(F.gelu(y), 0.5, m.training), ()),
        (lambda m, y: F.relu6(m.norm(y)), ("norm",)),
        (lambda m, y: y * torch.sigmoid(1.702 * y), ()),
        (lambda m, y: 0.5 * y * (1.0 + torch.tanh(0.8 * (y + 0.045 * y.pow(3)))), ()),
        (lambda m, y: 1 / (1 + torch.exp(-y)), ()),
        (lambda m, y: y * m.scale, ("",)),
        (changed_in_place, ("",)),
    ],
)
@pytest.mark.parametrize("convolutions", [False, True])
def test_channelwise_functions_are_passed(
    between: Callable[[Between, Tensor], object], members: tuple[str, ...], convolutions: bool
) -> None:
    (chain,) = chains_of(between, convolutions)
    assert (chain.members, chain.consumers, chain.channels) == (members, ("second",), 6)


@pytest.mark.parametrize(
    ("between", "members"),
    [
        (lambda m, y: F.relu(m.norm(m.depthwise(y))), ("depthwise", "norm")),
        (lambda m, y: F.interpolate(F.max_pool2d(F.pad(y, (1, 0, 1, 0)), 2), scale_factor=2), ()),
        (lambda m, y: F.avg_pool2d(y, 2) + F.adaptive_max_pool2d(y, 2), ()),
        (lambda m, y: y * m.mask, ()),  # the same for all channels
        (lambda m, y: y * m.scale.reshape(1, 6, 1, 1).mean(), ()),
    ],
)
def test_spatial_functions_are_passed(between: Callable[[Between, Tensor], object], members: tuple[str, ...]) -> None:
    (chain,) = chains_of(between, True)
    assert (chain.members, chain.consumers) == (members, ("second",))


def test_all_readers_are_renumbered_alike() -> None:
    (chain,) = chains_of(lambda m, y: (m.second(y) + m.other(F.relu(y)).mean(1, keepdim=True),), True)
    assert chain.consumers == ("second", "other")
    (chain,) = chains_of(lambda m, y: (m.second(F.adaptive_avg_pool2d(y, 1)) + m.other(y).mean(),), True)
    assert chain.consumers == ("second", "other")


def test_a_pooled_image_may_be_flattened() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    noise = torch.randn(2, 3, 8, 8)
    assert check_renumbering(model, noise, noise * 2) == {"0": ("4",)}
    spatial = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    assert permutable(trace(spatial, noise), spatial) == []


def test_tokens_may_be_flattened() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Flatten(0, 1), nn.ReLU(), nn.Linear(8, 4))
    assert check_renumbering(model, torch.randn(2, 3, 4), torch.randn(1, 5, 4)) == {"0": ("3",)}
    mixed = nn.Sequential(nn.Linear(4, 8), nn.Flatten(), nn.ReLU(), nn.Linear(24, 4))
    assert permutable(trace(mixed, torch.randn(2, 3, 4)), mixed) == []


@pytest.mark.parametrize(
    "between",
    [
        lambda m, y: (m.second(y) + y.mean(),),  # read elsewhere
        lambda m, y: (m.second(y), y),  # returned
        lambda m, y: (m.second(y), {"features": [F.relu(y)]}),
        lambda m, y: y + m.gate(torch.ones_like(y[:, :4])),  # the sum with something else
        lambda m, y: y * m.gate(torch.ones_like(y[:, :4])),
        lambda m, y: (m.second(y) if y.tolist() else y,),
        lambda m, y: y.flip(1),
        lambda m, y: y.cumsum(1),
        lambda m, y: y.softmax(1),
        lambda m, y: m.prelu(y),
        lambda m, y: y.sort(1).values,
        lambda m, y: y + y.mean(1, keepdim=True),
        lambda m, y: torch.cat([y[:, 3:], y[:, :3]], 1),
        lambda m, y: (m.second(y) + m.first(torch.ones_like(y[:, :4])).mean(),),  # the producer runs twice
        lambda m, y: (m.second(y) + m.second(F.relu(y)),),  # the consumer runs twice
        lambda m, y: (m.second(m.norm(y)) + m.norm.weight.sum(),),  # a parameter is used elsewhere
        lambda m, y: m.norm(m.norm(y)),
        lambda m, y: (m.second(y) + m.second.weight.sum(),),
        lambda m, y: F.batch_norm(y, None, None, training=True),
    ],
)
@pytest.mark.parametrize("convolutions", [False, True])
def test_all_else_breaks_a_chain(between: Callable[[Between, Tensor], object], convolutions: bool) -> None:
    assert chains_of(between, convolutions) == []


@pytest.mark.parametrize(
    "between",
    [
        lambda m, y: m.grouped(y),
        lambda m, y: y.transpose(1, 2).reshape(2, 6, 4, 4),
        lambda m, y: F.pad(y[:, :5], (0, 0, 0, 0, 0, 1)),
        lambda m, y: (F.conv2d(y, m.second.weight, padding=1),),  # does not run as a module
        lambda m, y: F.pixel_shuffle(y.repeat(1, 4, 1, 1), 2),
    ],
)
def test_all_else_breaks_a_chain_of_convolutions(between: Callable[[Between, Tensor], object]) -> None:
    assert chains_of(between, True) == []


@pytest.mark.parametrize(
    "between", [lambda m, y: m.layer_norm(y), lambda m, y: y.view(2, 2, 3).transpose(1, 2).reshape(2, 6)]
)
def test_all_else_breaks_a_chain_of_linear_layers(between: Callable[[Between, Tensor], object]) -> None:
    assert chains_of(between, False) == []


def test_an_order_decides_about_the_masks_of_chosen_layers() -> None:
    model = Between(lambda m, y: (m.second(y) + m.other(F.relu(y)).mean(1, keepdim=True),), True)
    (chain,) = permutable(trace(model, torch.ones(1, 4, 4, 4)), model)
    first, second = model.state_dict()["first.weight"].abs(), model.state_dict()["second.weight"].abs()
    row_wise, both_ways = Pattern(2, 4), Pattern(2, 4, transposable=True)
    (only,) = importances(model, chain, row_wise, ["first", "second"])
    assert torch.equal(only, to_gemm(second))
    consumer, producer = importances(model, chain, both_ways, ["first", "second"])
    assert torch.equal(consumer, to_gemm(second))
    assert torch.equal(producer, to_gemm(first).T)
    assert len(importances(model, chain, both_ways, ["second", "other"])) == 2
    assert importances(model, chain, both_ways, ["first"]) == []


def test_shared_weights_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    assert permutable(trace(model, torch.ones(1, 6)), model) == []


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6]])
def test_what_is_no_permutation_is_refused(order: list[int]) -> None:
    model = Between(lambda m, y: F.relu(y), False)
    (chain,) = permutable(trace(model, torch.ones(1, 4)), model)
    with pytest.raises(
        ValueError, match="not a permutation of the 6 channels between first and second: give each of 0"
    ):
        permute(model, chain, torch.tensor(order))
