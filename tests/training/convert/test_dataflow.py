"""What a recorded forward pass shows, and what it refuses."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.zoo import SMALL
from tnm_pipeline.training.convert.dataflow import Dataflow, ModuleCall
from tnm_pipeline.training.convert.tracing import DataflowError, trace
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern


class Body(nn.Module):
    """A linear layer, and a function of its output."""

    def __init__(self, body: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dropout = nn.Dropout()
        self.body = body

    def forward(self, x: Tensor) -> object:
        return self.body(self.dropout(self.layer(x)))


def record(body: Callable[[Tensor], object]) -> Dataflow:
    return trace(Body(body), torch.ones(2, 4))


def functions(flow: Dataflow) -> list[str]:
    return [call.function for call in flow.calls]


def readers_of_layer(body: Callable[[Tensor], object]) -> list[str]:
    """The functions that read the output of the layer."""
    flow = record(body)
    (call,) = [call for call in flow.module_calls if call.module == "layer"]
    return [reader.function for reader in flow.readers(call.outputs[0])]


def test_functions_come_with_their_arguments_and_modules() -> None:
    flow = record(lambda y: torch.add(y, 1, alpha=2))
    linear, addition = flow.calls
    assert (linear.function, linear.modules) == ("linear", ("", "layer"))
    assert [flow.values[number].names for number in linear.inputs] == [(), ("layer.weight",), ("layer.bias",)]
    assert (addition.function, addition.modules) == ("add", ("",))
    assert addition.inputs == linear.outputs
    assert (addition.argument(1, "other"), addition.argument(2, "alpha", 1)) == (1, 2)
    assert addition.argument(3, "out") is None
    assert flow.returned == set(addition.outputs)
    assert flow.users("layer.weight") == [linear]
    assert flow.name(linear.arguments[1]) == "layer.weight"
    assert flow.shape(linear.arguments[0]) == (2, 4)


def test_module_calls_come_in_order_with_their_tensors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            return {"first": self.layer(x), "second": self.layer(x * scale)}

    flow = trace(Twice(), {"x": torch.ones(1, 4), "scale": torch.ones(1)})
    model, first, second = flow.module_calls
    assert [(call.module, call.index) for call in flow.module_calls] == [("", 0), ("layer", 0), ("layer", 1)]
    assert model.entered < first.entered < first.left < second.entered < second.left < model.left
    assert first.inputs[0] == model.inputs["x"] != second.inputs[0]
    assert model.outputs == {"first": first.outputs[0], "second": second.outputs[0]}
    assert len(flow.users("layer.weight")) == 2


def test_functions_that_change_nothing_are_left_out() -> None:
    flow = record(lambda y: F.dropout(y.contiguous().to(torch.float32), 0.5, training=False))
    assert functions(flow) == ["linear"]
    assert flow.returned == set(flow.calls[0].outputs)


def test_shapes_are_no_reading_and_numbers_are() -> None:
    assert readers_of_layer(lambda y: torch.zeros(y.shape[0], y.size(1), y.dim())) == []
    assert readers_of_layer(lambda y: torch.tensor(y.tolist())) == ["tolist"]
    assert readers_of_layer(lambda y: torch.from_numpy(y.numpy()) * 2) == ["numpy", "alias"]
    assert readers_of_layer(lambda y: torch.ones(2) if y.sum() > 0 else torch.zeros(2)) == ["sum"]


def test_an_in_place_function_makes_a_new_value() -> None:
    def body(y: Tensor) -> Tensor:
        y += 1
        return y.relu_()

    flow = record(body)
    assert functions(flow) == ["linear", "add_", "relu_"]
    values = [flow.calls[0].inputs[0], *(call.outputs[0] for call in flow.calls)]
    assert len(set(values)) == 4
    assert [flow.calls[1].inputs, flow.calls[2].inputs] == [(values[1],), (values[2],)]


@pytest.mark.parametrize("change", [lambda v: v.zero_(), lambda v: v.data.zero_(), lambda v: v.__setitem__(0, 1.0)])
def test_a_change_through_a_view_reaches_the_tensor(change: Callable[[Tensor], object]) -> None:
    def body(y: Tensor) -> Tensor:
        change(y[:, 1:])
        return y * 2

    flow = record(body)
    product = flow.calls[-1]
    before = flow.calls[0].outputs[0]
    assert product.function == "mul"
    assert before not in product.inputs
    (alias,) = [call for call in flow.calls if call.outputs == product.inputs]
    assert alias.function == "alias"
    assert before in alias.inputs


def test_scripted_code_shows_its_operators() -> None:
    def twice_and_relu(y: Tensor) -> Tensor:
        return y * 2 + torch.relu(y)

    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(twice_and_relu)
    assert sorted(readers_of_layer(scripted)) == ["mul", "relu"]


def test_autograd_functions_show_what_they_do() -> None:
    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y * torch.sigmoid(y)

    swish: Callable[[Tensor], object] = Swish.apply
    assert readers_of_layer(swish) == ["sigmoid", "mul"]


def test_operators_of_others_are_told_from_those_of_torch() -> None:
    assert readers_of_layer(lambda y: solve(y, Pattern(2, 4))) == ["detach"]
    assert "tnm_pipeline::solve_mask" in functions(record(lambda y: solve(y, Pattern(2, 4))))


def test_shared_parameters_have_all_their_names() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    flow = trace(model, torch.ones(1, 4))
    assert flow.values[flow.calls[0].inputs[1]].names == ("0.weight", "1.weight")
    assert flow.name(flow.calls[0].arguments[1]) is None
    assert len(flow.users("0.weight")) == 2


@pytest.mark.parametrize("name", SMALL)
def test_nothing_stays_behind(name: str) -> None:
    build, inputs = SMALL[name]
    model = build().train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flow = trace(model, inputs(2, 0))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(isinstance(call, ModuleCall) and call.left > call.entered for call in flow.module_calls)


def test_a_model_that_fails_says_why() -> None:
    with pytest.raises(
        DataflowError, match=r"forward pass of Linear cannot be recorded: .*shapes cannot be multiplied"
    ):
        trace(nn.Linear(4, 4), torch.ones(2, 3))


def test_tensors_that_cannot_be_followed_are_refused() -> None:
    with torch.inference_mode():
        batch = torch.ones(2, 4)
    with pytest.raises(DataflowError, match="Inference tensors"):
        trace(nn.Linear(4, 4), batch)


def test_work_elsewhere_is_refused() -> None:
    def body(y: Tensor) -> Tensor:
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(y.detach() * 2))
        thread.start()
        thread.join()
        return results[0]

    for elsewhere in (body, lambda y: torch.from_numpy(y.numpy() * 2)):
        with pytest.raises(DataflowError, match=r"shape \(2, 4\) that no recorded function made"):
            record(elsewhere)
