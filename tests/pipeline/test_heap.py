"""Threads share one heap once that is asked for, and large blocks lie outside it."""

import os
import platform
import re
import subprocess
import sys

import pytest

_SETTINGS = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_TRY = """
import ctypes, threading
from tnm_pipeline.pipeline.heap import share_heap
if {share}: share_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
for _ in range(2):
    block = libc.malloc(8 << 20)
    libc.free(block)  # glibc takes the next one of this size from the heap, and keeps it
libc.malloc(8 << 20)
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


def allocator(share: bool, **settings: str) -> str:
    """What it says of itself after some threads have allocated, and a large block was."""
    environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS} | settings
    done = subprocess.run(
        [sys.executable, "-c", _TRY.format(share=share)], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def heaps(share: bool, **settings: str) -> int:
    return allocator(share, **settings).count("<heap nr=")


def outside(share: bool) -> int:
    """Bytes in blocks of their own."""
    found = re.search(r'<total type="mmap" count="\d+" size="(\d+)"', allocator(share))
    assert found
    return int(found[1])


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps of threads are glibc's")


@glibc
def test_threads_share_one_heap() -> None:
    assert heaps(share=False) > 1
    assert heaps(share=True) == 1
    assert heaps(share=True, MALLOC_ARENA_MAX="8") > 1  # the user knows better


@glibc
def test_large_blocks_lie_outside_the_heap() -> None:
    assert outside(share=True) >= 8 << 20 > outside(share=False)


def test_the_command_asks_before_torch_is_there_and_the_user_knows_better() -> None:
    code = (
        "import os, sys; sys.argv = ['tnm-pipeline', '--version']\n"
        "from tnm_pipeline.pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules, os.environ['THP_MEM_ALLOC_ENABLE'])"
    )
    for value in ("1", "0"):
        environment = {name: text for name, text in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
        environment |= {} if value == "1" else {"THP_MEM_ALLOC_ENABLE": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.splitlines()[-1] == f"False {value}"
