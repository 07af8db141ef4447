"""Before a step that needs much memory, what earlier ones have freed goes back to the system."""

import ctypes
import sys

_MUCH = 16 << 20  # bytes of a gram matrix; giving back for less costs more than it brings


def make_room(width: int) -> None:
    """Return freed memory to the system if the sums of a layer are large; the C library keeps it otherwise.

    Nothing happens where the C library is not glibc.

    Args:
        width: K, of the (K, K) float64 sums to come.
    """
    if 8 * width**2 < _MUCH:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
