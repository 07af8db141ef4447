"""How the CUDA kernels are compiled: by Triton, on their first launch, and kept on disk in its own cache."""

from collections.abc import Callable
from typing import Any

import triton  # pyright: ignore[reportMissingImports]  # optional: `cuda` looks for it before it imports any kernel


def compiled(*, unspecialised: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Compile a kernel, or a function that kernels call.

    Args:
        unspecialised: integer arguments whose values are not looked at. Triton compiles anew where another one is 1 or
            a multiple of 16 for the first time, which vector loads need.
    """
    decorator: Callable[[Callable[..., Any]], Any] = triton.jit(do_not_specialize=list(unspecialised))
    return decorator
