"""The readable header of a TensorRT-RTX plan: for which GPUs it was built, without loading it.

The layout is not documented. It was read off plans built for every capability, alone and together; a plan with
another magic or layout number is left unread.
"""

import struct

_MAGIC = b"vtrt"
_LAYOUT = 2
_LAYOUT_AT = 8
_CAPABILITIES_AT = 32
_BITS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # bit 0 first


def capabilities_in_header(plan: bytes) -> set[str] | None:
    """Compute capabilities that a plan states (`{"8.0", "8.9"}`).

    Args:
        plan: The plan's bytes; the first 36 are enough.

    Returns:
        The capabilities; None where the layout, or a bit in it, is not one that this module knows.
    """
    if len(plan) < _CAPABILITIES_AT + 4 or plan[:4] != _MAGIC:
        return None
    (layout,) = struct.unpack_from("<I", plan, _LAYOUT_AT)
    (bits,) = struct.unpack_from("<I", plan, _CAPABILITIES_AT)
    if layout != _LAYOUT or bits >> len(_BITS):
        return None
    return {capability for bit, capability in enumerate(_BITS) if bits >> bit & 1}
