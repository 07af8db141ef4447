"""Processes that did all their work, and that torch then aborted while they left."""

import subprocess
from collections.abc import Iterable
from pathlib import Path

_ABORT = "terminate called without an active exception"


def ended_well(done: subprocess.CompletedProcess[str], written: Iterable[Path], since: float) -> bool:
    """Whether processes ended with 0, or with what they had to write, by an abort of torch's own threads.

    Seen now and then with gloo in torch 2.13, after the work (https://github.com/pytorch/pytorch/pull/179291).

    Args:
        done: the launcher.
        written: what all processes together write last.
        since: when it was started, by `time.time()`.
    """
    if done.returncode == 0:
        return True
    return _ABORT in done.stderr and all(path.exists() and path.stat().st_mtime >= since for path in written)
