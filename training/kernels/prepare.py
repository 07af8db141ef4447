"""Mask, cast and transpose a weight, ready to be packed: what every optimizer step needs of every layer.

As torch operators these are three passes over the weight. On a GPU with Triton one kernel reads it once.

Shape legend: O = out features, I = in features.
"""

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


@torch.no_grad()
def masked_cast(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The masked weight in another format.

    Args:
        weight: (O, I), float32, float16 or bfloat16.
        mask: (O, I) bool, `True` = kept.
        dtype: of the result, float16 or bfloat16.

    Returns:
        (O, I), contiguous. Pruned entries are +0: of a product with the mask they would be -0 where the weight is
        negative, and nobody promises that a packer takes those for zeros.
    """
    if weight.is_cuda and _has_triton():
        with torch.cuda.device(weight.device):  # where Triton launches, on the current stream
            return cast_by_kernel(weight, mask, dtype, transpose=False)[0]
    return torch.where(mask, weight.to(dtype), 0.0).contiguous()


def masked_cast_both(weight: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`masked_cast` and its transpose, (O, I) and (I, O), both contiguous."""
    if weight.is_cuda and _has_triton():
        with torch.cuda.device(weight.device):
            cast, transposed = cast_by_kernel(weight, mask, dtype, transpose=True)
            return cast, transposed
    cast = masked_cast(weight, mask, dtype)
    return cast, cast.t().contiguous()


@torch.no_grad()
def cast_by_kernel(weight: Tensor, mask: Tensor, dtype: torch.dtype, *, transpose: bool) -> list[Tensor]:
    """`masked_cast`, then its transpose if wanted, on the current device; also on a CPU, by Triton's interpreter."""
    # Triton may be missing: the kernel's file cannot be imported without it.
    from tnm_pipeline.training.kernels.prepare_kernel import launch

    shapes = [weight.shape, weight.shape[::-1]] if transpose else [weight.shape]
    results = [torch.empty(shape, dtype=dtype, device=weight.device) for shape in shapes]
    if weight.numel():
        launch(weight.contiguous(), mask.contiguous(), *results)
    return results


@cache
def _has_triton() -> bool:
    """Whether Triton is installed; says so once where it is not."""
    found = find_spec("triton") is not None
    if not found:
        _log.warning("weights are prepared for packing by three passes instead of one: install triton for the kernel")
    return found
