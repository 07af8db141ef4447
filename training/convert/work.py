"""How much each layer computes, in which order, and whether it computes what its class says: one forward pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tnm_pipeline.training.convert.batch import Batch, forward, head
from tnm_pipeline.training.layout import PRUNABLE
from tnm_pipeline.training.modes import evaluating


@dataclass
class Work:
    """What one example costs.

    Attributes:
        products: multiply-adds of every Linear and Conv2d while dense, in the order of their last calls; those that do
            not run are absent.
        unlike: layers of derived classes that do something else than a plain layer with their weight.
    """

    products: dict[str, int] = field(default_factory=dict)
    unlike: set[str] = field(default_factory=set)


@torch.no_grad()
def measure_work(model: nn.Module, batch: Batch) -> Work:
    """Run the first example of a batch.

    Args:
        model: any module; comes back as it was.
        batch: an input.
    """
    work = Work()

    def hook(name: str) -> Any:
        def after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            assert isinstance(layer, PRUNABLE)
            work.products[name] = work.products.pop(name, 0) + output.numel() * layer.weight[0].numel()
            if type(layer) not in PRUNABLE and not _is_plain(layer, args[0] if args else kwargs["input"], output):
                work.unlike.add(name)

        return after

    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)}
    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model):
            forward(model, head(batch, 1))
    finally:
        for handle in handles:
            handle.remove()
    return work


def _is_plain(layer: nn.Linear | nn.Conv2d, inputs: Tensor, output: Tensor) -> bool:
    if isinstance(layer, nn.Linear):
        expected = F.linear(inputs, layer.weight, layer.bias)
    else:
        expected = nn.Conv2d._conv_forward(layer, inputs, layer.weight, layer.bias)
    return expected.shape == output.shape and torch.allclose(expected, output, rtol=1e-3, atol=1e-5)
