"""Linear products by panels against the masked kernel that they stand in for."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tnm_pipeline.training.kernels import masked_linear as module
from tnm_pipeline.training.kernels.masked import masked_weight
from tnm_pipeline.training.kernels.masked_linear import by_panels, masked_linear
from tnm_pipeline.training.layers import SparseLinear, make_sparse


@pytest.fixture
def panels_of_six(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight is large, and a panel has six rows at most."""
    monkeypatch.setattr(module, "_COPIED", 0)
    monkeypatch.setattr(module, "_PANEL", 0)
    monkeypatch.setattr(module, "_LEAST_ROWS", 6)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse(inputs: int, outputs: int, *, bias: bool = True, leak: float | None = None) -> SparseLinear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(random(outputs, inputs))
    made = make_sparse(layer, random(outputs, inputs, seed=1) > 0, leak=leak)
    assert isinstance(made, SparseLinear)
    return made


def whole(layer: SparseLinear, inputs: Tensor) -> Tensor:
    """The definition."""
    return F.linear(inputs, masked_weight(layer.weight, layer.mask, layer.leak), layer.bias)


def keep_in(saved: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook that notes what autograd saves."""

    def keep(part: Tensor) -> Tensor:
        saved.append(part)
        return part

    return keep


def gradients(outputs: Tensor, inputs: Tensor, layer: SparseLinear) -> list[Tensor]:
    """Of the input and of all parameters, for one output gradient."""
    wanted = [part for part in (inputs, *layer.parameters()) if part.requires_grad]
    return list(torch.autograd.grad(outputs, wanted, random(*outputs.shape, seed=3)))


@pytest.mark.usefixtures("panels_of_six")
@pytest.mark.parametrize("leak", [None, 0.0, 0.375, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (8,), (2, 3, 8), (0, 8), (2, 0, 8)])
@pytest.mark.parametrize("outputs", [1, 6, 7, 20])
def test_products_and_gradients_are_those_of_the_whole_masked_weight(
    outputs: int, shape: tuple[int, ...], bias: bool, leak: float | None
) -> None:
    layer = sparse(8, outputs, bias=bias, leak=leak)
    inputs = random(*shape, seed=2).requires_grad_()
    assert by_panels(inputs, layer.weight)
    found, expected = layer(inputs), whole(layer, inputs)
    assert "MaskedLinear" in str(found.grad_fn.next_functions if found.grad_fn else ())
    torch.testing.assert_close(found, expected)
    for mine, other in zip(gradients(found, inputs, layer), gradients(expected, inputs, layer), strict=True):
        torch.testing.assert_close(mine, other)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 7), st.booleans(), st.booleans())
def test_any_sizes_and_strides(outputs: int, inputs: int, tokens: int, rows: int, turned: bool, gaps: bool) -> None:
    weight = random(inputs, outputs).t() if turned else random(outputs, inputs)
    mask = random(outputs, 2 * inputs, seed=1)[:, ::2] > 0 if gaps else random(outputs, inputs, seed=1) > 0
    entries = random(tokens, 2 * inputs, seed=2)[:, ::2] if gaps else random(tokens, inputs, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PANEL", 0)
        patch.setattr(module, "_LEAST_ROWS", rows)
        for part in (entries, weight):
            part.requires_grad_()
        found, expected = (
            masked_linear(entries, weight, mask, None, None),
            F.linear(entries, masked_weight(weight, mask)),
        )
        torch.testing.assert_close(found, expected)
        direction = random(outputs, tokens, seed=3).t()
        mine, other = (torch.autograd.grad(output, (entries, weight), direction) for output in (found, expected))
        torch.testing.assert_close(mine, other)


@pytest.mark.usefixtures("panels_of_six")
def test_gradients_of_gradients_are_those_of_the_whole_masked_weight() -> None:
    """Straight through, these are no derivatives: they are compared instead of checked by differences."""
    layer = sparse(8, 20, leak=0.25)
    inputs = random(5, 8, seed=2).requires_grad_()
    results = []
    for output in (layer(inputs), whole(layer, inputs)):
        first = torch.autograd.grad(output.square().sum(), (inputs, layer.weight), create_graph=True)
        penalty = torch.stack([part.square().sum() for part in first]).sum()
        results.append([*first, *torch.autograd.grad(penalty, (inputs, layer.weight))])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.usefixtures("panels_of_six")
def test_gradients_that_nobody_wants_are_not_computed_and_nothing_is_kept_for_them() -> None:
    layer = sparse(8, 20)
    inputs = random(5, 8, seed=2)
    for frozen, wanting in ((False, False), (True, True), (True, False)):
        layer.requires_grad_(not frozen)
        mine = inputs.clone().requires_grad_(wanting)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(keep_in(saved), lambda part: part):
            output = layer(mine)
        assert output.requires_grad is (wanting or not frozen)
        assert [part.shape for part in saved] == [inputs.shape] * (not frozen) + [layer.weight.shape] * wanting
        if output.requires_grad:
            torch.testing.assert_close(gradients(output, mine, layer), gradients(whole(layer, mine), mine, layer))
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs), whole(layer, inputs))


@pytest.mark.usefixtures("panels_of_six")
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_what_follows_may_work_in_place(shape: tuple[int, ...]) -> None:
    layer = sparse(8, 20)
    inputs = random(*shape, seed=2).requires_grad_()
    found = gradients(F.relu(layer(inputs), inplace=True), inputs, layer)
    torch.testing.assert_close(found, gradients(F.relu(whole(layer, inputs)), inputs, layer))


@pytest.mark.usefixtures("panels_of_six")
def test_masks_that_are_sent_around_between_two_passes_do_no_harm() -> None:
    """As DDP does with buffers before each forward pass, while another one still waits for its backward pass."""
    layer = sparse(8, 20, leak=0.5)
    inputs = random(5, 8, seed=2).requires_grad_()
    output = layer(inputs)
    expected = gradients(whole(layer, inputs), inputs, layer)
    for buffer in layer.buffers():
        buffer.copy_(buffer.clone())
    torch.testing.assert_close(gradients(output, inputs, layer), expected)


@pytest.mark.usefixtures("panels_of_six")
def test_a_weight_that_changes_before_the_backward_pass_is_refused_as_in_a_plain_layer() -> None:
    layer = sparse(8, 20)
    output = layer(random(5, 8, seed=2).requires_grad_())
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.usefixtures("panels_of_six")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_and_copies_give_the_same_gradients(reentrant: bool) -> None:
    layer = sparse(8, 20)
    inputs = random(5, 8, seed=2).requires_grad_()
    results = []
    for twin in (layer, copy.deepcopy(layer)):
        for output in (twin(inputs), checkpoint(twin, inputs, use_reentrant=reentrant)):
            twin.zero_grad()
            inputs.grad = None
            output.square().sum().backward()
            results.append([part.grad.clone() for part in (inputs, *twin.parameters()) if part.grad is not None])
    assert all(len(found) == 3 for found in results)
    for found in results[1:]:
        assert all(torch.equal(mine, other) for mine, other in zip(found, results[0], strict=True))


@pytest.mark.usefixtures("panels_of_six")
def test_a_layer_may_be_traced_by_fx_and_traces_the_same() -> None:
    layer = sparse(8, 20)
    inputs = random(5, 8, seed=2)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(inputs), whole(layer, inputs))


@pytest.mark.usefixtures("panels_of_six")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_sentences_of_different_lengths_may_come_as_a_nested_tensor() -> None:
    layer = sparse(8, 20)
    parts = [random(3, 8), random(5, 8, seed=2)]
    for layout in (torch.strided, torch.jagged):
        outputs = layer(torch.nested.nested_tensor(parts, layout=layout)).unbind()
        for output, part in zip(outputs, parts, strict=True):
            torch.testing.assert_close(output, whole(layer, part))


def test_what_is_left_to_the_whole_masked_weight() -> None:
    large, inputs = torch.ones(2048, 1024), torch.ones(2, 1024)
    assert by_panels(inputs, large)
    assert by_panels(inputs, nn.Parameter(large))
    assert not by_panels(inputs[:, :8], large[:8, :8])
    assert not by_panels(inputs.bfloat16(), large.bfloat16())  # panels would be summed up in bfloat16
    assert not by_panels(inputs.double(), large)  # `linear` says what is wrong
    assert not by_panels(inputs.to("meta"), large.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_panels(inputs, large)
    seen = []

    def traced(tensor: Tensor) -> Tensor:
        seen.append(by_panels(tensor, large))
        return tensor

    torch.compile(traced, backend="eager")(inputs)
    assert seen == [False]
