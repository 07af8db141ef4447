"""What became of each call: counted, and told to whoever observes."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tnm_pipeline.engines.manifest import Manifest
from tnm_pipeline.engines.metrics import Recorder

_log = logging.getLogger("tnm_pipeline.engines")


@dataclass(frozen=True)
class Call:
    """One call that ended, for whoever observes a session.

    Attributes:
        artifact: File name of what answered, or would have.
        backend: Its runtime.
        started: When the call came, in nanoseconds since 1970.
        queue: Seconds in the queue; 0 for a call that ran in the caller's thread.
        run: Seconds of the run that answered it; 0 where it never ran.
        joined: Calls that this run answered.
        error: Why there is no answer, None where there is.
    """

    artifact: str
    backend: str
    started: int
    queue: float
    run: float
    joined: int
    error: Exception | None


Observer: TypeAlias = Callable[[Call], None]


class CallLog:
    """Where the calls of a session end. Thread-safe.

    Args:
        on_call: Told of every call; what it raises is logged, the call itself is unharmed.
    """

    def __init__(self, on_call: Observer | None) -> None:
        self.recorder = Recorder()
        self._on_call = on_call

    def ran(self, manifest: Manifest, seconds: float) -> None:
        """A call was answered in the caller's thread."""
        self.recorder.ran(seconds)
        if self._on_call:
            self.tell(manifest, 0.0, seconds)

    def failed(self, manifest: Manifest, error: Exception, *, queue: float = 0.0, run: float = 0.0) -> None:
        """A call ends without an answer."""
        self.recorder.failed(type(error).__name__)
        self.tell(manifest, queue, run, error=error)

    def tell(
        self, manifest: Manifest, queue: float, run: float, *, joined: int = 1, error: Exception | None = None
    ) -> None:
        """Tell who observes, if anybody does, of a call that just ended."""
        if self._on_call is None:
            return
        started = time.time_ns() - int((queue + run) * 1e9)
        try:
            self._on_call(Call(manifest.artifact, manifest.backend, started, queue, run, joined, error))
        except Exception:
            _log.exception("on_call failed; the call itself did not")
