"""The queue of a session: calls wait in it for a worker, and are joined there if batching is on."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from tnm_pipeline.engines.arrays import Feed
from tnm_pipeline.engines.errors import Overloaded, SessionClosed


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A call that waits.

    Attributes:
        feeds: Checked inputs.
        future: Who waits for the answer.
        deadline: By `time.monotonic()`, None for none.
        queued: By `time.monotonic()`, when it came.
        context: Of the caller, for what observes calls.
        key: Requests of equal keys can be joined.
        rows: How many rows it adds to a batch.
        size: Numbers in a row; joined rows are padded to the largest.
        on_device: Whether the answer stays on the GPU.
    """

    feeds: Mapping[str, Feed]
    future: Future[dict[str, Any]]
    deadline: float | None
    queued: float
    context: Context
    key: Hashable
    rows: int
    size: int
    on_device: bool


class Dispatcher:
    """A bounded queue and the threads that work it off. Thread-safe.

    Args:
        answer: Called in a worker with requests to be answered together; must not raise.
        workers: Threads; they start with the first request.
        bound: Requests that may wait.
        max_rows: Of requests answered together; 1 for one request at a time.
        max_delay: Seconds that a request waits for others.
        max_padding: Share of the numbers of requests answered together that may be padding.
        name: Of the threads.
    """

    def __init__(
        self,
        answer: Callable[[list[Request]], None],
        *,
        workers: int,
        bound: int,
        max_rows: int,
        max_delay: float,
        max_padding: float,
        name: str,
    ) -> None:
        self._answer = answer
        self._bound = bound
        self._max_rows = max_rows
        self._max_delay = max_delay
        self._max_padding = max_padding
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._gathering = False
        self._closed = False
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
            SessionClosed: After `close`.
        """
        with self._changed:
            if self._closed:
                raise SessionClosed("the session is closed: load it again to run it")
            if len(self._waiting) >= self._bound:
                raise Overloaded(
                    f"{self._bound} calls wait already: send less, or load with a longer queue (Limits.queue)"
                )
            self._waiting.append(request)
            if self._threads[0].ident is None:
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

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
        with self._changed:
            left = list(self._waiting)
            self._waiting.clear()
            return left

    def _work(self) -> None:
        while requests := self._next():
            self._answer(requests)

    def _next(self) -> list[Request]:
        """What to answer next; nothing after the last."""
        with self._changed:
            while not self._waiting or self._gathering:
                if self._closed and not self._waiting:
                    return []
                self._changed.wait()
            if self._max_rows == 1:
                return [self._waiting.popleft()]
            self._gathering = True  # two that gathered would halve the batches
            try:
                return self._gather()
            finally:
                self._gathering = False
                self._changed.notify_all()

    def _gather(self) -> list[Request]:
        """The first that waits, and those like it that come before its delay is over or the batch is full."""
        first = self._waiting.popleft()
        batch = _Batch(first)
        until = first.queued + self._max_delay
        while True:
            for request in sorted(self._waiting, key=lambda request: abs(request.size - first.size)):
                if batch.takes(request, self._max_rows, self._max_padding):
                    self._waiting.remove(request)
            left = until - time.monotonic()
            if batch.rows >= self._max_rows or left <= 0 or self._closed:
                return batch.requests
            self._changed.wait(left)


class _Batch:
    """Requests to be answered together."""

    def __init__(self, first: Request) -> None:
        self.requests = [first]
        self.rows = first.rows
        self._largest = first.size
        self._numbers = first.rows * first.size  # padding not counted

    def takes(self, request: Request, max_rows: int, max_padding: float) -> bool:
        """Add a request if it fits."""
        rows, largest = self.rows + request.rows, max(self._largest, request.size)
        numbers = self._numbers + request.rows * request.size
        fits = request.key == self.requests[0].key and rows <= max_rows
        if not fits or numbers < (1 - max_padding) * rows * largest:
            return False
        self.requests.append(request)
        self.rows, self._largest, self._numbers = rows, largest, numbers
        return True
