"""Where the sparse products are possible, and in words why not."""

import torch
from torch import Tensor

from tnm_pipeline.training.pattern import Pattern

_SHORT_FLOATS = (torch.float16, torch.bfloat16)
_SIDE = 16  # cuSPARSELt takes sparse operands of 16-bit values in multiples of this, both ways
_CAPABILITY = (8, 0)  # the first with sparse tensor cores
_HOPPER = (9, 0)
_SLOW_ON_HOPPER = 800  # version 0.8.0


def why_never(weight: Tensor, pattern: Pattern) -> str | None:
    """Why a layer cannot use sparse products, whatever it is trained with; None: nothing is in the way.

    Args:
        weight: of the layer.
        pattern: that its mask holds.
    """
    if (pattern.n, pattern.m) != (2, 4):
        return f"pattern {pattern}: the hardware multiplies 2:4"
    if weight.ndim != 2:
        return "a convolution: cuSPARSELt multiplies matrices"
    if weight.shape[0] % _SIDE or weight.shape[1] % _SIDE:
        return f"{weight.shape[0]} x {weight.shape[1]}: both sides must be multiples of {_SIDE}"
    if torch.version.hip is not None:
        return "ROCm: untested there"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    return None


def why_not_now(weight: Tensor, dtype: torch.dtype | None) -> str | None:
    """Why a layer cannot use sparse products as it is being trained; None: nothing is in the way.

    Args:
        weight: of the layer, where it is.
        dtype: in which it multiplies; None: in none, as input and weight differ.
    """
    if type(weight) not in (Tensor, torch.nn.Parameter):
        return f"its weight is a {type(weight).__name__}: only whole, plain weights are packed, no shards"
    if not weight.is_cuda:
        return f"it is on {weight.device}"
    if torch.cuda.get_device_capability(weight.device) < _CAPABILITY:
        return f"{torch.cuda.get_device_name(weight.device)} has no sparse tensor cores"
    if dtype is None:
        return "its input has another format than its weight"
    if dtype not in _SHORT_FLOATS:
        return f"it multiplies in {str(dtype).removeprefix('torch.')}: train in bfloat16 or float16, say by autocast"
    return None


def library_note(device: torch.device) -> str:
    """What is known to slow the installed library down on a device; empty: nothing.

    Source: release notes of cuSPARSELt 0.8.1. torch 2.11 comes with 0.8.0, 2.12 with 0.8.1.
    """
    if torch.backends.cusparselt.version() == _SLOW_ON_HOPPER and torch.cuda.get_device_capability(device) == _HOPPER:
        return "; cuSPARSELt 0.8.0 is slow on this GPU by its makers' notes: torch 2.12 comes with 0.8.1"
    return ""
