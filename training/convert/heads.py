"""Attention heads, found in the dataflow: spaces whose basis may be chosen freely.

Attention mixes tokens, never the channels of a head. Whatever basis the value projection writes a head in, the output
projection may read it in; and of the queries and keys of a head only their products count, which an orthogonal change
of both leaves alone. That holds for explicit products as well as for the fused function, and for one layer that makes
queries, keys and values.

Every output of a Linear is numbered; functions that only move entries about are run once more, on the numbers. So a
product of attention shows which channels make a head, and the layer behind it which column reads which of them,
whatever the code calls a head and however it gets there.

Shape legend: H = heads, D = channels of one, T = tokens, O and I = out and in features of a weight.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.dataflow import Dataflow, FunctionCall, Ref

_COPIES = ("clone", "contiguous", "detach", "float", "to")
_MOVES = (
    *("chunk", "flatten", "movedim", "moveaxis", "permute", "reshape", "select", "split", "squeeze", "swapaxes"),
    *("swapdims", "transpose", "unbind", "unflatten", "unsqueeze", "view", "__getitem__"),
)
_SCALINGS = ("mul", "div", "true_divide")
_PRODUCTS = ("matmul", "bmm", "__matmul__")
_INDICES = (int, type(None), type(Ellipsis))  # of those that leave a trace; slices do not


@dataclass(frozen=True, eq=False)
class HeadPart:
    """What one layer has to do with some heads.

    Attributes:
        layer: its name.
        axis: 0, its outputs are the channels of the heads, or 1, its inputs are.
        index: (H, D) int64, rows or columns of its weight.
    """

    layer: str
    axis: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class HeadSpace:
    """Heads whose basis is free.

    Attributes:
        parts: the layers of queries and of keys, both on axis 0, or those of values on axis 0 and of outputs on axis 1.
    """

    parts: tuple[HeadPart, HeadPart]


def find_head_spaces(flow: Dataflow, model: nn.Module) -> list[HeadSpace]:
    """All of them, those of queries and keys first.

    A space needs that nothing but attention reads its channels, that the model does not return them, and that weights
    and biases are in float32 or float64 and used nowhere else. All of that as far as the recorded pass shows. Queries
    that share a key (grouped queries), or that are turned by their position (rotary embeddings), are left alone.

    Args:
        flow: of the model.
        model: the traced one, for the types of its modules.
    """
    follower = _Follower(flow, model)
    for call in flow.calls:
        follower.follow(call)
    return follower.spaces()


class _Follower:
    """Follows the numbers of channels through the pass.

    Attributes:
        channel_of: value -> for each of its entries the number of the channel that it belongs to.
        readers: number of a channel -> how often it was read at an end, which may be once; more if it was elsewhere.
    """

    def __init__(self, flow: Dataflow, model: nn.Module) -> None:
        self._flow = flow
        self._layers = {f"{name}.weight": name for name, one in model.named_modules() if isinstance(one, nn.Linear)}
        self._exact = {name for name, one in model.named_parameters() if one.dtype in (torch.float32, torch.float64)}
        self._made: list[tuple[str, int]] = []  # by channel: the layer and the row
        self._mixed: list[Tensor] = []  # (H, D) of values
        self._compared: list[tuple[Tensor, Tensor]] = []  # (H, D) of queries and keys
        self._consumed: list[tuple[str, Tensor]] = []  # a layer and its (I,) inputs
        self.channel_of: dict[int, Tensor] = {}
        self.readers: Counter[int] = Counter()

    def follow(self, call: FunctionCall) -> None:
        """Take in one call after the other."""
        read = [number for number in call.inputs if number in self.channel_of]
        if read and not self._understood(call, read):
            for number in read:
                self._spoil(self.channel_of[number])
        if call.function == "linear" and (layer := self._own_layer(call)) is not None:
            shape = self._flow.values[call.outputs[0]].shape
            first = len(self._made)
            self._made += [(layer, row) for row in range(shape[-1])]
            self.channel_of[call.outputs[0]] = torch.arange(first, len(self._made)).expand(shape)

    def spaces(self) -> list[HeadSpace]:
        """What was found, now that the pass is over."""
        for number in self._flow.returned & self.channel_of.keys():
            self._spoil(self.channel_of[number])
        found = [self._space(self._rows(queries), self._rows(keys)) for queries, keys in self._compared]
        for heads in self._mixed:
            consumers = [one for one in self._consumed if bool(torch.isin(heads, one[1]).all())]
            if consumers:
                layer, inputs = consumers[0]
                columns = (inputs == heads[:, :, None]).int().argmax(2)
                found.append(self._space(self._rows(heads), HeadPart(layer, 1, columns)))
        return [one for one in found if one is not None]

    def _space(self, first: HeadPart | None, second: HeadPart | None) -> HeadSpace | None:
        return None if first is None or second is None else HeadSpace((first, second))

    def _rows(self, heads: Tensor) -> HeadPart | None:
        """The part of the one layer that makes these channels, if they are read once."""
        made = [self._made[channel] for channel in heads.flatten().tolist()]
        layers = {layer for layer, _ in made}
        if len(layers) != 1 or any(self.readers[channel] != 1 for channel in heads.flatten().tolist()):
            return None
        return HeadPart(layers.pop(), 0, torch.tensor([row for _, row in made]).view(heads.shape))

    def _spoil(self, channels: Tensor) -> None:
        """Something reads these channels that is not understood."""
        repeated = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in channels.stride())
        self.readers.update(dict.fromkeys(channels[repeated].unique().tolist(), 2))

    def _read(self, channels: Tensor) -> None:
        self.readers.update(channels.flatten().tolist())

    def _understood(self, call: FunctionCall, read: Sequence[int]) -> bool:
        """Take in a call that reads channels; false if it may do anything to them."""
        function = call.function
        if function == "scaled_dot_product_attention":
            return self._attention(call, read)
        if function in _PRODUCTS:
            return self._product(call, read)
        source = call.arguments[0] if call.arguments else None
        if not isinstance(source, Ref) or list(read) != [source.value]:
            return False
        channels = self.channel_of[source.value]
        if function == "linear":
            return self._consume(call, channels)
        if function in _COPIES or (function == "dropout" and call.argument(2, "training", True) is False):
            return self._moved(call, [channels])
        if function in _SCALINGS:
            return len(self._other_entries(call, source)) == 0 and self._moved(call, [channels])
        return function in _MOVES and self._moved(call, _replayed(call, channels))

    def _other_entries(self, call: FunctionCall, source: Ref) -> list[int]:
        """Operands with more than one entry."""
        return [n for n in call.inputs if n != source.value and self._flow.values[n].shape not in ((), (1,))]

    def _moved(self, call: FunctionCall, channels: Sequence[Tensor]) -> bool:
        shapes = [self._flow.values[number].shape for number in call.outputs]
        if shapes != [tuple(one.shape) for one in channels]:
            return False
        self.channel_of.update(zip(call.outputs, channels, strict=True))
        return True

    def _attention(self, call: FunctionCall, read: Sequence[int]) -> bool:
        query, key, value = (call.argument(at, name) for at, name in enumerate(("query", "key", "value")))
        if not all(isinstance(one, Ref) for one in (query, key, value)) or call.argument(7, "enable_gqa", False):
            return False
        assert isinstance(query, Ref)
        assert isinstance(key, Ref)
        assert isinstance(value, Ref)
        if not set(read) <= {query.value, key.value, value.value} or len(set(read)) != len(read):
            return False
        queries, keys, values = (self.channel_of.get(one.value) for one in (query, key, value))
        if queries is None or keys is None or not self._compare(queries, keys):
            for channels in (queries, keys):
                if channels is not None:
                    self._spoil(channels)
        return values is None or self._mix(call, values)

    def _product(self, call: FunctionCall, read: Sequence[int]) -> bool:
        """Of queries and transposed keys, or of shares and values."""
        if len(call.arguments) != 2 or call.keywords or call.inputs != tuple(dict.fromkeys(call.inputs)):
            return False
        left, right = (self.channel_of.get(number) for number in call.inputs)
        if right is None or right.dim() < 2:
            return False
        return self._mix(call, right) if left is None else self._compare(left, right.transpose(-1, -2))

    def _compare(self, queries: Tensor, keys: Tensor) -> bool:
        """Products over the last axis of both."""
        if queries.dim() < 2 or queries.shape[:-2] != keys.shape[:-2] or queries.shape[-1] != keys.shape[-1]:
            return False
        size = queries.shape[-1]
        joined = _heads(torch.cat([queries[..., :1, :], keys[..., :1, :]], -1))
        if joined is None or not _same_for_all_tokens(queries) or not _same_for_all_tokens(keys):
            return False
        if self._were_mixed(joined):
            return False
        self._compared.append((joined[:, :size], joined[:, size:]))
        self._read(joined)
        return True

    def _mix(self, call: FunctionCall, values: Tensor) -> bool:
        """Sums over the last axis but one, the tokens."""
        shape = self._flow.values[call.outputs[0]].shape
        if values.dim() < 2 or shape[:-2] != values.shape[:-2] or shape[-1] != values.shape[-1]:
            return False
        heads = _heads(values) if _same_for_all_tokens(values) else None
        if heads is None or self._were_mixed(heads):
            return False
        self._mixed.append(heads)
        self.channel_of[call.outputs[0]] = values[..., :1, :].expand(shape)
        return True

    def _were_mixed(self, channels: Tensor) -> bool:
        return any(bool(torch.isin(channels, heads).any()) for heads in self._mixed)

    def _consume(self, call: FunctionCall, channels: Tensor) -> bool:
        layer = self._own_layer(call)
        inputs = channels.reshape(-1, channels.shape[-1])
        if layer is None or not bool((inputs == inputs[:1]).all()):
            return False
        self._consumed.append((layer, inputs[0]))
        self._read(inputs[0])
        return True

    def _own_layer(self, call: FunctionCall) -> str | None:
        """The Linear whose own call this is, if nothing else uses its weight and bias."""
        weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
        for tensor in (weight, bias):
            name = self._flow.name(tensor)
            if tensor is not None and (name not in self._exact or len(self._flow.users(name)) != 1):
                return None
        layer = self._layers.get(self._flow.name(weight) or "")
        return layer if layer in call.modules else None


def _replayed(call: FunctionCall, channels: Tensor) -> list[Tensor]:
    """What the function makes of the numbers; nothing if it was not recorded what it was told."""
    told = [*call.arguments[1:], *call.keywords.values()]
    flat = [part for one in told for part in (one if isinstance(one, tuple) else (one,))]
    if not all(isinstance(one, _INDICES) for one in flat):
        return []
    name = "reshape" if call.function == "view" else call.function  # numbers lie in memory in another way
    function: Callable[..., Tensor | Sequence[Tensor]] = getattr(Tensor, name)
    result = function(channels, *call.arguments[1:], **call.keywords)
    return [result] if isinstance(result, Tensor) else list(result)


def _same_for_all_tokens(channels: Tensor) -> bool:
    return bool((channels == channels[..., :1, :]).all())


def _heads(channels: Tensor) -> Tensor | None:
    """(H, D): the channels along the last axis wherever that is; `None` if two heads have one in common."""
    heads = channels[..., 0, :].reshape(-1, channels.shape[-1]).unique(dim=0)
    return heads if heads.unique().numel() == heads.numel() else None
