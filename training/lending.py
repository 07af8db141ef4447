"""A model that is lent to a training: what the training puts onto it is taken off again, whatever happens."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tnm_pipeline.training.layers import SparseConv2d, SparseLinear, unmask

# Mixed precision lives in a `forward` of the model's own, of which a copy of the model would call the original's.
_OF_ACCELERATE = ("forward", "_original_forward", "_is_accelerate_prepared")


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Leave a plain model that learns where it did before; its weights are those of the training.

    Sparse layers that are left, since the training did not reach its end, keep their pruned weights.

    Args:
        model: with plain layers.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with keeping_forward(model):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, SparseLinear | SparseConv2d):
                unmask(module)


@contextmanager
def keeping_forward(model: nn.Module) -> Iterator[None]:
    """Take off what Accelerate puts onto a model.

    Args:
        model: plain or sparse.
    """
    own = {name: value for name, value in vars(model).items() if name in _OF_ACCELERATE}
    try:
        yield
    finally:
        for name in _OF_ACCELERATE:
            vars(model).pop(name, None)
        vars(model).update(own)
