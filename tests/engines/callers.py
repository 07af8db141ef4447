"""What many callers of a session do."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import numpy as np

from tnm_pipeline.engines import (
    Session,
)

LONG, SHORT = 500_000, 1  # rounds: half a second, and nothing


def feeds(rounds: int = SHORT, value: float = 1.0) -> dict[str, Any]:
    return {"input": np.full(3, value, np.float32), "rounds": np.array(rounds)}


def rows(count: int, seed: int = 0) -> dict[str, Any]:
    return {"input": np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)}


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in threads; what one of them raises is raised here."""
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # to be raised in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def busy(session: Session, calls: int) -> Iterator[list[Future[dict[str, Any]]]]:
    """With that many long calls under way."""
    futures = [session.submit(feeds(LONG)) for _ in range(calls)]
    while session.metrics().waiting:
        time.sleep(0.001)
    yield futures
    wait(futures)
