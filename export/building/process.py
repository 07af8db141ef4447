"""Runs a building process to its end, whatever end that is: an answer, a crash, a kill, or the time limit."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Any

from tnm_pipeline.export.building.request import BuildRequest

_TICK_S = 1.0
_TICK = b'["tick"]'
_LINES = 20  # of stderr that are kept: a crash explains itself in its last ones
# -P: a user's own folder named like one of our packages must not be imported from the working directory.
_COMMAND = (sys.executable, "-P", "-m", "tnm_pipeline.export.building.child")


@dataclass(frozen=True)
class Ending:
    """How a building process ended.

    Attributes:
        code: Its exit status; negative for the signal that killed it.
        timed_out: It was stopped at the time limit.
        out_of_memory: The kernel killed a process for lack of memory in the meantime, and this one was killed.
        said: Last lines of its stderr.
    """

    code: int
    timed_out: bool
    out_of_memory: bool
    said: tuple[str, ...]

    @property
    def cause(self) -> str:
        """`"SIGSEGV"`, or `"exit status 1"`."""
        if self.code < 0:
            return signal.Signals(-self.code).name
        return f"exit status {self.code}"


def run(request: BuildRequest, hear: Callable[[str, list[Any]], None], time_limit_s: float | None) -> Ending:
    """Start a building process, pass on what it says, and wait until it has ended.

    Args:
        request: What it shall build.
        hear: Called with the kind of each event and its values, as they come, and with `"tick"` and none whenever it
            said nothing for a second. What it raises ends the process and comes out of this function.
        time_limit_s: Seconds after which the process is killed; None waits for ever.

    Returns:
        How it ended. Never leaves a process behind, also when it raises.
    """
    killed_before = _killed_by_kernel()
    deadline = math.inf if time_limit_s is None else time.monotonic() + time_limit_s
    timed_out = False
    said: deque[str] = deque(maxlen=_LINES)
    events: SimpleQueue[bytes] = SimpleQueue()
    process = subprocess.Popen(  # noqa: S603  # our own module, by the interpreter that runs this
        _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr  # noqa: PT018  # as asked for
    listeners = [
        Thread(target=_pass_on, args=(process.stdout, events), daemon=True),
        Thread(target=_keep_last, args=(process.stderr, said), daemon=True),
    ]
    try:
        for listener in listeners:
            listener.start()
        _ask(process.stdin, request)
        while line := _next(events, deadline):
            kind, *values = json.loads(line)
            hear(kind, values)
            if time.monotonic() >= deadline:
                process.kill()  # what it has said until now is still heard
                timed_out, deadline = True, math.inf
        code = process.wait()
    finally:
        process.kill()  # nothing, if it has ended
        process.wait()
        for listener in listeners:
            listener.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            _close(pipe)
    killed = code == -getattr(signal, "SIGKILL", 0) and not timed_out
    return Ending(code, timed_out, killed and _killed_by_kernel() > killed_before, tuple(said))


def _next(events: "SimpleQueue[bytes]", deadline: float) -> bytes:
    """The next event, or a tick at the deadline at the latest; empty when there will be no more."""
    try:
        return events.get(timeout=max(0.0, min(_TICK_S, deadline - time.monotonic())))
    except Empty:
        return _TICK


def _pass_on(stdout: IO[bytes], events: "SimpleQueue[bytes]") -> None:
    for line in stdout:
        if line.endswith(b"\n"):  # a kill cuts the last one short
            events.put(line)
    events.put(b"")


def _ask(stdin: IO[bytes], request: BuildRequest) -> None:
    with suppress(BrokenPipeError):  # it ended at once; its exit status and stderr tell why
        stdin.write(json.dumps(asdict(request)).encode() + b"\n")
        stdin.flush()  # left open: its end tells the process that nobody listens any more


def _keep_last(stderr: IO[bytes], said: deque[str]) -> None:
    said.extend(text for line in stderr if (text := line.decode(errors="replace").strip()))


def _close(pipe: IO[bytes]) -> None:
    with suppress(BrokenPipeError):  # of stdin: what the process never read
        pipe.close()


def _killed_by_kernel() -> int:
    """How many processes the kernel has killed for lack of memory since it started; 0 where it does not tell."""
    statistics = Path("/proc/vmstat")
    found = re.search(r"^oom_kill (\d+)$", statistics.read_text(), re.MULTILINE) if statistics.exists() else None
    return int(found[1]) if found else 0
