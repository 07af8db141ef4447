"""Batch norms of a converted model, set so that each channel keeps the mean and spread that it has in the dense one.

For convolutional networks this is not optional: the activations of a masked network shrink, and batch norms with the
dense statistics turn that into noise. Averaging new statistics over the calibration data, as is usual, also adopts by
how much those few samples differ from the training data; matching the dense model's output on the same samples does
not.

Shape legend: C = channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import CalibrationError
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.patches import stride
from tnm_pipeline.training.convert.sums import ExactSum, reach

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_LEAST_SPREAD = 1e-6  # of a channel in the dense model, relative to its running spread: below, it is constant


@dataclass(frozen=True, eq=False)
class Moments:
    """Of a batch norm's input: (C,) float64 each.

    Attributes:
        mean: over examples and positions.
        variance: likewise, not less than 0.
    """

    mean: Tensor
    variance: Tensor


def moments(name: str, inputs: Sequence[Tensor], group: Group) -> Moments:
    """Sum over all batches of all processes.

    Args:
        name: of the batch norm, for messages.
        inputs: of this process's batches; (B, C) or (B, C, ...).
        group: the processes.

    Raises:
        CalibrationError: NaN or Inf.
    """
    device, channels = inputs[0].device, inputs[0].shape[1]
    largest = group.largest(reach(inputs), device)
    if largest == float("inf"):
        raise CalibrationError(
            f"batch norm {name} meets NaN or Inf on the calibration data: the converted model overflows; "
            "leave out the layer before it, or keep the batch norms as they are (retune_batch_norm = false)"
        )
    counted = sum(x.numel() // channels for x in inputs)
    every = stride(int(group.add(torch.tensor([counted], device=device))[0])) if inputs[0].dim() > 2 else 1
    some = [x.flatten(2)[:, :, ::every] if x.dim() > 2 else x[:, :, None] for x in inputs]
    rows = int(group.add(torch.tensor([sum(x.numel() // channels for x in some)], device=device))[0])
    first = ExactSum((channels,), rows * largest, device)
    second = ExactSum((channels,), rows * largest**2, device)

    def measure(x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x.double(), dim=(0, 2), correction=0)
        count = x.numel() // channels
        return mean * count, (variance + mean.square()) * count

    for total, squares in group.each(measure, some):
        first.add(total)
        second.add(squares)
    mean = first.total(group) / rows
    return Moments(mean, (second.total(group) / rows - mean.square()).clamp_min_(0.0))


@torch.no_grad()
def match_statistics(norm: BatchNorm, dense: BatchNorm, given: Moments, wanted: Moments) -> None:
    """Set the running statistics so that the output has the mean and variance that it has in the dense model.

    Args:
        norm: of the converted model, changed in place; weight and bias are left alone.
        dense: the same batch norm of the dense model.
        given: what `norm` receives.
        wanted: what `dense` receives, from the same examples.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert dense.running_mean is not None
    assert dense.running_var is not None
    old_mean, old_variance = dense.running_mean.double(), dense.running_var.double() + dense.eps
    constant = wanted.variance <= _LEAST_SPREAD * old_variance
    dead = given.variance <= _LEAST_SPREAD * wanted.variance
    ratio = torch.where(constant | dead, 1.0, given.variance / wanted.variance.clamp_min(1e-300))
    norm.running_var.copy_((ratio * old_variance - norm.eps).clamp_min_(0.0))
    norm.running_mean.copy_(given.mean - ratio.sqrt() * (wanted.mean - old_mean))
