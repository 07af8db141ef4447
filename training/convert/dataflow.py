"""The record of one forward pass, function by function: what each call reads and writes, and which module runs it.

What is read off it (what a layer's output is added to, which channels may change places) must never be a guess: what it
does not show plainly has to mean no.

- An in-place function makes a new value of the same tensor, and of every other tensor that shares its memory.
- Functions that return their argument as it is, such as dropout in evaluation mode, are left out.
- Code that no Python function shows, such as scripted code, is recorded operator by operator.
- A tensor that comes from nowhere but shares memory with a known one is recorded as read from that one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from torch import Tensor, nn

CHANNEL_AXIS = {"linear": -1, "conv2d": -3}
"""Function of a layer -> the axis of its input and output along which its channels lie."""


@dataclass(frozen=True)
class Value:
    """What a tensor held at some time.

    Attributes:
        shape: of the tensor.
        names: of the parameter or buffer that it is; several if modules share it; empty for all other tensors.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor in the arguments of a call: the number of its value."""

    value: int


@dataclass(frozen=True)
class FunctionCall:
    """One call of a torch function.

    Attributes:
        function: its name in torch, such as `linear`, `add_` or `__getitem__`; `alias` for tensors from nowhere.
        arguments: the positional ones, `Ref` in place of tensors, tuples in place of lists.
        keywords: the named ones.
        inputs: numbers of all values that it reads, in order, repetitions included.
        outputs: numbers of the values that it returns or changes in place.
        modules: names of the modules that are running, the outermost (`""`, the model) first.
    """

    function: str
    arguments: tuple[object, ...]
    keywords: Mapping[str, object]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    modules: tuple[str, ...]

    def argument(self, position: int, name: str, default: object = None) -> object:
        """An argument that may have been given by position or by name."""
        if position < len(self.arguments):
            return self.arguments[position]
        return self.keywords.get(name, default)


@dataclass
class ModuleCall:
    """One call of a module.

    Attributes:
        module: its name.
        index: how often it had been called before, in this forward pass.
        entered: when; `left`: when it returned. Any two events of a pass have different times.
        inputs: position or name -> number of the value, of the arguments that are tensors themselves.
        outputs: the same of the result: 0 -> value for a single tensor, index or key -> value for a collection.
    """

    module: str
    index: int
    entered: int
    inputs: dict[int | str, int]
    left: int = -1
    outputs: dict[int | str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Dataflow:
    """The record of one forward pass. It holds no tensors.

    Attributes:
        values: all that was read or written.
        calls: of functions, in order.
        module_calls: in the order in which they began.
        returned: numbers of the values that the model returned, however deep in its result.
    """

    values: tuple[Value, ...]
    calls: tuple[FunctionCall, ...]
    module_calls: tuple[ModuleCall, ...]
    returned: frozenset[int]

    def readers(self, value: int) -> list[FunctionCall]:
        """The calls that read a value, in order."""
        return self._readers.get(value, [])

    def users(self, name: str) -> list[FunctionCall]:
        """The calls that read or change the parameter or buffer of that name, in order."""
        return self._users.get(name, [])

    def shape(self, argument: object) -> tuple[int, ...] | None:
        """The shape of an argument that is a tensor."""
        return self.values[argument.value].shape if isinstance(argument, Ref) else None

    def name(self, argument: object) -> str | None:
        """The name of an argument that is a parameter or buffer with exactly one name."""
        names = self.values[argument.value].names if isinstance(argument, Ref) else ()
        return names[0] if len(names) == 1 else None

    @cached_property
    def _readers(self) -> dict[int, list[FunctionCall]]:
        return _grouped((value, call) for call in self.calls for value in dict.fromkeys(call.inputs))

    @cached_property
    def _users(self) -> dict[str, list[FunctionCall]]:
        return _grouped(
            (name, call)
            for call in self.calls
            for value in dict.fromkeys(call.inputs + call.outputs)
            for name in self.values[value].names
        )


_Key = TypeVar("_Key")


def _grouped(pairs: Iterable[tuple[_Key, FunctionCall]]) -> dict[_Key, list[FunctionCall]]:
    groups: dict[_Key, list[FunctionCall]] = {}
    for key, call in pairs:
        groups.setdefault(key, []).append(call)
    return groups


def held_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that name."""
    owner, _, own_name = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), own_name)
    assert isinstance(tensor, Tensor)
    return tensor
