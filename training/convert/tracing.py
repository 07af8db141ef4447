"""Records the dataflow of any nn.Module: torch functions and tensor methods tell of their calls while it runs once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tnm_pipeline.training.convert.batch import Batch, forward
from tnm_pipeline.training.convert.dataflow import Dataflow, FunctionCall, ModuleCall, Ref, Value

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout)
# They tell the shape, never what is in a tensor.
_ABOUT_SHAPE = (
    *("size", "dim", "stride", "numel", "nelement", "ndimension", "is_contiguous", "is_floating_point", "is_complex"),
    *("storage_offset", "element_size", "get_device", "__len__", "__get__"),
)


class DataflowError(RuntimeError):
    """A forward pass that cannot be recorded."""


def trace(model: nn.Module, batch: Batch) -> Dataflow:
    """Record one forward pass in evaluation mode, without gradients.

    Every tensor that the pass makes stays in memory until it ends: give it one or two examples.

    Args:
        model: any module; unchanged.
        batch: its input.

    Raises:
        DataflowError: the model does not run on the batch, uses tensors that cannot be followed (inference tensors,
            tensors without storage), or returns something that no recorded call made.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    recorder = _Recorder(model)
    try:
        with ExitStack() as stack:
            for name, module in model.named_modules():
                stack.enter_context(module.register_forward_pre_hook(recorder.entering(name), with_kwargs=True))
                stack.enter_context(module.register_forward_hook(recorder.leaving))
            stack.enter_context(torch.no_grad())
            given = {recorder.number(tensor, made=True) for tensor in _tensors(batch)}
            stack.enter_context(_Operators())  # type: ignore[no-untyped-call]  # torch's constructor has no types
            stack.enter_context(recorder)
            result = forward(model, batch)
        returned = frozenset(recorder.number(tensor) for tensor in _tensors(result))
    except Exception as error:
        raise DataflowError(f"the forward pass of {type(model).__name__} cannot be recorded: {error}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    flow = recorder.dataflow(returned)
    made = given.union(*(call.outputs for call in flow.calls))
    if strays := [number for number in returned - made if not flow.values[number].names]:
        raise DataflowError(
            f"{type(model).__name__} returns a tensor of shape {flow.values[strays[0]].shape} that no recorded "
            "function made: part of it runs where it cannot be followed, such as in NumPy or in another thread"
        )
    return flow


class _Operators(TorchDispatchMode):
    """Calls operators anew from Python: those that no Python function called get to the recorder that way."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class _Recorder(TorchFunctionMode):
    """Numbers the tensors of a pass and notes the calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names: dict[int, list[str]] = {}
        held = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        tensors = []
        for name, tensor in held:
            self._names.setdefault(id(tensor), []).append(name)
            tensors.append(tensor)
        self._numbers: dict[tuple[int, int], int] = {}  # (tensor, state of its memory) -> value
        self._states: dict[int, int] = {}  # memory -> how often it was changed
        self._in_memory: dict[int, list[int]] = {}  # memory -> values
        self._alive: list[Tensor] = []  # so that no identity is used twice
        self._values: list[Value] = []
        self._calls: list[FunctionCall] = []
        self._module_calls: list[ModuleCall] = []
        self._running: list[ModuleCall] = []
        self._counts: dict[str, int] = {}
        self._time = 0
        self._own_work = False  # looking at tensors calls functions, too
        for tensor in tensors:
            self.number(tensor, made=True)

    def dataflow(self, returned: frozenset[int]) -> Dataflow:
        return Dataflow(tuple(self._values), tuple(self._calls), tuple(self._module_calls), returned)

    def number(self, tensor: Tensor, made: bool = False) -> int:
        """The value that a tensor holds now; `made`: by the call that is being recorded."""
        memory = tensor.untyped_storage().data_ptr()
        key = id(tensor), self._states.setdefault(memory, 0)
        if key not in self._numbers:
            self._numbers[key] = number = len(self._values)
            self._values.append(Value(tuple(tensor.shape), tuple(self._names.get(id(tensor), ()))))
            self._alive.append(tensor)
            shared = self._in_memory.setdefault(memory, [])
            if shared and memory and not made:
                self._note("alias", (), {}, tuple(shared), (number,))
            shared.append(number)
        return self._numbers[key]

    def entering(self, name: str) -> Callable[..., None]:
        """The hook that notes how a module is called."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = self._counts.get(name, 0)
            self._counts[name] = index + 1
            call = ModuleCall(name, index, self._tick(), self._positions(args) | self._positions(kwargs))
            self._module_calls.append(call)
            self._running.append(call)

        return hook

    def leaving(self, module: nn.Module, args: Any, result: Any) -> None:
        """The hook that notes what a module returns."""
        call = self._running.pop()
        call.left = self._tick()
        call.outputs = self._positions((result,) if isinstance(result, Tensor) else result)

    def _positions(self, collection: object) -> dict[int | str, int]:
        self._own_work = True
        try:
            if isinstance(collection, Mapping):
                return {key: self.number(item) for key, item in collection.items() if isinstance(item, Tensor)}
            if isinstance(collection, tuple | list):
                return {at: self.number(item) for at, item in enumerate(collection) if isinstance(item, Tensor)}
            return {}
        finally:
            self._own_work = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function, and note it."""
        kwargs = kwargs or {}
        if self._own_work:
            return func(*args, **kwargs)
        read = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
        inputs = tuple(self.number(tensor) for tensor, _ in read)
        arguments, keywords = self._without_tensors(args), self._without_tensors(kwargs)
        result = func(*args, **kwargs)
        changed = [tensor for tensor, version in read if tensor._version != version]
        for memory in {tensor.untyped_storage().data_ptr() for tensor in changed}:
            self._states[memory] = self._states.get(memory, 0) + 1
        outputs = tuple(dict.fromkeys(self.number(tensor, made=True) for tensor in chain(_tensors(result), changed)))
        name = _name(func)
        reads_only = bool(inputs) and not outputs and name not in _ABOUT_SHAPE
        if reads_only or not set(outputs) <= set(inputs):
            assert isinstance(arguments, tuple)
            assert isinstance(keywords, dict)
            self._note(name, arguments, keywords, inputs, outputs)
        return result

    def _without_tensors(self, item: object) -> object:
        if isinstance(item, Tensor):
            return Ref(self.number(item))
        if isinstance(item, Mapping):
            return {key: self._without_tensors(part) for key, part in item.items()}
        if isinstance(item, tuple | list):
            return tuple(self._without_tensors(part) for part in item)
        return item if isinstance(item, _PLAIN) else type(item)

    def _note(
        self,
        name: str,
        arguments: tuple[object, ...],
        keywords: dict[str, object],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
    ) -> None:
        modules = tuple(call.module for call in self._running)
        self._calls.append(FunctionCall(name, arguments, keywords, inputs, outputs, modules))

    def _tick(self) -> int:
        self._time += 1
        return self._time


def _name(function: object) -> str:
    """A function's name; that of one that is not torch's own starts with where it is from."""
    name, module = str(getattr(function, "__name__", function)), getattr(function, "__module__", None) or "torch"
    if module.startswith("torch._ops.") and module != "torch._ops.aten":
        return f"{module.removeprefix('torch._ops.')}::{name}"
    return name.partition(".")[0] if module.partition(".")[0] == "torch" else f"{module}.{name}"


def _tensors(item: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors in an object, however deep: in collections, and in attributes of objects that are not modules."""
    if isinstance(item, Tensor):
        yield item
        return
    seen = set() if seen is None else seen
    if isinstance(item, (*_PLAIN, type, nn.Module)) or callable(item) or id(item) in seen:
        return
    seen.add(id(item))
    parts: list[object] = []
    if isinstance(item, slice):
        parts = [item.start, item.stop, item.step]
    elif isinstance(item, Mapping):
        parts = list(item.values())
    elif isinstance(item, tuple | list | set | frozenset):
        parts = list(item)
    for part in chain(parts, vars(item).values() if hasattr(item, "__dict__") else ()):
        yield from _tensors(part, seen)
