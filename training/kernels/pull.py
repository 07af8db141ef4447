"""The pull of pruned weights to zero, which joins the gradient: on a CPU one walk over the memory instead of three."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnm_pipeline.training.masks.jit import call, compiled
from tnm_pipeline.training.masks.sharing import share_out


def pull(gradient: Tensor, weight: Tensor, mask: Tensor, strength: float) -> None:
    """Add strength * weight to the gradient where the mask is False.

    Args:
        gradient: any shape, floating, detached or within `no_grad`; changed in place.
        weight: same shape, floating, likewise detached.
        mask: bool, same shape, `True` = kept.
        strength: of the pull.
    """
    if not _is_plain(gradient, weight, mask):
        # As bytes, which on a CPU become floats eight times as fast as bools do.
        gradient.addcmul_(weight, (~mask).view(torch.uint8), value=strength)
        return
    sums, values, kept = (part.view(-1).numpy() for part in (gradient, weight, mask.view(torch.uint8)))
    factor = np.float32(strength)

    def work(first: int, last: int) -> None:
        call(_pull, "pull", sums[first:last], values[first:last], kept[first:last], factor)

    share_out(work, gradient.numel(), gradient.numel())


def _is_plain(gradient: Tensor, weight: Tensor, mask: Tensor) -> bool:
    """Whether all of them lie entry after entry in the memory of the CPU, the floats as float32."""
    return all(
        type(part) is Tensor and part.device.type == "cpu" and part.dtype == dtype and part.is_contiguous()
        for part, dtype in ((gradient, torch.float32), (weight, torch.float32), (mask, torch.bool))
    )


@compiled
def _pull(gradient: Any, weight: Any, mask: Any, strength: Any) -> None:
    for index in range(gradient.size):
        if not mask[index]:
            gradient[index] += strength * weight[index]
