"""One loaded artifact, and how many calls use it: what a session swaps when it reloads."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

from tnm_pipeline.engines.backends import Backend
from tnm_pipeline.engines.batching import Joiner
from tnm_pipeline.engines.feeds import Signature
from tnm_pipeline.engines.manifest import Manifest

_log = logging.getLogger("tnm_pipeline.engines")


class Engine:
    """An artifact in its runtime, freed once it is retired and the last call has left it. Thread-safe.

    Args:
        path: The artifact.
        manifest: What stands beside it.
        backend: The runtime that answers.
        why: Why this artifact and this runtime answer.
        fallback_reason: Why the artifact that was asked for does not answer, None where it does.
        signed: Whether a trusted key signed the manifest.
        finite: Refuse inputs with NaN or infinities.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        backend: Backend,
        *,
        why: str,
        fallback_reason: str | None,
        signed: bool,
        finite: bool,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.backend = backend
        self.why = why
        self.fallback_reason = fallback_reason
        self.signed = signed
        self.check = Signature(manifest.inputs, finite=finite).check
        self.joiner: Joiner | None = None  # where a session joins calls
        self._lock = threading.Lock()
        self._calls = 0
        self._retired = False
        self._idle = threading.Event()
        self._idle.set()

    @property
    def calls(self) -> int:
        """How many use it now."""
        return self._calls

    def enter(self) -> bool:
        """Begin a call, to be ended by `leave`; False where the engine is retired."""
        with self._lock:
            if self._retired:
                return False
            self._calls += 1
            return True

    def leave(self) -> None:
        """End a call; the last one of a retired engine frees it."""
        with self._lock:
            self._calls -= 1
            last = self._retired and self._calls == 0
        if last:
            self._free()

    def retire(self) -> bool:
        """Take no more calls, and be freed after those under way; whether it was not retired before."""
        with self._lock:
            if self._retired:
                return False
            self._retired = True
            self._idle.clear()
            last = self._calls == 0
        if last:
            self._free()
        return True

    def freed(self, timeout: float | None) -> bool:
        """Whether the calls under way ended, and a retired engine was freed, within `timeout` seconds."""
        return self._idle.wait(timeout)

    def describe(self) -> Mapping[str, object]:
        """How the runtime runs it; nothing of a retired engine."""
        if not self.enter():
            return {}
        try:
            return self.backend.describe()
        finally:
            self.leave()

    def _free(self) -> None:
        try:
            self.backend.close()
        except Exception:  # a driver that failed, fails to free too; the answers are there all the same
            _log.exception("%s was not freed cleanly", self.manifest.artifact)
        finally:
            self._idle.set()
