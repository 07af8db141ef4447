"""The queue of a session: calls wait in it for a worker, and are joined there if batching is on."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from tnm_pipeline.engines.arrays import Feed
from tnm_pipeline.engines.batching import Extent, Join
from tnm_pipeline.engines.errors import Overloaded, SessionClosed
from tnm_pipeline.engines.manifest import Manifest

_log = logging.getLogger("tnm_pipeline.engines")


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Request:
    """A call that waits.

    Attributes:
        feeds: Checked inputs.
        future: Who waits for the answer.
        deadline: By `time.monotonic()`, None for none.
        queued: By `time.monotonic()`, when it came.
        context: Of the caller, for what observes calls.
        key: Requests of equal keys can be joined.
        extent: What it adds to a joined run.
        on_device: Whether the answer stays on the GPU.
        manifest: Of the artifact that it was checked against.
    """

    feeds: Mapping[str, Feed]
    future: Future[dict[str, Any]]
    deadline: float | None
    queued: float
    context: Context
    key: Hashable
    extent: Extent
    on_device: bool
    manifest: Manifest

    def late(self, now: float) -> bool:
        """Whether its deadline has passed."""
        return self.deadline is not None and now >= self.deadline

    def patient_until(self, gathered: float, delay: float) -> float:
        """When it must have begun: a delay after gathering began, or when half of its time is over, if that is first.

        The delay does not count from its arrival: those whom a run has just answered would never be joined by those who
        waited meanwhile, and calls in turns would run as two halves of a batch.
        """
        if self.deadline is None:
            return gathered + delay
        return min(gathered + delay, self.queued + (self.deadline - self.queued) / 2)


class Dispatcher:
    """A bounded queue and the threads that work it off. Thread-safe.

    Args:
        answer: Called with requests to be answered together, or refused if they are late; in a worker, but for late
            ones that make room for another.
        workers: Threads; they start with the first request.
        bound: Requests that may wait.
        join: When requests are answered together; None: never.
        name: Of the threads.
    """

    def __init__(
        self, answer: Callable[[list[Request]], None], *, workers: int, bound: int, join: Join | None, name: str
    ) -> None:
        self._answer = answer
        self._bound = bound
        self._join = join
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._gathering = False
        self._closed = False
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True) for index in range(workers)
        ]

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    def put(self, request: Request) -> None:
        """Queue a request.

        Raises:
            Overloaded: The queue is full.
            SessionClosed: After `close`, or in a process forked from the one that made it.
        """
        if os.getpid() != self._process:
            raise SessionClosed(
                f"this session was loaded by process {self._process}, and a fork copies no threads: load it after the "
                "fork"
            )
        stale: list[Request] = []
        try:
            with self._changed:
                if self._closed:
                    raise SessionClosed("the session is closed: load it again to run it")
                if len(self._waiting) >= self._bound:
                    stale = self._take_late()
                if len(self._waiting) >= self._bound:
                    raise Overloaded(
                        f"{self._bound} calls wait already: send less, or load with a longer queue (Limits.queue)"
                    )
                for thread in self._threads:
                    if thread.ident is None:
                        thread.start()
                self._waiting.append(request)
                self._changed.notify_all()
        finally:
            if stale:
                self._answer(stale)

    def remove(self, request: Request) -> bool:
        """Take a request out of the queue, to be refused by the caller; False where a worker has it already."""
        with self._changed:
            if request not in self._waiting:
                return False
            self._waiting.remove(request)
            return True

    def drop(self) -> list[Request]:
        """Take no more requests, and give up those that wait, which are returned."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
            return left

    def close(self, timeout: float | None) -> list[Request]:
        """Take no more requests, and wait until the workers answered those there are.

        Args:
            timeout: Seconds after which those that still wait are given up; None: never.

        Returns:
            The requests given up.
        """
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return self.drop()

    def _work(self) -> None:
        while requests := self._next():
            try:
                self._answer(requests)
            except BaseException:  # the thread must live: others wait for it
                _log.exception("a worker failed; it goes on")
            del requests  # else the last call would be kept until the next one

    def _next(self) -> list[Request]:
        """What to answer next; nothing after the last."""
        with self._changed:
            while not self._waiting or self._gathering:
                if self._closed and not self._waiting:
                    return []
                self._changed.wait()
            if self._join is None:
                return [self._waiting.popleft()]
            self._gathering = True  # two that gathered would halve the batches
            try:
                return self._gather(self._join)
            finally:
                self._gathering = False
                self._changed.notify_all()

    def _gather(self, join: Join) -> list[Request]:
        """The first that waits, and those like it that come before somebody's patience is over or the batch is full."""
        if late := self._take_late():
            return late
        first, begun = self._waiting.popleft(), time.monotonic()
        gathered, extent, until = [first], first.extent, first.patient_until(begun, join.max_delay)
        while True:
            for request in sorted(self._waiting, key=lambda request: request.extent.distance(first.extent)):
                both = extent.with_(request.extent)
                if request.key == first.key and join.allows(both):
                    self._waiting.remove(request)
                    gathered.append(request)
                    extent, until = both, min(until, request.patient_until(begun, join.max_delay))
            left = until - time.monotonic()
            if extent.rows >= join.max_batch or left <= 0 or self._closed:
                return gathered
            self._changed.wait(left)

    def _take_late(self) -> list[Request]:
        """Out of the queue: those that nobody waits for any more."""
        now = time.monotonic()
        late = [request for request in self._waiting if request.late(now) or request.future.cancelled()]
        for request in late:
            self._waiting.remove(request)
        return late
