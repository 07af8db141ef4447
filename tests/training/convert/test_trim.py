"""Freed memory goes back to the system before it is needed for something large."""

import sys
from pathlib import Path

import pytest
import torch

from tnm_pipeline.training.convert.trim import make_room


def resident() -> int:
    """Bytes of this process in memory."""
    return 4096 * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("width", "most"), [(384, 1.0), (1536, 0.5)])
def test_holes_in_the_heap_are_given_back_for_wide_layers_only(width: int, most: float) -> None:
    make_room(1536)
    before = resident()
    tensors = [torch.ones(25_000) for _ in range(1000)]  # 100 MB, small enough for the heap
    last = tensors[::50]
    del tensors
    held = resident() - before
    make_room(width)
    left = resident() - before
    assert held > 60e6
    assert left <= most * held
    assert (left > 0.9 * held) == (width == 384)
    assert all(bool((one == 1).all()) for one in last)
