"""Predicted effects against what really happens to the output when a layer is changed."""

import copy
from collections.abc import Callable, Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.convert.batch import forward
from tnm_pipeline.training.convert.estimate import estimate_weight
from tnm_pipeline.training.convert.meter import Meter, Repair
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.patches import gemm_rows
from tnm_pipeline.training.convert.sensitivity import ABSORBED, Sensitivity, after_later_layers, measure_sensitivity
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Choice

PATTERN = Pattern(2, 4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(model: nn.Module, name: str) -> nn.Module:
    changed = copy.deepcopy(model)
    weight = changed.get_submodule(name).get_parameter("weight")
    with torch.no_grad():
        weight.mul_(solve(weight, PATTERN))
    return changed


def change(model: nn.Module, changed: nn.Module, batches: Sequence[Tensor]) -> float:
    """||f' - f||^2 / ||f||^2 over all batches."""
    with torch.no_grad():
        pairs = [(model(batch), changed(batch)) for batch in batches]
    return float(sum((b - a).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


def inputs_of(model: nn.Module, name: str, batches: Sequence[Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    handle.remove()
    return seen


def objective_of(model: nn.Module, name: str, batches: Sequence[Tensor]) -> Objective:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    base = to_gemm(layer.weight.detach()).double()
    rows = torch.cat([x for seen in inputs_of(model, name, batches) for x, _ in gemm_rows(layer, seen)]).double()
    return Objective.of(rows, rows @ base.T, base)


def predicted(model: nn.Module, name: str, sensitivity: Sensitivity, batches: Sequence[Tensor]) -> float:
    weight = to_gemm(masked(model, name).get_submodule(name).get_parameter("weight").detach())
    return sensitivity.effect(
        estimate_weight(objective_of(model, name, batches), weight, sensitivity.repair).squared_error
    )


def linear_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 16, bias=False), nn.Linear(16, 5, bias=False))


def test_of_a_linear_network_it_is_the_diagonal_of_the_jacobian() -> None:
    model, batch = linear_network(), drawn(50, 8)
    after = model.get_parameter("2.weight").detach() @ model.get_parameter("1.weight").detach()
    expected = after.square().sum(0).double() * 50 / model(batch).detach().square().sum()
    [sensitivity] = measure_sensitivity(model, Choice(("0",)), PATTERN, [batch], probes=200).values()
    torch.testing.assert_close(sensitivity.per_output, expected, rtol=0.15, atol=0.0)


def test_of_a_linear_network_independent_errors_have_the_effect_that_it_says() -> None:
    model, batch = linear_network(), drawn(2000, 8)
    [sensitivity] = measure_sensitivity(model, Choice(("0",)), PATTERN, [batch]).values()
    spread = torch.linspace(0.1, 2.0, 12)
    error = drawn(2000, 12, seed=1) * spread
    with torch.no_grad():
        reached = float(model[1:](error).square().sum() / model(batch).square().sum())
    independent = sensitivity.effect(spread.square()) / sensitivity.coherence
    assert independent == pytest.approx(reached, rel=0.1)


@pytest.mark.parametrize("name", ["0", "1", "2"])
def test_of_a_linear_network_masking_has_the_effect_that_it_says(name: str) -> None:
    """The input has a mean, so errors of different outputs go together: only the coherence gets this right."""
    model, batches = linear_network(), list((drawn(400, 8) + 1).split(100))
    sensitivity = measure_sensitivity(model, Choice((name,)), PATTERN, batches, probes=20)[name]
    reached = change(model, masked(model, name), batches)
    assert predicted(model, name, sensitivity, batches) == pytest.approx(reached, rel=0.1)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm2d(1).eval()])
def test_batches_of_one_example_measure_what_one_batch_of_all_does(norm: nn.Module) -> None:
    """A shift and a scale that suit all examples mend less than those that suit each."""
    model = nn.Sequential(nn.Conv2d(8, 1, 1), norm, nn.AdaptiveAvgPool2d(1))
    batch = drawn(20, 8, 3, 3) + drawn(20, 8, 1, 1, seed=1)
    together, alone = (
        measure_sensitivity(model, Choice(("0",)), PATTERN, batches, probes=1)["0"]
        for batches in ([batch], batch.split(1))
    )
    assert alone.coherence == pytest.approx(together.coherence, rel=1e-4)
    assert predicted(model, "0", alone, [batch]) == pytest.approx(predicted(model, "0", together, [batch]), rel=1e-4)


def test_each_later_layer_takes_its_share_of_an_effect() -> None:
    model, batch = linear_network(), drawn(50, 8)
    measured = measure_sensitivity(model, Choice(("2", "0", "1")), PATTERN, [batch])
    left = after_later_layers(measured, ("0", "1", "2"))
    for name, layers_after in (("0", 2), ("1", 1), ("2", 0)):
        error = torch.ones(len(measured[name].per_output))
        expected = measured[name].effect(error)
        for _ in range(layers_after):
            expected -= ABSORBED * expected
        assert left[name].effect(error) == pytest.approx(expected)


def test_errors_that_repeat_over_the_image_add_up() -> None:
    """A constant image makes the same error in all 36 places, and the mean over them spares none of it."""
    model = nn.Sequential(nn.Conv2d(8, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1))
    batch = drawn(20, 8, 1, 1).expand(20, 8, 6, 6)
    [sensitivity] = measure_sensitivity(model, Choice(("0",)), PATTERN, [batch]).values()
    assert sensitivity.coherence == pytest.approx(36)
    assert predicted(model, "0", sensitivity, [batch]) == pytest.approx(
        change(model, masked(model, "0"), [batch]), rel=1e-4
    )


class Convolutional(nn.Module):
    """Convolutions with batch norms, in-place activations and a skip, some of them scaled down."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(8))
        self.head = nn.Linear(8, 6)
        for index, norm in enumerate(self.norms):
            nn.init.constant_(norm.get_parameter("weight"), 0.15 * (1 + (3 * index) % 8))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.relu_(norm(layer(x)))
        features: Tensor = x.mean((2, 3))
        return self.head(features)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """A block of a transformer, its branches scaled."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        x = x + self.scale * self.out(mixed)
        return x + self.scale**2 * self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


def transformer() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(Attention(0.5), Attention(1.0), nn.LayerNorm(16))


def ranks(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


@pytest.mark.parametrize(
    ("build", "batches"),
    [(Convolutional, drawn(64, 8, 6, 6).split(16)), (transformer, (drawn(64, 10, 16) + 0.3).split(16))],
)
def test_of_real_builds_it_ranks_the_layers_as_trying_them_does(
    build: Callable[[], nn.Module], batches: Sequence[Tensor]
) -> None:
    model = build().train()
    for batch in batches:
        model(batch)  # sets running statistics
    model.eval()
    names = tuple(name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    measured = measure_sensitivity(model, Choice(names), PATTERN, batches, probes=4, retuned=False)
    assert tuple(measured) == names
    effects = [predicted(model, name, measured[name], batches) for name in names]
    reached = [change(model, _with_best_bias(model, name, batches), batches) for name in names]
    assert rank_correlation(effects, reached) > 0.9


def test_what_re_tuned_batch_norms_mend_does_not_count() -> None:
    model, batches = _retuned(Convolutional(), drawn(64, 8, 6, 6)), drawn(64, 8, 6, 6).split(16)
    names = tuple(f"layers.{index}" for index in range(8))
    measured = measure_sensitivity(model, Choice(names), PATTERN, batches, probes=4)
    effects = [predicted(model, name, measured[name], batches) for name in names]
    reached = [change(model, _retuned(masked(model, name), torch.cat(batches)), batches) for name in names]
    assert rank_correlation(effects, reached) > 0.9


def _retuned(model: nn.Module, batch: Tensor) -> nn.Module:
    """Running statistics anew, over one batch."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        model.train()(batch)
    return model.eval()


def _with_best_bias(model: nn.Module, name: str, batches: Sequence[Tensor]) -> nn.Module:
    """The layer masked, and its bias, where there is one, corrected as a conversion does."""
    changed = masked(model, name)
    layer, dense = changed.get_submodule(name), model.get_submodule(name)
    if layer.bias is not None:
        rows = torch.cat([x.flatten(0, -2) for x in inputs_of(model, name, batches)])
        with torch.no_grad():
            layer.get_parameter("bias").add_(
                (dense.get_parameter("weight") - layer.get_parameter("weight")) @ rows.mean(0)
            )
    return changed


def test_repairs_follow_from_what_comes_after_the_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 8, 1, bias=False),
    )  # fmt: skip
    choice, batch = Choice(("0", "2", "5", "7")), drawn(2, 8, 3, 3)
    measured = measure_sensitivity(model.eval(), choice, PATTERN, [batch])
    assert [measured[name].repair for name in choice.chosen] == ["shift and scale", "shift", "nothing", "nothing"]
    assert measure_sensitivity(model, choice, PATTERN, [batch], retuned=False)["0"].repair == "nothing"


@pytest.mark.parametrize("repair", get_args(Repair))
@pytest.mark.parametrize(
    "build", [lambda bias: nn.Linear(8, 4, bias), lambda bias: nn.Conv2d(8, 4, 3, 2, 1, bias=bias)]
)
def test_the_error_of_masking_is_the_one_that_the_objective_knows(
    repair: Repair, build: Callable[[bool], nn.Linear | nn.Conv2d]
) -> None:
    layer = build(repair == "shift")
    batch = drawn(30, 8) + 1 if isinstance(layer, nn.Linear) else drawn(5, 8, 7, 6) + 1
    meter = Meter(layer, PATTERN, before_batch_norm=repair == "shift and scale")
    assert meter.repair == repair
    meter.watch(layer, (batch,), {}, layer(batch))
    model = nn.Sequential(layer)
    weight = to_gemm(masked(model, "0").get_submodule("0").get_parameter("weight").detach())
    expected = estimate_weight(objective_of(model, "0", [batch]), weight, repair).squared_error
    torch.testing.assert_close(meter.remaining()[0] / meter.rows, expected, rtol=1e-4, atol=1e-6)
