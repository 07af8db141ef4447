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
_ROUNDING = 1e-6  # of float32 sums, relatively


class Meter:
    """The sums of one layer, fed by its forward hook and by the gradients of its outputs.

    A repair is known only when everything was seen: mended batch by batch, of a few rows nearly all error would vanish.
    So what depends on it is kept example by example until then.

    Attributes:
        repair: what is taken off the error of masking before it is looked at.
        per_output: (O,) float64, sum over rows and probes of the squared gradient.
        rows: how many were seen.
        examples: of the batch that runs.
        real: (B, T) bool, positions of the batch that runs that are not padding; `None`: all.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, pattern: Pattern, *, before_batch_norm: bool) -> None:
        self.repair: Repair = "shift and scale" if before_batch_norm else "nothing" if layer.bias is None else "shift"
        self.per_output = torch.zeros(len(layer.weight), dtype=torch.float64)
        self.rows = 0
        self.examples = 1
        self.real: Tensor | None = None
        self._mask = solve(layer.weight, pattern)
        # sums over rows of the error, the output, their squares and their product
        self._sums = torch.zeros(5, len(layer.weight), dtype=torch.float64)
        # by example and probe: gradient . error, and (O,) what a shift and a scale of each output would add to it
        self._responses: list[Tensor] = []
        self._mendable: list[Tensor] = []

    def watch(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: note the error of masking, and pass on a copy of the output that reports its gradients."""
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        y = _channels_last(layer, output.detach())
        real = _real_rows(y, self.real)
        y = y * real
        error = self._error(layer, (args[0] if args else kwargs["input"]).detach()) * real
        self.rows += int(real.sum())
        self._sums += torch.stack([_sum_rows(one) for one in (error, y, error.square(), y.square(), error * y)])
        examples = self.examples

        def on_gradient(gradient: Tensor) -> None:
            rows = _channels_last(layer, gradient) * real
            self.per_output += _sum_rows(rows.square())
            self._responses.append(_by_example(rows * error, examples).sum(1, dtype=torch.float64).cpu())
            mends = {"nothing": [], "shift": [rows], "shift and scale": [rows, rows * y]}[self.repair]
            if mends:
                self._mendable.append(torch.stack([_by_example(one, examples).cpu() for one in mends]))

        start = output if output.requires_grad else output.detach().requires_grad_()
        passed_on = start.clone()  # an in-place activation may follow
        passed_on.register_hook(on_gradient)
        return passed_on

    def remaining(self) -> tuple[Tensor, float]:
        """What no repair mends: (O,) float64, sum over rows of the squared error; sum of (gradient . error)^2."""
        error, output, error_square, output_square, product = self._sums
        count = max(self.rows, 1)
        responses = torch.cat(self._responses) if self._responses else torch.zeros(0, dtype=torch.float64)
        if self.repair == "nothing":
            return error_square, float(responses.square().sum())
        left, variance = error_square - error.square() / count, output_square - output.square() / count
        slope = torch.zeros_like(error)
        if self.repair == "shift and scale":
            along = product - error * output / count
            slope = torch.where(variance > _ROUNDING * output_square, along / variance, 0.0)
            left = left - slope * along
        mends = torch.stack([(error - slope * output) / count, slope])
        for mend, one in zip(mends, torch.cat(self._mendable, 1) if self._mendable else (), strict=False):
            responses = responses - one.double() @ mend
        return left.clamp(min=0.0), float(responses.square().sum())

    @torch.no_grad()
    def _error(self, layer: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
        """The error of masking by magnitude, (..., O)."""
        twin = copy.copy(layer)  # with whatever stride and padding it has, and without its bias and its hooks
        missing = torch.where(self._mask, 0.0, -layer.weight)
        twin._parameters = {"weight": nn.Parameter(missing, requires_grad=False), "bias": None}
        return _channels_last(layer, twin.forward(inputs))


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


def _channels_last(layer: nn.Module, output: Tensor) -> Tensor:
    """(..., O), float32 or wider."""
    rows = output.movedim(-3, -1) if isinstance(layer, nn.Conv2d) else output
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _sum_rows(rows: Tensor) -> Tensor:
    """(O,) float64; float32 within a batch, whose partial sums are exact enough and many times faster."""
    return rows.sum(tuple(range(rows.dim() - 1))).double().cpu()


def _by_example(rows: Tensor, examples: int) -> Tensor:
    """Sums over the rows of each example, (examples, O); of all rows, (1, O), where they cannot be told apart."""
    # a call that folds other axes into the first leaves the examples outermost
    groups = examples if len(rows) % examples == 0 else 1
    first = rows.sum(tuple(range(1, rows.dim() - 1))) if rows.dim() > 2 else rows
    return first.reshape(groups, -1, rows.shape[-1]).sum(1)
