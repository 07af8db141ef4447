"""What every stage of a conversion asks of a model: its layers by name, its errors, and one thread."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tnm_pipeline.training.convert.batch import CalibrationError


@contextmanager
def model_errors() -> Iterator[None]:
    """What the user's model raises inside, as a `CalibrationError`."""
    try:
        yield
    except (CalibrationError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CalibrationError(f"the model fails on the calibration data: {type(error).__name__}: {error}") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's own threads would split sums differently for different numbers of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def prunable_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """The layer of that name.

    Raises:
        TypeError: it is neither Linear nor Conv2d.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise TypeError(f"{name} is a {type(layer).__name__}: only Linear and Conv2d layers are converted")
    return layer
