"""Samples of the output gradient: right on average, of the least variance, N:M, and used for nothing else."""

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.kernels.sampled_gradient import sampled
from tnm_pipeline.training.layers import make_sparse
from tnm_pipeline.training.masks import count_violations, solve
from tnm_pipeline.training.pattern import Pattern, PatternError

PATTERNS = ["1:2", "2:4", "1:4", "3:4", "4:8"]
DRAWS = 20_000
LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(8, 12), (8, 8)),
    (nn.Linear(8, 12, bias=False), (2, 4, 8)),
    (nn.Conv2d(8, 12, 3), (2, 8, 6, 6)),
    (nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (2, 8, 5, 7)),
    (nn.Conv2d(8, 4, (2, 3), dilation=2, padding="same", padding_mode="circular"), (1, 8, 6, 6)),
    (nn.Conv2d(8, 4, (2, 3), padding="same"), (1, 8, 6, 6)),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(group: Tensor, pattern: Pattern) -> Tensor:
    """(draws, M): independent samples of one group."""
    columns = group.unsqueeze(1).expand(-1, DRAWS)
    torch.manual_seed(0)
    return sampled(columns, pattern).T


def probabilities(group: Tensor, n: int) -> Tensor:
    """min(1, abs(x) / c) with c found by bisection so that they sum up to N."""
    magnitude = group.double().abs()
    low, high = 0.0, float(magnitude.sum())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((magnitude / middle).clamp(max=1).sum()) > n else (low, middle)
    return (magnitude / high).clamp(max=1)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("outlier", [1.0, 20.0])
def test_samples_are_right_on_average_and_have_the_least_variance(text: str, outlier: float) -> None:
    pattern = Pattern.parse(text)
    group = torch.randn(pattern.m, generator=seeded())
    group[1] *= outlier  # so large, it is always kept
    found = draws(group, pattern).double()
    kept = probabilities(group, pattern.n)
    variance = group.double().square() * (1 / kept - 1)
    error = (variance / DRAWS).sqrt()
    assert bool(((found.mean(0) - group).abs() <= 5 * error + 1e-5 * group.abs()).all())
    torch.testing.assert_close(found.var(0).sum(), variance.sum(), rtol=0.05, atol=1e-6)
    torch.testing.assert_close((found != 0).double().mean(0), kept, rtol=0, atol=0.02)
    assert bool(((found != 0).sum(1) == pattern.n).all())


def test_no_other_unbiased_estimate_varies_less() -> None:
    """Against random ones that choose a pair with any probabilities, and a uniform pair."""
    group = torch.randn(4, generator=seeded(3)).double()
    pairs = list(combinations(range(4), 2))
    weights = torch.rand(5000, len(pairs), generator=seeded(4), dtype=torch.float64).pow(4)
    weights[0] = 1.0
    weights /= weights.sum(1, keepdim=True)
    kept = torch.stack([weights[:, [k for k, pair in enumerate(pairs) if i in pair]].sum(1) for i in range(4)], 1)
    variances = (group.square() * (1 / kept - 1)).sum(1)
    ours = float(draws(group, Pattern(2, 4)).var(0).sum())
    assert ours < 1.03 * float(variances.min())
    assert ours < 0.8 * float(variances[0])  # the naive one: any two, twice as large


def test_the_same_seed_draws_the_same() -> None:
    gradient = torch.randn(8, 5, generator=seeded())
    torch.manual_seed(1)
    first = sampled(gradient)
    state = torch.get_rng_state()
    second = sampled(gradient)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(sampled(gradient), second)


@pytest.mark.parametrize("samples", [0, 1, 3, 4, 7, 8])
def test_samples_beyond_the_last_group_stay(samples: int) -> None:
    gradient = torch.randn(samples, 6, generator=seeded())
    torch.manual_seed(0)
    found = sampled(gradient)
    grouped = samples // 4 * 4
    assert torch.equal(found[grouped:], gradient[grouped:])
    assert bool(((found[:grouped].unflatten(0, (-1, 4)) != 0).sum(1) == 2).all()) if grouped else True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_type_and_the_pattern(dtype: torch.dtype) -> None:
    gradient = torch.randn(64, 33, generator=seeded()).to(dtype)
    found = sampled(gradient)
    assert found.dtype == dtype
    assert count_violations(found.T, Pattern(2, 4)).forward == 0


def test_groups_that_hold_the_pattern_are_left_alone() -> None:
    gradient = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, -1.0], [5.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(sampled(gradient), gradient)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", range(4))
def test_overflow_is_passed_on(bad: float, place: int) -> None:
    """A loss scaler that does not see it would step."""
    gradient = torch.ones(4, 200)
    gradient[place] = bad
    assert not torch.isfinite(sampled(gradient)).all(0).any()


def test_transposable_patterns_are_refused() -> None:
    with pytest.raises(PatternError, match="along the samples alone: take 2:4, not 2:4-T"):
        sampled(torch.ones(4, 4), Pattern(2, 4, transposable=True))


def twins(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The same sparse layer without and with sampling."""
    mask = solve(layer.get_parameter("weight"), Pattern(2, 4, transposable=True))
    return tuple(make_sparse(copy.deepcopy(layer), mask.clone(), sampled=on) for on in (False, True))  # type: ignore[return-value]  # two


def gradients(layer: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    outputs = layer(inputs)
    outputs.backward(torch.randn(outputs.shape, generator=seeded(5)))
    named = {"inputs": inputs.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    return {"outputs": outputs.detach(), **{name: grad for name, grad in named.items() if grad is not None}}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_all_but_the_weight_gradient_is_exact_and_that_is_on_average(layer: nn.Module, shape: tuple[int, ...]) -> None:
    exact, drawn = twins(layer)
    inputs = torch.randn(shape, generator=seeded(6))
    expected = gradients(exact, inputs)
    torch.manual_seed(0)
    found = [gradients(drawn, inputs) for _ in range(200)]
    for name in expected.keys() - {"weight"}:
        torch.testing.assert_close(found[0][name], expected[name])
    several = torch.stack([one["weight"] for one in found])
    assert not torch.equal(several[0], several[1])
    error = several.std(0) / len(found) ** 0.5
    deviations = (several.mean(0) - expected["weight"]) / error
    assert float(deviations.square().mean().sqrt()) == pytest.approx(1, abs=0.35)  # as of a mean without a bias
    assert found[0].keys() == expected.keys()


def test_a_convolution_groups_positions_of_the_product() -> None:
    """Four positions in a row of a 1 x 1 convolution on one-hot inputs show which of them were kept."""
    _, drawn = twins(nn.Conv2d(16, 4, 1, bias=False))
    inputs = torch.eye(16).reshape(1, 16, 4, 4)
    kept = gradients(drawn, inputs)["weight"].reshape(4, 16)  # (O, position)
    assert count_violations(kept, Pattern(2, 4)).forward == 0
    assert int((kept != 0).sum()) == 32


@pytest.mark.parametrize("layer", [nn.Linear(4, 8), nn.Conv2d(4, 4, 2)])
def test_the_input_gradient_passes_gradcheck(layer: nn.Module) -> None:
    _, drawn = twins(copy.deepcopy(layer).double())
    shape = (3, 4) if isinstance(layer, nn.Linear) else (1, 4, 3, 3)
    inputs = torch.randn(shape, generator=seeded(7), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(drawn, (inputs,))


@pytest.mark.parametrize(("layer", "shape"), [LAYERS[0], LAYERS[2]])
def test_autocast_computes_what_it_does_without_sampling(layer: nn.Module, shape: tuple[int, ...]) -> None:
    found: list[dict[str, Tensor]] = []
    for twin in twins(layer):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(twin, torch.randn(shape, generator=seeded(8))))
    exact, drawn = found
    assert drawn["outputs"].dtype == torch.bfloat16
    assert drawn["weight"].dtype == torch.float32
    for name in ("outputs", "inputs", "bias"):
        torch.testing.assert_close(drawn[name], exact[name], rtol=0.02, atol=0.02)


def test_a_frozen_weight_draws_nothing() -> None:
    _, drawn = twins(nn.Linear(8, 12))
    drawn.get_parameter("weight").requires_grad_(False)
    state = torch.get_rng_state()
    assert "weight" not in gradients(drawn, torch.randn(4, 8, generator=seeded()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize(("layer", "shape"), [LAYERS[0], LAYERS[3]])
def test_it_compiles_to_one_graph(layer: nn.Module, shape: tuple[int, ...]) -> None:
    _, drawn = twins(layer)
    inputs = torch.randn(shape, generator=seeded(9))
    torch.compiler.reset()
    compiled: Any = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = gradients(drawn, inputs)
    torch.manual_seed(0)
    found = gradients(compiled, inputs)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name.removeprefix("_orig_mod.")])
