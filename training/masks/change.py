"""What a new mask changes, counted in one walk over the memory: on a CPU a tenth of the time that it takes torch."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnm_pipeline.training.masks.jit import call, compiled

_CHUNK = 4096  # summed up in int16, which it cannot fill, and in float32, of which it fills no more than half


def count_change(weight: Tensor, before: Tensor, after: Tensor) -> tuple[int, int, float, float]:
    """The sums over a weight and two masks on the CPU.

    Args:
        weight: any shape, strides and floating dtype.
        before: bool, same shape.
        after: likewise.

    Returns:
        Entries that differ, entries kept after, sum of kept abs(w), sum of abs(w).
    """
    values = weight.detach().float().reshape(-1).numpy()
    masks = [mask.reshape(-1).view(torch.uint8).numpy() for mask in (before, after)]
    counts: tuple[int, int, float, float] = call(_count, "comparison", values, *masks)
    return counts


@partial(compiled, any_order=True)
def _count(weight: Any, before: Any, after: Any) -> Any:
    differing: Any = 0
    keeping: Any = 0
    kept: Any = 0.0
    whole: Any = 0.0
    for first in range(0, weight.size, _CHUNK):
        values, old, new = weight[first : first + _CHUNK], before[first : first + _CHUNK], after[first : first + _CHUNK]
        differing_here = keeping_here = np.int16(0)
        kept_here = whole_here = np.float32(0)
        for index in range(new.size):
            differing_here = np.int16(differing_here + np.int16(new[index] ^ old[index]))
            keeping_here = np.int16(keeping_here + np.int16(new[index]))
        for index in range(values.size):  # apart from the counts, or it is not turned into vectors
            magnitude = np.float32(abs(values[index]))
            kept_here += magnitude if new[index] else np.float32(0)
            whole_here += magnitude
        differing += differing_here
        keeping += keeping_here
        kept += kept_here
        whole += whole_here
    return differing, keeping, kept, whole
