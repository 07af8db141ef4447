"""Float32 constants in a half type: zeros stay zeros, other values stay other than zero, and nothing overflows."""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tnm_pipeline.export.errors import ExportRejected

_NAMES = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: (2 - 2.0**-7) * 2.0**127}
_SMALLEST = {ir.DataType.FLOAT16: 2.0**-24, ir.DataType.BFLOAT16: 2.0**-133}
# Attention masks use -1e9, -1e12 or float32's lowest; a weight of that size would be of no layer that half can hold.
_MASKED = -1e6


def short(half: ir.DataType) -> str:
    """`"fp32"`, `"fp16"` or `"bf16"`."""
    return _NAMES[half]


def to_half(values: NDArray[np.float32], half: ir.DataType, owner: str, advice: str) -> NDArray[np.generic]:
    """Round to the nearest half value.

    Non-zero values below the smallest subnormal become it: a weight that was kept stays kept. Infinities and NaN stay.

    Args:
        values: Float32, any shape.
        half: FLOAT16 or BFLOAT16.
        owner: What a message calls the constant.
        advice: What to do if it does not fit; ends the message.

    Returns:
        The same shape, of the type's numpy dtype.

    Raises:
        ExportRejected: A finite value is beyond the type's range.
    """
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    if largest > _LARGEST[half]:
        raise ExportRejected(f"{owner} holds {largest:.6g} and {short(half)} ends at {_LARGEST[half]:g}: {advice}")
    with np.errstate(all="ignore"):
        rounded: NDArray[np.generic] = values.astype(half.numpy())
    vanished = (rounded == 0) & (values != 0)
    if vanished.any():
        rounded[vanished] = np.copysign(np.float32(_SMALLEST[half]), values[vanished]).astype(half.numpy())
    return rounded


def unmasked(values: NDArray[np.float32], half: ir.DataType) -> NDArray[np.float32]:
    """Clip a constant that hides positions from a softmax to the lowest value of a half type.

    Such a constant is one number of at most -1e6, alone or among zeros: added to or put in place of a score it means
    "masked", which the lowest value means too. -inf is left alone: graphs test for the NaN of rows that are masked
    throughout.

    Returns:
        `values` itself if there is nothing to clip.
    """
    if not values.size or not float(values.min()) < -_LARGEST[half]:
        return values
    low = values[np.isfinite(values) & (values != 0)]
    if not low.size or low.min() != low.max() or not low[0] <= _MASKED:
        return values
    return np.where(np.isfinite(values), np.maximum(values, np.float32(-_LARGEST[half])), values)
