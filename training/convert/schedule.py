"""Where the forward passes stop, and in which order: seen in one small forward pass."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import Batch, forward, head

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_EXAMPLES = 2  # enough to see the order


@dataclass
class Schedule:
    """The stops of a model.

    Attributes:
        calls: stop -> how often its modules run in one forward pass, in the order of the last of these calls. Layers
            that never run are absent.
        norms: which stops are batch norms; the others are layers.
        normed: layers whose output goes straight into a batch norm that stops too, unchanged in place on the way.
    """

    calls: dict[str, int] = field(default_factory=dict)
    norms: set[str] = field(default_factory=set)
    normed: set[str] = field(default_factory=set)


@torch.no_grad()
def schedule(model: nn.Module, layers: Mapping[str, Sequence[str]], batch: Batch, *, norms: bool = True) -> Schedule:
    """Run the first examples of a batch and watch.

    Args:
        model: in evaluation mode.
        layers: name of a stop -> modules that belong to it: the layer, and those that share its weight.
        batch: an input.
        norms: whether batch norms that keep statistics are stops.
    """
    plan = Schedule()
    outputs: dict[int, tuple[str, int]] = {}  # identity -> the layer, and how often the tensor had been written

    def arrive(stop: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs["input"]
            plan.calls[stop] = plan.calls.pop(stop, 0) + 1  # moves to the end: passes wait at the last call
            layer, version = outputs.get(id(inputs), ("", -1))
            if stop in plan.norms and inputs._version == version:
                plan.normed.add(layer)

        return before

    def leave(name: str) -> Callable[..., None]:
        def after(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs[id(output)] = name, output._version
                weakref.finalize(output, outputs.pop, id(output), None)  # others may get its identity

        return after

    handles = []
    if norms:
        found = {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)}
        plan.norms = {name for name, module in found.items() if module.track_running_stats}
    stops = {**layers, **{name: (name,) for name in plan.norms}}
    owner = {name: stop for stop, names in layers.items() for name in names}
    for stop, names in stops.items():
        modules = [model.get_submodule(name) for name in names]
        handles += [module.register_forward_pre_hook(arrive(stop), with_kwargs=True) for module in modules]
    handles += [model.get_submodule(name).register_forward_hook(leave(stop)) for name, stop in owner.items()]
    try:
        forward(model, head(batch, _EXAMPLES))
    finally:
        for handle in handles:
            handle.remove()
    plan.norms &= plan.calls.keys()
    return plan
