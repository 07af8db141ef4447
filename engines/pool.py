"""What is lent to one call at a time: execution contexts, or the right to run."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from tnm_pipeline.engines.errors import DeadlineExceeded, Overloaded

T = TypeVar("T")


class _Waiter(Generic[T]):
    """A call that is handed an item by whoever gives one back."""

    def __init__(self) -> None:
        self.handed = threading.Lock()
        self.handed.acquire()
        self.item: T


class Pool(Generic[T]):
    """A fixed number of things, each lent to one thread at a time, to those who wait in their order. Thread-safe.

    Args:
        items: What is lent; the last one that came back first, as its graphs and caches are warm.
        patience: Seconds after which a call that waits for one gives up.

    Raises:
        ValueError: There is nothing to lend, or no time to wait.
    """

    def __init__(self, items: Sequence[T], patience: float) -> None:
        if not items or not patience > 0:
            raise ValueError(f"a pool of {len(items)} with a patience of {patience} s: give one or more and a time")
        self.size = len(items)
        self.patience = patience
        self._lock = threading.Lock()
        self._free = list(items)
        self._waiters: deque[_Waiter[T]] = deque()

    @contextmanager
    def lent(self, deadline: float | None = None) -> Iterator[T]:
        """One of the items, back in the pool afterwards.

        Args:
            deadline: By `time.monotonic()`, when the caller no longer wants an answer.

        Raises:
            DeadlineExceeded: None was free before the deadline.
            Overloaded: None was free for `patience` seconds.
        """
        item = self.take(deadline)
        try:
            yield item
        finally:
            self.give_back(item)

    def take(self, deadline: float | None = None) -> T:
        """Like `lent`, for callers that give it back themselves."""
        with self._lock:
            if self._free:
                return self._free.pop()
            waiter: _Waiter[T] = _Waiter()
            self._waiters.append(waiter)
        return self._wait(waiter, deadline)

    def give_back(self, item: T) -> None:
        """Hand `item` to the call that waits longest, or keep it for the next one.

        Were it only made free, the thread that gives it back would take it again before another one wakes.
        """
        with self._lock:
            if not self._waiters:
                self._free.append(item)
                return
            waiter = self._waiters.popleft()
        waiter.item = item
        waiter.handed.release()

    def _wait(self, waiter: _Waiter[T], deadline: float | None) -> T:
        left = self.patience if deadline is None else min(self.patience, deadline - time.monotonic())
        try:
            if waiter.handed.acquire(timeout=max(left, 0.0)):
                return waiter.item
        except BaseException:  # an interrupt: what is handed over must not be lost
            if not self._withdrawn(waiter):
                self.give_back(waiter.item)
            raise
        if not self._withdrawn(waiter):
            return waiter.item
        if left < self.patience:
            raise DeadlineExceeded(
                f"all {self.size} contexts were busy until the deadline: allow more time, or load with a larger pool"
            )
        raise Overloaded(
            f"all {self.size} contexts were busy for {self.patience:g} s: load with a larger pool, or send less"
        )

    def _withdrawn(self, waiter: _Waiter[T]) -> bool:
        """Take back the wish for an item; False where one was handed over at the last moment."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                return True
        waiter.handed.acquire()
        return False
