"""No ONNX file, however it is spoilt, makes the reader or the converter crash, hang or take the memory it declares."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.export.mutated import SECONDS


def _outcomes(folder: Path, first: int, count: int) -> list[str]:
    """One line a call: the file, what was called, and how it ended; a death counts, and the next file goes on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines: list[str] = []
    start, end = first, first + count
    while start < end:
        command = [sys.executable, "-m", "tests.export.mutated", str(folder), str(start), str(end - start)]
        # A call that hangs ends the process by itself; this limit is for a process that cannot.
        limit = 60 + count * SECONDS
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        lines += process.stdout.splitlines()
        if process.returncode == 0:
            break
        assert lines, process.stderr
        lines[-1] += f"WRONG died with {process.returncode}: {process.stderr[-2000:]}"
        start = int(lines[-1].split()[0]) + 1
    return lines


def _check(lines: list[str], count: int) -> None:
    assert [line for line in lines if "WRONG" in line] == []
    ended = Counter(tuple(line.split()[1:3]) for line in lines)
    assert sum(ended.values()) == 4 * count
    for call in ("inspect", "fp16", "bf16", "emulated"):  # neither too tame nor too wild
        assert ended[call, "done"] > count / 50, ended
        assert ended[call, "rejected"] > count / 4, ended


def test_a_few_hundred_spoilt_files(tmp_path: Path) -> None:
    _check(_outcomes(tmp_path, 0, 200), 200)


@pytest.mark.slow
def test_5000_spoilt_files(tmp_path: Path) -> None:
    _check(_outcomes(tmp_path, 1000, 5000), 5000)
