"""The real sparse products, on a GPU with sparse tensor cores: run with `pytest -m gpu`."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.kernels.emulation import TRANSPOSABLE, TWO_FOUR, Layer
from tnm_pipeline.training.backend import Packs, format_table
from tnm_pipeline.training.kernels.prepare import masked_cast_both
from tnm_pipeline.training.kernels.support import why_never, why_not_now
from tnm_pipeline.training.pattern import Pattern

pytestmark = pytest.mark.gpu

SHORT = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def able() -> None:
    """Skips with the reason that a user would read."""
    reason = why_never(torch.zeros(16, 16), TRANSPOSABLE) or why_not_now(torch.zeros(16, 16).cuda(), torch.bfloat16)
    if reason:
        pytest.skip(reason)


def layer_on_gpu(inputs: int, outputs: int, pattern: Pattern = TRANSPOSABLE, *, bias: bool = True) -> Layer:
    torch.manual_seed(0)
    return Layer(inputs, outputs, pattern, bias=bias).cuda()


def relative(found: Tensor, right: Tensor) -> float:
    """Largest difference over the largest value, in float64; NaN where anything is not a number."""
    return float((found.double() - right.double()).abs().max() / right.double().abs().max())


def with_gradients(forward: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], inputs: Tensor) -> list[Tensor]:
    """Output, and gradients of input and parameters, of a loss whose gradient is not contiguous."""
    inputs = inputs.detach().requires_grad_()
    output = forward(inputs)
    turned = output.mT.contiguous()
    weights = torch.linspace(-1, 1, output.shape[-1], device="cuda", dtype=output.dtype).unsqueeze(1)
    return [output.detach(), *torch.autograd.grad((turned * turned * weights).sum(), [inputs, *parameters])]


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("sides", [(16, 16), (32, 48), (64, 1040), (1040, 64), (768, 3072), (4096, 4096)])
def test_packs_hold_exactly_the_masked_weight_and_its_transpose(sides: tuple[int, int], dtype: torch.dtype) -> None:
    layer = layer_on_gpu(*sides)
    layer.refresh(dtype)
    assert layer.packed is not None
    expected = masked_cast_both(layer.weight, layer.mask, dtype)
    for packed, matrix in zip((layer.packed.forward, layer.packed.backward), expected, strict=True):
        unit = torch.eye(matrix.shape[1], dtype=dtype, device="cuda")
        assert torch.equal(torch.ops.tnm_pipeline.packed_product(unit, packed, None), matrix.t())


@pytest.mark.parametrize("leading", [(256,), (1,), (7,), (3, 5, 9), (4097,), (0,)])
@pytest.mark.parametrize(("pattern", "bias"), [(TRANSPOSABLE, True), (TRANSPOSABLE, False), (TWO_FOUR, True)])
@pytest.mark.parametrize("dtype", SHORT)
def test_products_and_gradients_are_those_of_the_masked_weight(
    dtype: torch.dtype, pattern: Pattern, bias: bool, leading: tuple[int, ...]
) -> None:
    layer = layer_on_gpu(512, 768, pattern, bias=bias)
    layer.refresh(dtype)
    assert layer.packed is not None
    inputs, parameters = torch.randn(*leading, 512, device="cuda"), list(layer.parameters())
    with torch.autocast("cuda", dtype):
        found = with_gradients(layer, parameters, inputs)
        layer.packed.invalidate()
        right = with_gradients(layer, parameters, inputs)
    for one, other in zip(found, right, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if one.numel() and other.abs().max() > 0:
            assert relative(one, other) < 1e-2


def test_operands_of_any_strides_and_addresses() -> None:
    layer = layer_on_gpu(64, 128, bias=False)
    layer.refresh()
    assert layer.packed is not None
    product = torch.ops.tnm_pipeline.packed_product
    memory = torch.randn(64 * 64 + 8, device="cuda", dtype=torch.bfloat16)
    used = (layer.weight * layer.mask).bfloat16().detach()
    for dense in (
        memory[: 64 * 64].view(64, 64).t(),
        memory[1 : 64 * 64 + 1].view(64, 64),
        memory[3 : 64 * 64 + 3].view(64, 64)[::2],
        memory[:64].expand(24, 64),
    ):
        found = product(dense, layer.packed.forward, None)
        assert found.is_contiguous()
        assert relative(found, F.linear(dense, used)) < 1e-2


def test_another_stream_sees_what_was_packed() -> None:
    layer = layer_on_gpu(1024, 1024)
    inputs = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.autocast("cuda", torch.bfloat16):
        layer.refresh()
        found = layer(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    right = F.linear(inputs, (layer.weight * layer.mask).bfloat16(), layer.bias.bfloat16())
    assert relative(found.detach(), right.detach()) < 1e-2


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_it_compiles_whole_and_follows_refresh() -> None:
    layer = layer_on_gpu(256, 512)
    compiled = torch.compile(layer, fullgraph=True)
    inputs, parameters = torch.randn(64, 256, device="cuda"), list(layer.parameters())
    for _ in range(3):
        layer.refresh()
        with torch.autocast("cuda", torch.bfloat16):
            found = with_gradients(compiled, parameters, inputs)
            right = with_gradients(layer, parameters, inputs)
        assert all(relative(one, other) < 1e-2 for one, other in zip(found, right, strict=True))
        with torch.no_grad():
            layer.weight.mul_(-1.5)


@pytest.mark.parametrize("backend", ["auto", "sparse"])
def test_a_training_packs_checks_and_learns(backend: str) -> None:
    parts = {"first": layer_on_gpu(1024, 2048), "second": layer_on_gpu(2048, 1024), "odd": layer_on_gpu(1024, 24)}
    for layer in parts.values():
        layer.packed = None
    model = nn.Sequential(*parts.values())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if backend == "sparse":
        with pytest.warns(UserWarning, match="1 of 3 layers .* odd for one: 24 x 1024: both sides must be multiples"):
            packs = Packs(parts, TRANSPOSABLE, "sparse")
    else:
        packs = Packs(parts, TRANSPOSABLE, "auto")
    inputs, targets = torch.randn(1024, 1024, device="cuda"), torch.randn(1024, 24, device="cuda")
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        packs.after_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    table = format_table(packs.table())
    assert "wrong" not in table
    assert "fail" not in table
    if backend == "sparse":
        assert [row.chosen for row in packs.table()] == ["sparse", "sparse", "masked"]
