"""Threads share one heap once that is asked for."""

import os
import platform
import subprocess
import sys

import pytest

_SETTINGS = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
_COUNT = """
import ctypes, threading
from tnm_pipeline.pipeline.heap import share_heap
if {share}: share_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
all_there = threading.Barrier(4)
def allocate():
    libc.malloc(5000)
    all_there.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for one in threads: one.start()
for one in threads: one.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def heaps(share: bool, **settings: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS} | settings
    done = subprocess.run(
        [sys.executable, "-c", _COUNT.format(share=share)], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.count("<heap nr=")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are glibc's")
def test_threads_share_one_heap() -> None:
    assert heaps(share=False) > 1
    assert heaps(share=True) == 1
    assert heaps(share=True, MALLOC_ARENA_MAX="8") > 1  # the user knows better
