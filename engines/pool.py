"""What is lent to one call at a time: execution contexts, or the right to run."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from tnm_pipeline.engines.errors import DeadlineExceeded, Overloaded

T = TypeVar("T")


class Pool(Generic[T]):
    """A fixed number of things, each lent to one thread at a time. Thread-safe.

    Args:
        items: What is lent.
        patience: Seconds after which a call that waits for one gives up.

    Raises:
        ValueError: There is nothing to lend, or no time to wait.
    """

    def __init__(self, items: Sequence[T], patience: float) -> None:
        if not items or not patience > 0:
            raise ValueError(f"a pool of {len(items)} with a patience of {patience} s: give one or more and a time")
        self.size = len(items)
        self.patience = patience
        self._items = list(items)  # the last one that came back first: its graphs and caches are warm
        self._free: SimpleQueue[None] = SimpleQueue()
        for _ in items:
            self._free.put(None)

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
        try:
            self._free.get_nowait()
        except Empty:
            self._wait(deadline)
        return self._items.pop()

    def give_back(self, item: T) -> None:
        """Make `item` free for the next call."""
        self._items.append(item)
        self._free.put(None)

    def _wait(self, deadline: float | None) -> None:
        left = self.patience if deadline is None else min(self.patience, deadline - time.monotonic())
        try:
            self._free.get(timeout=max(left, 0.0))
        except Empty:
            pass
        else:
            return
        if left < self.patience:
            raise DeadlineExceeded(
                f"all {self.size} contexts were busy until the deadline: allow more time, or load with a larger pool"
            )
        raise Overloaded(
            f"all {self.size} contexts were busy for {self.patience:g} s: load with a larger pool, or send less"
        )
