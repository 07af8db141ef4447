"""Channels that may change places: an order of a producer's outputs that its consumers' inputs undo.

Where a layer's input comes from one other layer, through functions that treat every channel alike and apart from the
others, the channels between the two can be renumbered without changing what the network computes. Which input channels
share a group of an N:M pattern is then free to choose.

Shape legend: C = channels of a chain, O and I = out and in channels of a weight.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.dataflow import CHANNEL_AXIS, Dataflow, FunctionCall, Ref, held_tensor
from tnm_pipeline.training.layout import PRUNABLE, to_gemm
from tnm_pipeline.training.pattern import Pattern

# Applied entry by entry; in-place forms are these names with a "_" at the end.
_ELEMENTWISE = """
    abs add celu clamp clip clone contiguous detach div elu erf exp float gelu hardsigmoid hardswish hardtanh leaky_relu
    log1p logsigmoid maximum minimum mish mul neg pow relu relu6 selu sigmoid silu softplus softsign square sub tanh
    threshold to true_divide __rdiv__ __rpow__ __rsub__
"""
_SPATIAL = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "interpolate", "max_pool2d", "pad")
_RESHAPES = ("flatten", "reshape", "squeeze", "view")
_ELEMENTWISE_NAMES = frozenset(_ELEMENTWISE.split())


@dataclass(frozen=True)
class Chain:
    """Layers between which channels may be renumbered.

    Attributes:
        producer: the Linear or Conv2d whose outputs they are.
        members: the modules on the way that hold something per channel: batch norms, depthwise convolutions.
        consumers: the Linear and Conv2d layers whose inputs they are, in the order in which they run.
        channels: how many.
        axes: every parameter and buffer that a renumbering touches, by name, and its axis of channels.
    """

    producer: str
    members: tuple[str, ...]
    consumers: tuple[str, ...]
    channels: int
    axes: tuple[tuple[str, int], ...]


def permutable(flow: Dataflow, model: nn.Module) -> list[Chain]:
    """All chains of a model, in the order in which their producers run.

    A chain needs that nothing but its own functions reads a tensor on it, that the model does not return one, and that
    every parameter and buffer it touches is used there and nowhere else. All of that as far as the recorded pass shows:
    code that only other inputs would run is not seen.

    Args:
        flow: of the model.
        model: the traced one, for the types of its modules.
    """
    layers = {f"{name}.weight": name for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    chains = (_Follower(flow, layers, call).chain() for call in flow.calls if call.function in CHANNEL_AXIS)
    return [found for found in chains if found is not None]


@torch.no_grad()
def permute(model: nn.Module, chain: Chain, permutation: Tensor) -> None:
    """Renumber the channels of a chain in place: channel k becomes what channel `permutation[k]` was.

    The network computes the same, up to the order of summation. The inverse, `permutation.argsort()`, restores every
    bit.

    Args:
        model: the traced one, or one with the same modules.
        chain: one of its chains.
        permutation: (C,) int64, each channel once.

    Raises:
        ValueError: not a permutation of the chain's channels.
    """
    if not torch.equal(permutation.sort().values.cpu(), torch.arange(chain.channels)):
        raise ValueError(
            f"not a permutation of the {chain.channels} channels between {chain.producer} and "
            f"{', '.join(chain.consumers)}: give each of 0 ... {chain.channels - 1} once"
        )
    for name, axis in chain.axes:
        tensor = held_tensor(model, name)
        tensor.copy_(tensor.index_select(axis, permutation.to(tensor.device)))


def importances(model: nn.Module, chain: Chain, pattern: Pattern, chosen: Collection[str]) -> list[Tensor]:
    """What the order of a chain's channels decides about: the magnitudes in the masks that depend on it.

    Args:
        model: the traced one, or one with the same modules.
        chain: one of its chains.
        pattern: of the masks.
        chosen: names of the layers that get masks.

    Returns:
        For `search_order`: abs(weight) of each chosen consumer, (O, K), and if the pattern is transposable, of the
        chosen producer, whose blocks depend on the order as well, as (K, C). Empty if no consumer is chosen.
    """
    consumers = [name for name in chain.consumers if name in chosen]
    magnitudes = [to_gemm(held_tensor(model, f"{name}.weight").detach()).abs() for name in consumers]
    if consumers and pattern.transposable and chain.producer in chosen:
        magnitudes.append(to_gemm(held_tensor(model, f"{chain.producer}.weight").detach()).abs().T)
    return magnitudes


class _Broken(Exception):
    """The channels mix, or escape, or something else uses what would be renumbered."""


class _Follower:
    """Follows the outputs of one layer through the pass.

    Attributes:
        axis_of: value on the chain -> its axis of channels, counted from the last.
    """

    def __init__(self, flow: Dataflow, layers: dict[str, str], producer: FunctionCall) -> None:
        self._flow = flow
        self._layers = layers
        self._producer = producer
        self._axes: dict[str, int] = {}
        self._members: list[str] = []
        self._consumers: list[str] = []
        self._channels = 0
        self.axis_of: dict[int, int] = {}

    def chain(self) -> Chain | None:
        """The chain that this layer produces; `None` if there is none."""
        try:
            producer = self._start()
            started = False
            for call in self._flow.calls:
                started = started or call is self._producer
                if started and not self.axis_of.keys().isdisjoint(call.inputs):
                    self._follow(call)
        except _Broken:
            return None
        if not self._consumers or not self._flow.returned.isdisjoint(self.axis_of):
            return None
        members = tuple(dict.fromkeys(self._members))
        return Chain(producer, members, tuple(self._consumers), self._channels, tuple(self._axes.items()))

    def _start(self) -> str:
        call = self._producer
        name = self._layer(call)
        shape = self._flow.shape(call.argument(1, "weight"))
        assert shape is not None
        if call.function == "conv2d" and call.argument(6, "groups", 1) != 1:
            raise _Broken
        self._channels = shape[0]
        self._claim(call, call.argument(1, "weight"), 0)
        if call.argument(2, "bias") is not None:
            self._claim(call, call.argument(2, "bias"), 0)
        self._reach(call, CHANNEL_AXIS[call.function])
        return name

    def _follow(self, call: FunctionCall) -> None:
        """Take in a call that reads a tensor on the chain."""
        name = call.function if call.function.endswith("__") else call.function.removesuffix("_")
        source = call.argument(0, "input")
        axis = self.axis_of.get(source.value) if isinstance(source, Ref) else None
        if name in _ELEMENTWISE_NAMES:
            self._elementwise(call)
        elif axis is None or sum(number in self.axis_of for number in call.inputs) != 1:
            raise _Broken  # not, or not only, read as the input of the function
        elif name in CHANNEL_AXIS:
            self._layer_call(call, axis)
        elif name == "batch_norm":
            self._batch_norm(call, axis)
        elif name in _SPATIAL:
            self._spatial(call, axis)
        elif name in _RESHAPES:
            self._reshape(call, axis)
        else:
            raise _Broken

    def _elementwise(self, call: FunctionCall) -> None:
        """Other operands are on the chain, have an entry per channel, or the same entry for all channels."""
        axes = {self.axis_of[number] for number in call.inputs if number in self.axis_of}
        if len(axes) != 1:
            raise _Broken
        axis = axes.pop()
        for number in call.inputs:
            shape = self._flow.values[number].shape
            if number not in self.axis_of and len(shape) >= -axis and shape[axis] != 1:
                if shape != (self._channels, *(1,) * (-axis - 1)):
                    raise _Broken
                self._claim(call, Ref(number), 0)
                self._members.append(call.modules[-1])
        self._reach(call, axis)

    def _layer_call(self, call: FunctionCall, axis: int) -> None:
        """A layer ends the chain, or prolongs it if it is a depthwise convolution."""
        weight = call.argument(1, "weight")
        shape, groups = self._flow.shape(weight), call.argument(6, "groups", 1)
        if axis != CHANNEL_AXIS[call.function] or shape is None:
            raise _Broken
        if call.function == "conv2d" and groups != 1:
            if groups != self._channels or shape[0] != self._channels:
                raise _Broken
            for tensor in (weight, call.argument(2, "bias")):
                if tensor is not None:
                    self._claim(call, tensor, 0)
            self._members.append(call.modules[-1])
            self._reach(call, axis)
        else:
            self._consumers.append(self._layer(call))
            self._claim(call, weight, 1)

    def _batch_norm(self, call: FunctionCall, axis: int) -> None:
        shape = self._flow.shape(call.argument(0, "input"))
        if shape is None or len(shape) + axis != 1 or call.argument(5, "training", False):
            raise _Broken  # its channels are the second axis
        for position, keyword in enumerate(("running_mean", "running_var", "weight", "bias"), start=1):
            if call.argument(position, keyword) is not None:
                self._claim(call, call.argument(position, keyword), 0)
        self._members.append(call.modules[-1])
        self._reach(call, axis)

    def _spatial(self, call: FunctionCall, axis: int) -> None:
        """Functions of the last two axes."""
        shape, margins = self._flow.shape(call.argument(0, "input")), call.argument(1, "pad", ())
        if axis != -3 or shape is None or len(shape) > 4:
            raise _Broken
        if call.function == "pad" and not (isinstance(margins, Sequence) and len(margins) <= 4):
            raise _Broken
        self._reach(call, axis)

    def _reshape(self, call: FunctionCall, axis: int) -> None:
        """Channels stay the last axis, or become it where there is one position left."""
        before, after = self._flow.shape(call.argument(0, "input")), self._flow.values[call.outputs[0]].shape
        assert before is not None
        squeezed = axis == -3 and before[-2:] == (1, 1) and after == before[:-2]
        if axis != -1 and not squeezed:
            raise _Broken
        self._reach(call, -1)

    def _layer(self, call: FunctionCall) -> str:
        """The Linear or Conv2d whose own call this is."""
        layer = self._layers.get(self._flow.name(call.argument(1, "weight")) or "")
        if layer is None or layer not in call.modules:
            raise _Broken
        return layer

    def _claim(self, call: FunctionCall, tensor: object, axis: int) -> None:
        """Renumber a parameter or buffer, which only this call may use."""
        name, shape = self._flow.name(tensor), self._flow.shape(tensor)
        if name is None or shape is None or shape[axis] != self._channels:
            raise _Broken
        if any(user is not call for user in self._flow.users(name)):
            raise _Broken
        if self._axes.setdefault(name, axis) != axis:
            raise _Broken

    def _reach(self, call: FunctionCall, axis: int) -> None:
        """What the call returns is on the chain, too."""
        for number in call.outputs:
            shape = self._flow.values[number].shape
            if len(shape) < -axis or shape[axis] != self._channels:
                raise _Broken
            self.axis_of[number] = axis
