"""Sparse layers against plain ones that hold the masked weight."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tnm_pipeline.training.kernels.masked import masked_weight
from tnm_pipeline.training.layers import SparseConv2d, SparseLinear, make_plain, make_sparse
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern

PATTERN = Pattern(2, 4, transposable=True)
CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(8, 12), (5, 8)),
    (nn.Linear(8, 12, bias=False), (2, 3, 8)),
    (nn.Conv2d(8, 12, 3), (2, 8, 9, 7)),
    (nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (2, 8, 9, 7)),
    (nn.Conv2d(8, 4, (1, 3), dilation=2, padding="same", padding_mode="circular"), (1, 8, 6, 6)),
]


def twins(layer: nn.Module) -> tuple[nn.Module, nn.Module, Tensor]:
    """A sparse layer, the plain one with the masked weight, and the mask."""
    generator = torch.Generator().manual_seed(0)
    sparse, plain = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.no_grad():
        for mine, other in zip(sparse.parameters(), plain.parameters(), strict=True):
            mine.copy_(torch.randn(mine.shape, generator=generator))
            other.copy_(mine)
        weight = plain.get_parameter("weight")
        mask = solve(weight, PATTERN)
        weight.mul_(mask)
    make_sparse(sparse, mask)
    return sparse, plain, mask


@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_products_and_gradients_equal_those_of_the_masked_weight(layer: nn.Module, shape: tuple[int, ...]) -> None:
    sparse, plain, mask = twins(layer)
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


def test_autocast_computes_in_the_lower_precision_and_keeps_a_full_gradient() -> None:
    sparse, plain, _ = twins(nn.Linear(8, 12))
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
def test_the_kernel_compiles_to_one_graph() -> None:
    def product(weight: Tensor, mask: Tensor, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, masked_weight(weight, mask)).square().sum()

    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(8, 8, generator=generator), torch.randn(3, 8, generator=generator)
    mask = solve(weight, PATTERN)
    gradients = []
    for function in (product, torch.compile(product, fullgraph=True, backend="aot_eager")):
        leaf = weight.clone().requires_grad_()
        function(leaf, mask, inputs).backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    torch.testing.assert_close(gradients[1], gradients[0])
