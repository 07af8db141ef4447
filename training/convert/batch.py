"""Calibration batches: whatever a model's forward takes."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""One tensor, positional tensors, or named ones. The first axis of each counts examples."""


class CalibrationError(ValueError):
    """Calibration data that no layer can be fitted to, such as none at all or NaN."""


def forward(model: nn.Module, batch: Batch) -> object:
    """Call the model on a batch, on the device of its first parameter."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    if isinstance(batch, Mapping):
        return model(**{name: tensor.to(device) for name, tensor in batch.items()})
    return model(*(tensor.to(device) for tensor in batch))


def tensors_of(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch and how a message names them."""
    if isinstance(batch, Tensor):
        yield "", batch
    elif isinstance(batch, Mapping):
        yield from ((f" ({name})", tensor) for name, tensor in batch.items())
    else:
        yield from ((f" (input {index})", tensor) for index, tensor in enumerate(batch))


def attended(batch: Batch) -> Tensor | None:
    """Which positions of a padded batch are real: bool (B, T), from `attention_mask`; `None` = all of them."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if mask is not None and mask.dim() == 2 and not bool(mask.bool().all()) else None


def check_batches(batches: Sequence[Batch]) -> None:
    """Refuse calibration data before any work is done.

    Args:
        batches: inputs of the model, first axis = examples.

    Raises:
        CalibrationError: no batch, an empty batch, or NaN or Inf; the message names the batch.
    """
    if len(batches) == 0:
        raise CalibrationError("there are no calibration batches: give at least one tensor of model inputs")
    for index, batch in enumerate(batches):
        for name, tensor in tensors_of(batch):
            if tensor.numel() == 0:
                raise CalibrationError(
                    f"calibration batch {index}{name} is empty, shape {tuple(tensor.shape)}: leave it out"
                )
            bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
            if bad:
                raise CalibrationError(
                    f"calibration batch {index}{name} has {bad} NaN or Inf of {tensor.numel()} values: "
                    "clean the data or leave it out"
                )


def head(batch: Batch, count: int) -> Batch:
    """The first examples of a batch."""
    if isinstance(batch, Tensor):
        return batch[:count]
    if isinstance(batch, Mapping):
        return {name: tensor[:count] for name, tensor in batch.items()}
    return tuple(tensor[:count] for tensor in batch)
