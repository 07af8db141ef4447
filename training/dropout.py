"""Trainings without dropout: all places of a model let everything through."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.dropout import _DropoutNd  # the base of all dropout modules has no public name


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Set every dropout probability to 0 and put it back at the end.

    The probability and not the mode, because attention of transformers hands that of its dropout module to a function.

    Args:
        model: whose modules of `torch.nn` that drop out, and attention, are changed; what a `forward` of its own drops
            out without such a module goes on.
    """
    modules = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    before = [module.p for module in modules], [module.dropout for module in attentions]
    try:
        for module in modules:
            module.p = 0.0
        for attention in attentions:
            attention.dropout = 0.0
        yield
    finally:
        for module, probability in zip(modules, before[0], strict=True):
            module.p = probability
        for attention, probability in zip(attentions, before[1], strict=True):
            attention.dropout = probability
