"""The sparse products and when they are used, on emulated operators; `test_cuda.py` runs the real ones."""

import copy
import io

import pytest
import torch
from torch import Tensor

from tests.training.kernels.emulation import TRANSPOSABLE, TWO_FOUR, Emulation, Layer
from tnm_pipeline.training.kernels.semi_structured import PackedWeight, sparse_linear
from tnm_pipeline.training.pattern import Pattern


def products(layer: Layer, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, and gradients of input, weight and bias, under autocast."""
    layer.zero_grad()
    inputs = inputs.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    output.backward(gradient)
    parameters = [parameter.grad for parameter in layer.parameters()]
    found = [output.detach(), inputs.grad, *parameters]
    assert all(tensor is not None for tensor in found)
    return [tensor for tensor in found if tensor is not None]


def random_case(layer: Layer, *leading: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(*leading, layer.in_features, generator=generator)
    return inputs, torch.randn(*leading, layer.out_features, generator=generator).bfloat16()


@pytest.mark.parametrize("leading", [(7,), (2, 3), (0,), ()])
@pytest.mark.parametrize(
    ("pattern", "bias", "calls"), [(TRANSPOSABLE, True, 2), (TRANSPOSABLE, False, 2), (TWO_FOUR, True, 1)]
)
def test_products_and_gradients_are_those_of_the_masked_weight(
    emulation: Emulation, pattern: Pattern, bias: bool, calls: int, leading: tuple[int, ...]
) -> None:
    layer = Layer(32, 48, pattern, bias=bias)
    case = random_case(layer, *leading)
    expected = products(layer, *case)
    assert emulation.products == 0
    layer.refresh()
    found = products(layer, *case)
    assert emulation.products == calls  # forward, and the input gradient where W^T is 2:4 too
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=0.02, atol=0.02)
    if leading == (7,):
        assert (found[2][~layer.mask] != 0).any()  # the weight gradient is dense


def test_a_prepared_weight_gives_the_very_bits_of_the_masked_kernel() -> None:
    layer = Layer(32, 48, Pattern(4, 8))
    case = random_case(layer, 7)
    expected = products(layer, *case)
    assert layer.packed is not None
    layer.packed.sparse_products = 0
    layer.refresh()
    found = products(layer, *case)
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(found[3], expected[3], rtol=0.02)  # the sum for the bias is taken in float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_a_short_format_needs_no_autocast(emulation: Emulation, dtype: torch.dtype) -> None:
    layer = Layer(32, 16, TRANSPOSABLE).to(dtype)
    layer.refresh(dtype)
    inputs = torch.randn(8, 32, dtype=dtype)
    output = layer(inputs)
    assert emulation.products == 1
    assert torch.allclose(output, torch.nn.functional.linear(inputs, layer.weight * layer.mask, layer.bias), atol=2e-2)
    output.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == dtype


def test_one_pack_serves_all_micro_batches_and_follows_every_change(emulation: Emulation) -> None:
    layer = Layer(32, 32, TRANSPOSABLE)
    inputs, gradient = random_case(layer, 8)
    layer.refresh()
    for _ in range(3):
        products(layer, inputs, gradient)
    assert emulation.packs == 2  # W and W^T, once
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    expected = inputs.bfloat16() @ (layer.weight * layer.mask).bfloat16().t() + layer.bias.bfloat16()
    assert torch.allclose(products(layer, inputs, gradient)[0], expected, rtol=0.02, atol=0.02)
    assert emulation.packs == 4
    layer.mask.copy_(layer.mask.flip(0))
    products(layer, inputs, gradient)
    assert emulation.packs == 6
    layer.load_state_dict({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    products(layer, inputs, gradient)
    assert emulation.packs == 8
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    products(layer, inputs, gradient)
    assert emulation.packs == 10


def test_it_serves_training_in_its_own_format_only(emulation: Emulation) -> None:
    layer = Layer(32, 32, TRANSPOSABLE)
    layer.refresh()
    inputs = torch.randn(8, 32)
    layer(inputs)  # float32
    with torch.autocast("cpu", torch.float16):
        layer(inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(inputs)
    assert layer.packed is not None
    short = layer.weight.bfloat16()
    layer.packed.refresh(short, layer.mask, torch.bfloat16)
    assert layer.packed.serves(inputs.bfloat16(), short, layer.mask)
    assert not layer.packed.serves(inputs.bfloat16().to("meta"), short, layer.mask)
    layer.packed.invalidate()
    with torch.autocast("cpu", torch.bfloat16):
        layer(inputs)
    assert emulation.products == 0


def test_an_empty_pack_remembers_what_it_was_asked_for() -> None:
    layer = Layer(32, 16, TRANSPOSABLE)

    def asked() -> tuple[int, torch.dtype | None] | None:
        assert layer.packed is not None
        return layer.packed.asked

    with torch.no_grad():
        layer(torch.randn(8, 32))
    assert asked() is None
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 5, 32))
    assert asked() == (10, torch.bfloat16)
    layer(torch.randn(3, 32))
    assert asked() == (3, torch.float32)


def test_copies_are_empty_and_no_checkpoint_holds_a_pack(emulation: Emulation) -> None:
    layer = Layer(32, 16, TRANSPOSABLE)
    layer.refresh()
    assert set(layer.state_dict()) == {"weight", "bias", "mask"}
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.packed is not None
        assert other.packed.forward is None
        assert other.packed.backward is None
        assert other.packed.sparse_products == 2
        case = random_case(layer, 4)
        for one, two in zip(products(other, *case), products(layer, *case), strict=True):
            assert torch.allclose(one, two, rtol=0.02, atol=0.02)


def test_a_pack_made_in_inference_mode_can_be_trained_with(emulation: Emulation) -> None:
    layer = Layer(32, 16, TRANSPOSABLE)
    with torch.inference_mode():
        layer.refresh()
    products(layer, *random_case(layer, 8))
    assert emulation.products == 2


def test_a_second_derivative_is_refused_rather_than_wrong(emulation: Emulation) -> None:
    layer = Layer(32, 16, TRANSPOSABLE)
    layer.refresh()
    inputs = torch.randn(8, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(layer(inputs).float().square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_operators_exist_on_cuda_only() -> None:
    packed = PackedWeight(2)
    with pytest.raises(NotImplementedError, match=r"pack_two_four.*CPU"):
        packed.refresh(torch.zeros(16, 16), torch.ones(16, 16, dtype=torch.bool), torch.bfloat16)


def test_the_fake_product_is_as_the_real_one(emulation: Emulation) -> None:
    layer = Layer(32, 16, TRANSPOSABLE)
    layer.refresh()
    assert layer.packed is not None
    operator = torch.ops.tnm_pipeline.packed_product.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (torch.randn(7, 32).bfloat16(), layer.packed.forward, None), test_utils=tests)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile's own doing
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_whole_and_follows_refresh_and_invalidate(emulation: Emulation, dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = Layer(32, 48, TRANSPOSABLE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)

    def check(tokens: int, calls: int) -> None:
        before = emulation.products
        inputs = random_case(layer, tokens)[0].requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = compiled(inputs)
        output.float().square().sum().backward()
        assert emulation.products - before == calls
        again = inputs.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            expected = torch.nn.functional.linear(again, layer.weight * layer.mask, layer.bias)
        expected.float().square().sum().backward()
        assert torch.allclose(output, expected, rtol=0.02, atol=0.05)
        assert inputs.grad is not None
        assert again.grad is not None
        assert torch.allclose(inputs.grad, again.grad, rtol=0.02, atol=0.1)

    assert layer.packed is not None
    check(8, 0)
    assert layer.packed.asked == (8, torch.bfloat16)
    layer.refresh()
    check(8, 2)
    with torch.no_grad():
        layer.weight.mul_(-2)
    layer.refresh()
    check(8, 2)
    check(24, 2)
    layer.packed.invalidate()
    check(24, 0)


def test_sparse_linear_wants_to_be_asked_first() -> None:
    with pytest.raises(AssertionError, match="ask `serves` first"):
        sparse_linear(torch.zeros(1, 16), torch.zeros(16, 16), PackedWeight(2), None)
