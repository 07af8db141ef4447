"""Models of every build are measured without being changed: their outputs, padding, shared and derived layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.convert.batch import Batch, CalibrationError
from tnm_pipeline.training.convert.sensitivity import measure_sensitivity
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.selection import Choice

PATTERN = Pattern(2, 4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5))


def test_the_model_comes_back_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 2)
    ).train()
    model[4].requires_grad_(False)
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    asked = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        measure_sensitivity(model, Choice(("0", "4")), PATTERN, [drawn(4, 8, 5, 5)])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_same_arguments_give_the_same_bits() -> None:
    model, batches = network(), list(drawn(8, 5, 8).split(3))
    choice = Choice(("0", "2"))

    def measure(seed: int) -> dict[str, float]:
        measured = measure_sensitivity(model, choice, PATTERN, batches, seed=seed)
        return {name: one.effect(torch.ones_like(one.per_output)) for name, one in measured.items()}

    assert measure(5) == measure(5)
    assert measure(5) != measure(6)


class Padded(nn.Module):
    """Takes named inputs and returns a mapping, as sentence encoders do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, features: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        states = self.second(torch.tanh(self.first(features)))
        shares = attention_mask / attention_mask.sum(1, keepdim=True)
        return {"states": states, "pooled": (states * shares[..., None]).sum(1), "ids": attention_mask}


def test_padding_counts_neither_in_layers_nor_in_outputs() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    features = drawn(3, 4, 8)
    garbage = torch.where(mask[..., None].bool(), features, 1e3 * drawn(3, 4, 8, seed=1))
    choice = Choice(("first", "second"))
    batches: list[Batch] = [{"features": x, "attention_mask": mask} for x in (features, garbage)]
    clean, dirty = (measure_sensitivity(Padded(), choice, PATTERN, [batch], probes=3) for batch in batches)
    for name in choice.chosen:
        torch.testing.assert_close(clean[name].per_output, dirty[name].per_output)
        assert clean[name].coherence == pytest.approx(dirty[name].coherence)


class Shared(nn.Module):
    """One weight in two layers."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.a, self.b, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight if tied else nn.Parameter(self.a.weight.detach().clone())

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = self.a(x)
        return y, [self.b(torch.tanh(y))]


def test_layers_that_share_a_weight_are_measured_together_and_idle_ones_not() -> None:
    batch = drawn(40, 8)
    tied = measure_sensitivity(Shared(True), Choice(("a",), tied={"a": ("b",)}), PATTERN, [batch])
    apart = measure_sensitivity(Shared(False), Choice(("a", "b", "idle")), PATTERN, [batch])
    assert list(tied) == ["a"]
    assert list(apart) == ["a", "b"]
    torch.testing.assert_close(tied["a"].per_output, apart["a"].per_output + apart["b"].per_output)


def test_the_fused_path_of_torch_does_not_hide_layers() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    measured = measure_sensitivity(model, Choice(("layers.0.linear1", "layers.0.linear2")), PATTERN, [drawn(3, 5, 8)])
    assert all(one.per_output.sum() > 0 for one in measured.values())


class OwnPadding(nn.Conv2d):
    """Pads by itself, as some published networks do."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as in the class it derives from
        return super().forward(F.pad(input, (1, 1, 1, 1)))


def test_a_derived_class_is_measured_by_its_own_forward() -> None:
    plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 3))
    derived = copy.deepcopy(plain)
    derived[0] = OwnPadding(8, 8, 3)
    derived.load_state_dict(plain.state_dict())
    batch, choice = drawn(6, 8, 4, 4), Choice(("0",))
    expected, measured = (measure_sensitivity(model, choice, PATTERN, [batch])["0"] for model in (plain, derived))
    torch.testing.assert_close(measured.per_output, expected.per_output)
    assert measured.coherence == pytest.approx(expected.coherence)


def test_a_layer_that_masking_does_not_change_has_no_coherence_to_measure() -> None:
    model = network()
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(solve(model.get_parameter("0.weight"), PATTERN))
    [sensitivity] = measure_sensitivity(model, Choice(("0",)), PATTERN, [drawn(10, 8)]).values()
    assert sensitivity.coherence == 1.0


class Ends(nn.Module):
    def __init__(self, end: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer, self.end = nn.Linear(8, 8), end

    def forward(self, x: Tensor) -> object:
        return self.end(self.layer(x))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda y: y.argmax(1), "none of the floating-point outputs .* give a model that returns logits"),
        (lambda y: y.detach(), "none of the floating-point outputs"),
        (lambda y: y * float("nan"), "add up to nan"),
        (lambda y: y * 0, "add up to 0"),
        (lambda y: (y - y.detach()).clamp(min=0).sqrt() + 1, "layer layer meets NaN or Inf .* in the gradients"),
    ],
)
def test_outputs_that_nothing_can_be_measured_by_are_an_error(end: Callable[[Tensor], object], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        measure_sensitivity(Ends(end), Choice(("layer",)), PATTERN, [drawn(4, 8)])


def test_batches_are_checked() -> None:
    with pytest.raises(CalibrationError, match="no calibration batches"):
        measure_sensitivity(network(), Choice(("0",)), PATTERN, [])
