"""How this process keeps the memory that tensors have freed: as little of it as costs no time.

docs/log.md has what each of these is worth.
"""

import ctypes
import os
import sys

_ARENA_MAX, _MMAP_THRESHOLD = -8, -3  # M_ARENA_MAX and M_MMAP_THRESHOLD of <malloc.h>
_LARGE = 3 << 20  # bytes
_SET_BY_USER = {"MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}


def ask_for_huge_pages() -> None:
    """Let PyTorch ask for huge pages, and MKL keep nothing for each thread, unless the user has set it otherwise.

    Both read the environment once, so this comes before PyTorch is imported.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("MKL_DISABLE_FAST_MM", "1")


def share_heap() -> None:
    """Let all threads allocate from one heap, and large tensors outside it.

    Nothing happens if the user has set such things or the C library is not glibc.

    A conversion runs each batch in a thread of its own, and glibc gives threads heaps of their own, each of which keeps
    what was freed in it; of one heap, large tensors that come and go leave holes. Memory outside goes back to the
    system at once, at the price of its pages being made anew: huge ones cost next to nothing. Threads that exist keep
    the heap they have.
    """
    if _SET_BY_USER & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)
        mallopt(_MMAP_THRESHOLD, _LARGE)
