"""What one layer's output errors do further on: the sums behind its sensitivity.

Shape legend: B = examples, T = positions of a sequence, O = out features.
"""

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern

Repair = Literal["nothing", "shift", "shift and scale"]
"""What is mended of each output channel's error afterwards: by the bias, or by a batch norm that is re-tuned."""


class Meter:
    """The sums of one layer, fed by its forward hook and by the gradients of its outputs.

    Attributes:
        repair: what is taken off the error of masking before it is looked at.
        per_output: (O,) float64, sum over rows and probes of the squared gradient.
        error_square: (O,) float64, sum over rows of the squared error of masking.
        response: sum over examples and probes of (gradient . error)^2.
        rows: how many were seen.
        examples: of the batch that runs.
        real: (B, T) bool, positions of the batch that runs that are not padding; `None`: all.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, pattern: Pattern, *, before_batch_norm: bool) -> None:
        self.repair: Repair = "shift and scale" if before_batch_norm else "nothing" if layer.bias is None else "shift"
        self.per_output = torch.zeros(len(layer.weight), dtype=torch.float64)
        self.error_square = torch.zeros(len(layer.weight), dtype=torch.float64)
        self.response = 0.0
        self.rows = 0
        self.examples = 1
        self.real: Tensor | None = None
        self._mask = solve(layer.weight, pattern)

    def watch(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: note the error of masking, and pass on a copy of the output that reports its gradients."""
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        real = _real_rows(_channels_last(layer, output.detach()), self.real)
        error = self._error(layer, (args[0] if args else kwargs["input"]).detach(), output.detach(), real)
        self.rows += int(real.sum())
        self.error_square += _sum_rows(error.square())
        examples = self.examples

        def on_gradient(gradient: Tensor) -> None:
            rows = _channels_last(layer, gradient) * real
            self.per_output += _sum_rows(rows.square())
            # a call that folds other axes into the first leaves the examples outermost
            groups = examples if len(rows) % examples == 0 else 1
            self.response += float((rows * error).reshape(groups, -1).sum(1, dtype=torch.float64).square().sum())

        start = output if output.requires_grad else output.detach().requires_grad_()
        passed_on = start.clone()  # an in-place activation may follow
        passed_on.register_hook(on_gradient)
        return passed_on

    @torch.no_grad()
    def _error(self, layer: nn.Linear | nn.Conv2d, inputs: Tensor, output: Tensor, real: Tensor) -> Tensor:
        """The error of masking by magnitude that no repair mends, (..., O), zero at padding."""
        twin = copy.copy(layer)  # with whatever stride and padding it has, and without its bias and its hooks
        missing = torch.where(self._mask, 0.0, -layer.weight)
        twin._parameters = {"weight": nn.Parameter(missing, requires_grad=False), "bias": None}
        error = twin.forward(inputs)
        return _repaired(_channels_last(layer, error), _channels_last(layer, output), real, self.repair)


def real_entries(output: Tensor, real: Tensor | None) -> Tensor:
    """What a tensor is multiplied with to drop its padding.

    Args:
        output: any shape.
        real: (B, T) bool, `None`: no padding.

    Returns:
        1 at real positions and 0 at others, (B, T, 1, ...) if the tensor starts with (B, T); otherwise a scalar 1.
    """
    if real is None or output.shape[:2] != real.shape:
        return output.new_ones(())
    return real.reshape(*real.shape, *[1] * (output.dim() - 2)).to(output)


def _real_rows(rows: Tensor, real: Tensor | None) -> Tensor:
    """(..., 1), 1 where a row of (..., O) counts and 0 at padding."""
    weights = real_entries(rows, real if rows.dim() == 3 else None)
    return weights.expand(*rows.shape[:-1], 1)


def _repaired(error: Tensor, output: Tensor, real: Tensor, repair: Repair) -> Tensor:
    """What is left of an error, (..., O), at real rows; zero at the others."""
    if repair == "nothing":
        return error * real
    axes = tuple(range(error.dim() - 1))
    count = real.sum().clamp(min=1)
    left = (error - (error * real).sum(axes) / count) * real
    if repair == "shift":
        return left
    spread = (output - (output * real).sum(axes) / count) * real
    variance = spread.square().sum(axes)
    return left - spread * torch.where(variance > 0, (left * spread).sum(axes) / variance, 0.0)


def _channels_last(layer: nn.Module, output: Tensor) -> Tensor:
    """(..., O), float32 or wider."""
    rows = output.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else output
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _sum_rows(rows: Tensor) -> Tensor:
    return rows.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
