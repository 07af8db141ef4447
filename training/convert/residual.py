"""What a layer's output is added to: the other branch of a residual connection, found in the dataflow.

The stream that a residual layer adds to is off in a partly converted model. Knowing the branch that the layer is added
to, its partner, a caller fits the layer to its own target plus the partner's error, which the sum then no longer has.

Shape legend: O = out features or channels of the layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.dataflow import CHANNEL_AXIS, Dataflow, FunctionCall, ModuleCall, Ref, held_tensor

_COPIES = ("clone", "contiguous", "detach", "to", "view", "reshape", "expand")


@dataclass(frozen=True)
class Endpoint:
    """Where to find a tensor in a forward pass: as an argument or result of a call of a module.

    Attributes:
        module: its name.
        call: how often the module was called before, in the same forward pass.
        side: whether the tensor is given to the module or returned by it.
        position: of the positional argument, name of the keyword; of a result, index or key in the collection that the
            module returns, 0 if it returns the tensor itself.
    """

    module: str
    call: int
    side: Literal["input", "output"]
    position: int | str

    def pick(self, arguments: Sequence[Any], keywords: Mapping[str, Any], result: Any = None) -> Tensor:
        """The tensor, from what a forward hook with keywords is given.

        Read or copy it at once: an in-place function may change it later.

        Args:
            arguments: positional ones of the module's call.
            keywords: the others.
            result: of the module; only needed on the output side.
        """
        if self.side == "output":
            found = result if isinstance(result, Tensor) else result[self.position]
        else:
            found = arguments[self.position] if isinstance(self.position, int) else keywords[self.position]
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True)
class Step:
    """An affine map per channel between a layer's output and the addition.

    Attributes:
        module: that runs it.
        tensors: role -> name of the parameter or buffer: `mean`, `variance`, `weight`, `bias` of a batch norm, `weight`
            of a layer scale.
        epsilon: of a batch norm.
    """

    module: str
    tensors: Mapping[str, str]
    epsilon: float = 0.0

    def affine(self, model: nn.Module) -> tuple[Tensor | float, Tensor | float]:
        """Scale and shift of the channels, as the model has them now; each (O,) float64 or one number."""
        held = {role: held_tensor(model, name).detach().double().flatten() for role, name in self.tensors.items()}
        scale, shift = held.get("weight", 1.0), held.get("bias", 0.0)
        if "variance" in held:
            scale = scale * (held["variance"] + self.epsilon).rsqrt()
            shift = shift - scale * held["mean"]
        return scale, shift


@dataclass(frozen=True)
class Residual:
    """A layer whose output, or an affine map of it per channel, is added to another tensor of the same shape.

    Attributes:
        layer: its name.
        partner: where the other tensor is found.
        before: whether it is known when the layer is called; otherwise it follows later in the pass.
        steps: between the layer's output and the addition, in order.
    """

    layer: str
    partner: Endpoint
    before: bool
    steps: tuple[Step, ...] = ()

    @property
    def through(self) -> tuple[str, ...]:
        """Names of the modules between the layer's output and the addition, such as a batch norm."""
        return tuple(step.module for step in self.steps)

    def affine(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """What the layer's output y is when it is added: scale * y + shift, by channel.

        Args:
            model: the traced one, or one with the same modules.

        Returns:
            Scale and shift, (O,) float64 each. Channels that a batch norm silences have scale 0.
        """
        weight = held_tensor(model, f"{self.layer}.weight")
        scale = torch.ones(weight.shape[0], dtype=torch.float64, device=weight.device)
        shift = torch.zeros_like(scale)
        for step in self.steps:
            by, plus = step.affine(model)
            scale, shift = scale * by, shift * by + plus
        return scale, shift


def find_residual(flow: Dataflow, layer: str) -> Residual | None:
    """The residual connection that a layer ends in.

    Args:
        flow: of the model.
        layer: name of a Linear or Conv2d.

    Returns:
        `None` unless the layer runs exactly once, as a module; its output goes nowhere but through batch norms, layer
        scales and copies into one addition; and the other summand has the same shape and is an argument or a result of
        some module.
    """
    own = [call for call in flow.module_calls if call.module == layer]
    function = _only(flow.users(f"{layer}.weight"))
    if len(own) != 1 or function is None or layer not in function.modules or function.function not in CHANNEL_AXIS:
        return None
    value = own[0].outputs.get(0)
    if value is None or function.outputs != (value,):
        return None
    axis = CHANNEL_AXIS[function.function]
    steps: list[Step] = []
    while value not in flow.returned and (reader := _only(flow.readers(value))) is not None:
        if reader.function in ("add", "add_"):
            return _found(flow, own[0], value, reader, tuple(steps))
        if not _copies(flow, value, reader):
            step = _batch_norm(flow, reader, value, axis) or _layer_scale(flow, reader, value, axis)
            if step is None:
                return None
            steps.append(step)
        value = reader.outputs[0]
    return None


def _found(
    flow: Dataflow, layer: ModuleCall, value: int, addition: FunctionCall, steps: tuple[Step, ...]
) -> Residual | None:
    """The residual of which this is the addition, if it has the form."""
    partners = [other for other in addition.inputs if other != value]
    shapes = {flow.values[number].shape for number in addition.inputs + addition.outputs}
    if len(addition.inputs) != 2 or len(partners) != 1 or len(shapes) != 1 or addition.argument(2, "alpha", 1) != 1:
        return None
    places: list[tuple[int, Endpoint]] = []
    for call in flow.module_calls:
        places += [
            (call.entered, Endpoint(call.module, call.index, "input", position))
            for position, number in call.inputs.items()
            if number == partners[0]
        ]
        places += [
            (call.left, Endpoint(call.module, call.index, "output", position))
            for position, number in call.outputs.items()
            if number == partners[0]
        ]
    early = [place for place in places if place[0] <= layer.entered]
    late = [place for place in places if place[0] > layer.entered]
    if early:  # the last of them has to be kept for the shortest time
        return Residual(layer.module, max(early, key=lambda place: place[0])[1], True, steps)
    if late:
        return Residual(layer.module, min(late, key=lambda place: place[0])[1], False, steps)
    return None


def _copies(flow: Dataflow, value: int, call: FunctionCall) -> bool:
    """Whether a call does nothing to a value but to copy it."""
    same = len(call.outputs) == 1 and flow.values[call.outputs[0]].shape == flow.values[value].shape
    return call.function in _COPIES and call.inputs == (value,) and same


def _batch_norm(flow: Dataflow, call: FunctionCall, value: int, axis: int) -> Step | None:
    """The step of a batch norm that uses its running statistics."""
    if call.function != "batch_norm" or call.argument(5, "training", False) or call.inputs[:1] != (value,):
        return None
    if len(flow.values[value].shape) + axis != 1 or len(call.outputs) != 1:  # its channels are the second axis
        return None
    given = {
        role: call.argument(position, keyword)
        for position, (role, keyword) in enumerate(
            {"mean": "running_mean", "variance": "running_var", "weight": "weight", "bias": "bias"}.items(), start=1
        )
    }
    tensors = {role: flow.name(argument) for role, argument in given.items() if argument is not None}
    epsilon = call.argument(7, "eps", 1e-5)
    if not {"mean", "variance"} <= set(tensors) or not isinstance(epsilon, float):
        return None
    return _step(call, tensors, epsilon)


def _layer_scale(flow: Dataflow, call: FunctionCall, value: int, axis: int) -> Step | None:
    """The step of a product with a parameter or buffer of one entry per channel."""
    factors = [Ref(number) for number in call.inputs if number != value]
    if call.function not in ("mul", "mul_") or len(call.inputs) != 2 or len(factors) != 1 or len(call.outputs) != 1:
        return None
    shape, by = flow.values[value].shape, flow.values[factors[0].value].shape
    if flow.values[call.outputs[0]].shape != shape or by != (shape[axis], *(1,) * (-axis - 1)):
        return None
    return _step(call, {"weight": flow.name(factors[0])})


def _step(call: FunctionCall, tensors: Mapping[str, str | None], epsilon: float = 0.0) -> Step | None:
    named = {role: name for role, name in tensors.items() if name is not None}
    return Step(call.modules[-1], named, epsilon) if len(named) == len(tensors) else None


def _only(items: Sequence[FunctionCall]) -> FunctionCall | None:
    return items[0] if len(items) == 1 else None
