"""How far a node's outputs are apart, where a half type need not hold what hides something from a softmax."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]

HALF = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
LARGEST = 65504.0  # of fp16
_HIDDEN = -6e4  # what a mask is in fp16: its lowest number, plus a score
_MASKED = -1e6  # "hidden from the softmax", see half_values


def rounded(array: Array, dtype: ir.DataType | None) -> Array:
    """To a half type, if it is one, and back."""
    if dtype is None or dtype not in HALF or array.dtype.kind != "f":
        return array
    if dtype == ir.DataType.FLOAT16:
        array = np.where(_hides(array), -LARGEST, array)
    with np.errstate(over="ignore"):
        return array.astype(dtype.numpy()).astype(np.float32)


def relative_error(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """The largest difference over the largest absolute value, of the output where that is worst."""
    worst = 0.0
    for wanted, given in zip(expected, actual, strict=True):
        if wanted.dtype.kind != "f" or not wanted.size:
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(wanted.astype(np.float64) - given.astype(np.float64))
        same = (wanted == given) | (np.isnan(wanted) & np.isnan(given)) | (_hides(wanted) & (given < _HIDDEN))
        difference[same] = 0.0
        far, absmax = float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max()), largest_of(wanted)
        if far:
            worst = max(worst, far / absmax if absmax else np.inf)
    return worst


def largest_of(array: Array) -> float:
    """The largest absolute value, of finite numbers that hide nothing."""
    if array.dtype.kind != "f":
        return 0.0
    counted = np.abs(array[np.isfinite(array) & ~_hides(array)])
    return float(counted.max()) if counted.size else 0.0


def _hides(array: Array) -> NDArray[np.bool_]:
    """Where one number far below all others hides something from a softmax: half types need not hold it."""
    low = np.isfinite(array) & (array < _MASKED)
    numbers = array[low].astype(np.float64)
    one = bool(numbers.size) and float(numbers.max() - numbers.min()) <= 0.01 * float(-numbers.min())
    return low if one else np.zeros_like(low)
