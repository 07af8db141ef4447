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
        model: whose modules of `torch.nn` that drop out, attention and recurrent ones among them, are changed; what a
            `forward` of its own drops out without such a module goes on.
    """
    places = [(module, name, getattr(module, name)) for module in model.modules() if (name := _probability(module))]
    try:
        for module, name, _ in places:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, probability in places:
            setattr(module, name, probability)


def _probability(module: nn.Module) -> str | None:
    """The attribute that says how much a module drops out; None: it does not."""
    if isinstance(module, _DropoutNd):
        return "p"
    return "dropout" if isinstance(module, nn.MultiheadAttention | nn.RNNBase) else None
