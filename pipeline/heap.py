"""How this process keeps the memory that tensors have freed."""

import ctypes
import os
import sys

_ARENA_MAX = -8  # M_ARENA_MAX of <malloc.h>


def share_heap() -> None:
    """Let all threads allocate from one heap, unless the user has set their number or the C library is not glibc.

    A conversion runs each batch in a thread of its own, and glibc gives threads heaps of their own, each of which keeps
    what was freed in it: converting a sentence encoder took 1.1 GB instead of 0.7, and longer. Threads that exist keep
    the heap they have.
    """
    if {"MALLOC_ARENA_MAX", "GLIBC_TUNABLES"} & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
