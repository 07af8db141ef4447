"""The masked kernel of a linear product with a large weight on a CPU: a panel of the weight at a time.

A masked copy of the whole weight would stay from the forward to the backward pass, four bytes a weight, and where it is
larger than the caches it costs a quarter of a step. A panel of its rows is made, multiplied with and forgotten while it
is in a core's cache, in the forward pass and once more for the input gradient.

Shape legend: T = tokens (all leading dimensions of the input), O = out features, I = in features, P = rows of a panel.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tnm_pipeline.training.kernels.masked import masked_entries, masked_weight

_PANEL = 1 << 18  # weights for each thread: a mebibyte of float32
_LEAST_ROWS = 128  # products with fewer are slow
_COPIED = 1 << 20  # weights up to which a copy is as fast (docs/log.md)
_PLAIN = (Tensor, torch.nn.Parameter)


def by_panels(input: Tensor, weight: Tensor) -> bool:  # noqa: A002  # Linear's own name
    """Whether `masked_linear` is for these; `linear` with a masked weight is for all others.

    They are small weights, other devices, formats in which panels would be rounded before they are summed up, autocast,
    nested tensors and subclasses of tensors, and code that is compiled or traced, which is better off with whole
    operators.
    """
    return (
        type(input) in _PLAIN  # first: what stands for a tensor while torch.fx traces can be asked nothing
        and not input.is_nested
        and type(weight) in _PLAIN
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and input.dtype == weight.dtype
        and weight.numel() > _COPIED
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch leaves it so
    )


def masked_linear(
    input: Tensor,  # noqa: A002  # as above
    weight: Tensor,
    mask: Tensor,
    leak: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`linear(input, masked_weight(weight, mask, leak), bias)`, up to the order of sums in the input gradient.

    As with any Linear, the weight must not change before the backward pass; neither may the mask and the leak, and that
    is not checked.

    Args:
        input: (..., I).
        weight: (O, I), what the optimizer steps; it gets the whole, dense, gradient.
        mask: (O, I) bool.
        leak: what is left of pruned weights, 0-dim; None: nothing.
        bias: (O,) or None.

    Returns:
        (..., O).
    """
    rows = input.reshape(-1, input.shape[-1])
    output: Tensor = _MaskedLinear.apply(rows, weight, mask, leak, bias)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return output.view(*input.shape[:-1], output.shape[-1])


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, mask: Tensor, leak: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        for_rows, for_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(rows if for_weight else None, weight if for_rows else None)
        # Not among the saved: DDP sends buffers around before each forward pass, which writes the same values again.
        ctx.mask, ctx.leak = mask, leak
        output = rows.new_empty(len(rows), len(weight))
        for part, panel in _panels(weight, mask, leak):
            if bias is None:
                torch.mm(rows, panel.t(), out=output[:, part])
            else:
                torch.addmm(bias[part], rows, panel.t(), out=output[:, part])
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, _, _, for_bias = ctx.needs_input_grad
        gradient = gradients[0]
        of_rows = None
        if for_rows and torch.is_grad_enabled():  # this gradient will be differentiated
            of_rows = gradient @ masked_weight(weight, ctx.mask, ctx.leak)
        elif for_rows:
            of_rows = gradient.new_zeros(len(gradient), weight.shape[1])
            for part, panel in _panels(weight, ctx.mask, ctx.leak):
                of_rows.addmm_(gradient[:, part], panel)
        of_weight = gradient.t() @ rows if for_weight else None
        return of_rows, of_weight, None, None, gradient.sum(0) if for_bias else None


def _panels(weight: Tensor, mask: Tensor, leak: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight, and what they are multiplied with, (P, I), overwritten by the next ones."""
    size = max(_LEAST_ROWS, torch.get_num_threads() * _PANEL // weight.shape[1])
    place = weight.new_empty(min(size, len(weight)), weight.shape[1])
    first = 0
    for rows, kept in zip(weight.split(size), mask.split(size), strict=True):
        panel = place if len(rows) == len(place) else place[: len(rows)]
        yield slice(first, first + len(rows)), masked_entries(rows, kept, leak, out=panel)
        first += len(rows)
