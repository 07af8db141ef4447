"""Sparse layers against plain ones that hold the weight which the definition gives."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.kernels.soft_threshold import matching_scale, soft_threshold
from tnm_pipeline.training.layers import SparseConv2d, SparseLinear, make_plain, make_sparse
from tnm_pipeline.training.masks import count_violations, solve
from tnm_pipeline.training.pattern import Pattern

PATTERN = Pattern(2, 4, transposable=True)
KINDS: dict[str, dict[str, Any]] = {
    "masked": {},
    "fading": {"leak": 0.375},
    "faded out": {"leak": 0.0},
    "dense": {"leak": 1.0},
    "soft": {"soft": Pattern(2, 4)},
}
CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(8, 12), (5, 8)),
    (nn.Linear(8, 12, bias=False), (2, 3, 8)),
    (nn.Conv2d(8, 12, 3), (2, 8, 9, 7)),
    (nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (2, 8, 9, 7)),
    (nn.Conv2d(8, 4, (1, 3), dilation=2, padding="same", padding_mode="circular"), (1, 8, 6, 6)),
]


def thresholded(weight: Tensor, pattern: Pattern) -> Tensor:
    """The definition: in each M consecutive inputs, magnitudes lose the (M-N)-th smallest and stop at zero."""
    result = torch.zeros_like(weight)
    places = product(*(range(size) for size in weight.shape[2:]))
    for place, row, start in product(places, range(len(weight)), range(0, weight.shape[1], pattern.m)):
        group = [float(weight[row, start + k][place]) for k in range(pattern.m)]
        threshold = sorted(map(abs, group))[pattern.m - pattern.n - 1]
        for k, value in enumerate(group):
            result[row, start + k][place] = max(abs(value) - threshold, 0) * (1 if value > 0 else -1)
    return result


def twins(
    layer: nn.Module, leak: float | None = None, soft: Pattern | None = None
) -> tuple[nn.Module, nn.Module, Tensor]:
    """A sparse layer, the plain one with the weight that it shall multiply with, and the mask."""
    generator = torch.Generator().manual_seed(0)
    sparse, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        for mine, other in zip(sparse.parameters(), plain.parameters(), strict=True):
            mine.copy_(torch.randn(mine.shape, generator=generator))
            other.copy_(mine)
        weight = plain.get_parameter("weight")
        mask = solve(weight, PATTERN)
        if soft:
            weight.copy_(matching_scale(weight, soft) * thresholded(weight, soft))
        else:
            weight.mul_(mask + (leak or 0.0) * ~mask)
    make_sparse(sparse, mask, leak=leak, soft=soft)
    return sparse, plain, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_products_and_gradients_equal_those_of_the_defined_weight(
    layer: nn.Module, shape: tuple[int, ...], kind: str
) -> None:
    sparse, plain, mask = twins(layer, **KINDS[kind])
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mine, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    outputs, expected = sparse(mine), plain(other)
    assert torch.equal(outputs, expected)
    direction = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    outputs.backward(direction)
    expected.backward(direction)
    assert mine.grad is not None
    assert other.grad is not None
    assert torch.equal(mine.grad, other.grad)
    for parameter, twin in zip(sparse.parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None
        assert twin.grad is not None
        assert torch.equal(parameter.grad, twin.grad)  # the plain layer's gradient is dense: straight through
    weight_gradient = sparse.get_parameter("weight").grad
    assert weight_gradient is not None
    assert bool((weight_gradient[~mask] != 0).all())


def test_the_input_gradient_passes_gradcheck() -> None:
    sparse, _, _ = twins(nn.Conv2d(4, 4, 2).double())
    inputs = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.autograd.gradcheck(sparse, (inputs.requires_grad_(),))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_the_lower_precision_and_keeps_a_full_gradient(kind: str) -> None:
    sparse, plain, _ = twins(nn.Linear(8, 12), **KINDS[kind])
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        outputs, expected = sparse(inputs), plain(inputs)
    assert outputs.dtype == torch.bfloat16
    assert torch.equal(outputs, expected)
    outputs.float().sum().backward()
    gradient = sparse.get_parameter("weight").grad
    assert gradient is not None
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize(
    ("layer", "sparse_type"), [(nn.Linear(8, 4), SparseLinear), (nn.Conv2d(4, 4, 3), SparseConv2d)]
)
def test_the_swap_is_in_place_and_undone(layer: nn.Module, sparse_type: type[nn.Module]) -> None:
    layer = copy.deepcopy(layer)
    plain_type = type(layer)
    before = dict(layer.named_parameters())
    mask = solve(before["weight"], PATTERN)
    sparse = make_sparse(layer, mask)
    assert sparse is layer
    assert type(layer) is sparse_type
    assert all(layer.get_parameter(name) is parameter for name, parameter in before.items())
    assert list(layer.state_dict()) == ["weight", "bias", "mask"]
    assert make_plain(sparse) is mask
    assert type(layer) is plain_type
    assert all(layer.get_parameter(name) is parameter for name, parameter in before.items())
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(before["weight"] != 0, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_made_plain_computes_what_the_sparse_one_did(kind: str) -> None:
    sparse, plain, mask = twins(nn.Conv2d(8, 12, 3), **KINDS[kind])
    assert isinstance(sparse, SparseConv2d)
    returned = make_plain(sparse)
    assert torch.equal(sparse.weight, plain.get_parameter("weight"))
    assert torch.equal(returned, sparse.weight != 0 if kind == "soft" else mask)
    assert type(sparse) is nn.Conv2d
    assert vars(sparse).keys() == vars(plain).keys()  # nothing of the swap is left
    assert sparse._buffers == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_another_precision_reaches_the_buffers_too(kind: str, dtype: torch.dtype) -> None:
    sparse, plain, _ = twins(nn.Linear(8, 12), **KINDS[kind])
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(6)).to(dtype)
    outputs = sparse.to(dtype)(inputs)
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs, plain.to(dtype)(inputs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["fading", "soft"])
def test_leak_and_scale_travel_in_copies_and_the_state_dict(kind: str) -> None:
    sparse, _, _ = twins(nn.Linear(8, 12), **KINDS[kind])
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(7))
    expected = sparse(inputs)
    twin = copy.deepcopy(sparse)
    options: dict[str, Any] = {"leak": 0.9} if kind == "fading" else KINDS[kind]
    fresh = make_sparse(nn.Linear(8, 12), torch.ones(12, 8, dtype=torch.bool), **options)
    fresh.load_state_dict(sparse.state_dict())
    name = "leak" if kind == "fading" else "scale"
    sparse.get_buffer(name).zero_()
    assert not torch.equal(sparse(inputs), expected)
    for other in (twin, fresh):
        assert torch.equal(other(inputs), expected)


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8", "1:2", "7:16"])
def test_the_soft_threshold_is_its_definition_and_holds_the_pattern(text: str) -> None:
    pattern = Pattern.parse(text)
    for weight in (
        torch.randn(5, 2 * pattern.m, 2, 1, generator=torch.Generator().manual_seed(8)),
        torch.randint(-2, 3, (40, 2 * pattern.m), generator=torch.Generator().manual_seed(9)).float(),  # ties and zeros
    ):
        result = soft_threshold(weight, pattern)
        assert torch.equal(result, thresholded(weight, pattern))
        assert count_violations(result, pattern).forward == 0


def test_the_soft_threshold_is_continuous_where_two_weights_change_places() -> None:
    below, above = (torch.tensor([[0.1, 0.5 + shift, -0.5, 0.9]]) for shift in (-1e-6, 1e-6))
    assert not torch.equal(soft_threshold(below, Pattern(2, 4)) != 0, soft_threshold(above, Pattern(2, 4)) != 0)
    torch.testing.assert_close(
        soft_threshold(below, Pattern(2, 4)), soft_threshold(above, Pattern(2, 4)), rtol=0, atol=3e-6
    )


def test_the_scale_matches_the_dense_weight_in_least_squares() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(10))
    pattern = Pattern(2, 4)
    best = float(matching_scale(weight, pattern))
    assert best > 1  # thresholded weights are too small

    def error(scale: float) -> float:
        return float((weight - scale * thresholded(weight, pattern)).double().square().sum())

    assert all(error(best) < error(best + shift) for shift in (-0.01, 0.01))


def test_a_weight_without_differences_has_scale_one() -> None:
    """S(w) is all zero: nothing to match, and no division by it."""
    assert float(matching_scale(torch.ones(4, 8), Pattern(2, 4))) == 1.0


def test_a_deep_copy_has_its_own_mask() -> None:
    sparse, _, mask = twins(nn.Linear(8, 12))
    twin = copy.deepcopy(sparse)
    twin.get_buffer("mask").zero_()
    assert torch.equal(sparse.get_buffer("mask"), mask)
    assert type(twin) is SparseLinear
    assert bool((twin(torch.ones(1, 8)) == twin.get_parameter("bias")).all())


def test_the_mask_travels_in_the_state_dict() -> None:
    sparse, _, mask = twins(nn.Linear(8, 12))
    fresh = make_sparse(nn.Linear(8, 12), torch.zeros(12, 8, dtype=torch.bool))
    fresh.load_state_dict(sparse.state_dict())
    assert torch.equal(fresh.mask, mask)
    assert torch.equal(fresh(torch.ones(1, 8)), sparse(torch.ones(1, 8)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_compiles_to_one_graph_and_never_again(kind: str) -> None:
    sparse, _, _ = twins(nn.Linear(8, 12), **KINDS[kind])
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
    torch.compiler.reset()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")

    def gradient(layer: Any) -> Tensor:
        sparse.zero_grad()
        layer(inputs).square().sum().backward()
        result = sparse.get_parameter("weight").grad
        assert result is not None
        return result

    torch.testing.assert_close(gradient(compiled), gradient(sparse))
    before = compiled(inputs)
    with torch.no_grad():
        sparse.get_parameter("weight").mul_(-1)
        sparse.get_buffer("mask").copy_(solve(torch.randn(12, 8), PATTERN))
        if KINDS[kind].get("leak") is not None:
            sparse.get_buffer("leak").fill_(0.25)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(gradient(compiled), gradient(sparse))
        torch.testing.assert_close(compiled(inputs), sparse(inputs))
    assert not torch.equal(compiled(inputs), before)
