"""Unbiased N:M samples of the output gradient, so that the third product, the weight gradient, can be sparse too.

The aim of Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients" (ICLR 2023,
arXiv:2203.10991), for any N:M. Who keeps an entry x with probability p, as x / p, is right on average and has the
variance x^2 (1/p - 1). In a group that keeps N entries the probabilities sum up to N at most; the sum of the variances
is then smallest at p = min(1, abs(x) / c), where c makes them sum up to N, and what is kept becomes
sign(x) max(abs(x), c). To draw exactly N entries with these probabilities, lay them end to end on a line of length N
and keep those under the marks u, u + 1, ..., u + N - 1, for one random u from [0, 1): systematic sampling.

Shape legend: B = batch, T = samples (and positions), I = in features or channels, O = out features or channels,
M = group size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from tnm_pipeline.training.pattern import Pattern, PatternError

GRADIENT_PATTERN = Pattern(2, 4)  # the one that hardware multiplies with


def sampled(gradient: Tensor, pattern: Pattern = GRADIENT_PATTERN) -> Tensor:
    """An estimate of a gradient with at most N non-zeros in M consecutive samples: unbiased, of the least variance.

    It draws from torch's generator of the device, one number a group.

    Args:
        gradient: (T, O), floating; samples beyond the last whole group stay as they are.
        pattern: row-wise.

    Returns:
        Same shape and dtype, in which large values are rounded. Groups of N non-zeros or fewer are as they were, and
        groups with NaN or Inf entries have some, for a loss scaler to see.

    Raises:
        PatternError: a transposable pattern.
    """
    if pattern.transposable:
        raise PatternError(
            f"a gradient is sampled along the samples alone: take {pattern.n}:{pattern.m}, not {pattern}"
        )
    grouped = len(gradient) // pattern.m * pattern.m
    entries = gradient[:grouped].unflatten(0, (grouped // pattern.m, pattern.m)).unbind(1)  # M of (T/M, O)
    magnitudes = [entry.abs().to(torch.promote_types(entry.dtype, torch.float32)) for entry in entries]
    threshold = _threshold(magnitudes, pattern.n)
    shift = torch.rand_like(threshold)
    line = torch.zeros_like(threshold)
    marks = torch.zeros_like(threshold)
    estimates = []
    for entry, magnitude in zip(entries, magnitudes, strict=True):
        line = line + (magnitude / threshold).clamp(max=1)
        passed = (line - shift).ceil().clamp(max=pattern.n)
        # Not `passed > marks`: 0/0 where N or fewer are not zero, and Inf/Inf, are kept, with all that follows them.
        keep = ~(passed <= marks)
        estimate = torch.copysign(torch.maximum(magnitude, threshold), entry)
        estimates.append(estimate.mul_(keep.view(torch.uint8)).to(entry.dtype))
        marks = passed
    return torch.cat([torch.stack(estimates, 1).flatten(0, 1), gradient[grouped:]])


def _threshold(magnitudes: list[Tensor], n: int) -> Tensor:
    """The c with sum(min(1, magnitude / c)) = N: the least, over k < N, of the sum without the k largest over N - k."""
    rest = list(magnitudes)
    threshold = torch.stack(rest).sum(0) / n
    for left in range(n - 1, 0, -1):
        for other in range(1, len(rest)):  # the largest to the front: a sort of whole slices
            rest[0], rest[other] = torch.maximum(rest[0], rest[other]), torch.minimum(rest[0], rest[other])
        rest = rest[1:]
        threshold = torch.minimum(threshold, torch.stack(rest).sum(0) / left)
    return threshold


Steps = dict[str, Any]  # of a convolution: stride and dilation, (vertical, horizontal)


class _Sampled(torch.autograd.Function):
    """A convolution, or without steps a linear product."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, steps: Steps | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.steps = steps
        return F.linear(inputs, weight, bias) if steps is None else F.conv2d(inputs, weight, bias, **steps)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # once_differentiable makes ctx positional
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        for_inputs, for_weight, for_bias, _ = ctx.needs_input_grad
        gradient = gradients[0]
        # Of one image after the other, rows first: the product's order.
        positions = gradient if ctx.steps is None else gradient.movedim(1, -1)  # (..., O)
        rows = positions.reshape(-1, len(weight))  # (T, O)
        return (
            _input_gradient(gradient, inputs, weight, ctx.steps) if for_inputs else None,
            _weight_gradient(sampled(rows).view_as(positions), inputs, weight, ctx.steps) if for_weight else None,
            rows.sum(0) if for_bias else None,
            None,
        )


def _input_gradient(gradient: Tensor, inputs: Tensor, weight: Tensor, steps: Steps | None) -> Tensor:
    if steps is None:
        return gradient @ weight
    found: Tensor = conv2d_input(inputs.shape, weight, gradient, **steps)
    return found


def _weight_gradient(positions: Tensor, inputs: Tensor, weight: Tensor, steps: Steps | None) -> Tensor:
    """From an output gradient (..., O)."""
    if steps is None:
        return positions.reshape(-1, positions.shape[-1]).T @ inputs.reshape(-1, inputs.shape[-1])
    found: Tensor = conv2d_weight(inputs, weight.shape, positions.movedim(-1, 1), **steps)
    return found


def sampled_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` whose weight gradient is a product with the sampled output gradient; all else is exact.

    Args:
        inputs: (..., I).
        weight: (O, I).
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    tensors = _as_autocast(inputs, weight, bias)
    output: Tensor = _Sampled.apply(*tensors, None)  # type: ignore[no-untyped-call]  # torch's
    return output


def sampled_conv2d(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """`conv2d` without padding and groups, whose weight gradient comes from the sampled output gradient.

    Args:
        inputs: (B, I, H, W), padded.
        weight: (O, I, kernel height, kernel width).
        bias: (O,) or None.
        stride: of the kernel, (vertical, horizontal).
        dilation: likewise.

    Returns:
        (B, O, H', W').
    """
    tensors, steps = _as_autocast(inputs, weight, bias), {"stride": stride, "dilation": dilation}
    output: Tensor = _Sampled.apply(*tensors, steps)  # type: ignore[no-untyped-call]  # as above
    return output


def _as_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast makes of a product's operands, which it leaves to functions with a backward of their own."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
